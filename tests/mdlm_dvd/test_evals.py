"""The doors to evaluation: lm-eval's model, run_evals.py, the benchmark scripts, plots, and the suite on the models that ship."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

import mdlm_dvd
from mdlm_dvd.scripts import plot_metrics, run_evals
from mdlm_dvd.src.evals.dvd_lm_eval import DVD_LM, Swap, cost_ratio
from mdlm_dvd.src.evals.suite import __main__ as suite
from mdlm_dvd.src.evals.suite.decoders import Decoded, Method, Pair
from mdlm_dvd.src.registry import ModelRegistry
from shared.errors import UserError, run_main
from tests.shared.test_rooms import imported

FOLDER = Path(mdlm_dvd.__file__).parent
MODELS = ["--drafter", "tiny_drafter", "--verifier", "tiny_verifier"]
SMALL = ["--device", "cpu", "--limit", "2", "--steps", "2", "--gen_length", "16", "--batch_size", "2"]
PROBLEM = "Tom has 68 toys. He gives away 23 toys. How many toys does Tom have now?"


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(ModelRegistry(), "tiny_drafter", "tiny_verifier", device="cpu")


def refused(capsys, main, argv: list[str]) -> str:
    """The one line that a command ends with, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(argv))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2
    assert len(lines) == 1
    return lines[0]


# DVD_LM with a decoder by a script.


@dataclass
class Said:
    """A method that writes ``text`` and keeps what it was asked for."""

    text: str = "one two\n\nthree"
    name: str = "scripted"
    samples: bool = True
    asked: list[tuple] = field(default_factory=list)

    def takes(self, name: str) -> bool:
        return self.samples

    def decode(self, prompts, params, *, first, batch_size, seed, stop):
        self.asked.append((prompts, params, first, batch_size, stop))
        return [Decoded(p + self.text, 3, 0.5, 0.25, len(prompts), 2, 1, 4, 3) for p in prompts]


def scripted(method: Said, **how) -> DVD_LM:
    broker = SimpleNamespace(tokenizer=None, pool=SimpleNamespace(of=lambda role, values: how.pop("typed", {})))
    pair = SimpleNamespace(
        method=lambda name: method, scorer=lambda role: SimpleNamespace(broker=broker), verifier=broker
    )
    return DVD_LM(pair, "scripted", **how)


def generate(lm: DVD_LM, *asked: dict) -> list[str]:
    made = [Instance("generate_until", {}, (f"{k}: ", kwargs), k) for k, kwargs in enumerate(asked)]
    return lm.generate_until(made, disable_tqdm=True)


def test_a_task_may_shorten_texts_and_not_lengthen_them():
    method = Said()
    lm = scripted(method, gen_length=64, steps=40)
    generate(lm, {"until": [], "max_gen_toks": 32}, {"until": [], "max_gen_toks": 512}, {"until": []})
    assert [(p["gen_length"], p["steps"]) for _, p, *_ in method.asked] == [(32, 32), (64, 40), (64, 40)]
    for given, wanted in (({"max_gen_toks": 32}, 32), ({}, 256)):
        method = Said()
        generate(scripted(method), {"until": [], **given})
        assert method.asked[0][1] == {"gen_length": wanted}


def test_requests_of_a_kind_share_batches_and_keep_their_order():
    method = Said("")
    kinds = [{"until": ["a"]}, {"until": "b"}, {"until": ["a"]}, {"until": ["a", ""]}, {"until": ["a"]}]
    assert generate(scripted(method, batch_size=2), *kinds) == [f"{k}: " for k in range(5)]
    assert [(prompts, first, stop) for prompts, _, first, _, stop in method.asked] == [
        (["0: ", "2: "], 0, ["a"]),
        (["4: "], 4, ["a"]),
        (["1: "], 1, ["b"]),
        (["3: "], 3, ["a"]),
    ]


def test_sampling_is_asked_of_algorithms_that_sample():
    method = Said()
    generate(
        scripted(method),
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0},
    )
    assert [p.get("temperature") for _, p, *_ in method.asked] == [0.7, None, None]
    with pytest.raises(UserError, match=r"temperature is 0.7, and scripted is greedy. Allowed: .*--temperature 0"):
        generate(scripted(Said(samples=False)), {"temperature": 0.7})
    generate(scripted(Said(samples=False), typed={"temperature": 0.0}), {"temperature": 0.7})


@pytest.mark.parametrize(("key", "value"), [("num_beams", 4), ("top_p", 0.9), ("penalty_alpha", 0.6)])
def test_what_a_task_asks_for_in_vain_is_refused(key, value):
    with pytest.raises(UserError, match=f"the task's {key} is {value}"):
        generate(scripted(Said()), {"until": [], key: value})
    if key != "penalty_alpha":
        generate(scripted(Said()), {"until": [], key: 1})


def test_whole_texts_have_no_likelihood():
    with pytest.raises(UserError, match=r"no log-likelihood token by token. Allowed: tasks that"):
        scripted(Said()).loglikelihood_rolling([])


@pytest.mark.parametrize("name", ["mc_num", "mc_batch", "batch_size", "gen_length"])
def test_numbers_are_checked(name):
    with pytest.raises(UserError, match=f"{name} is -1. Allowed: at least 1"):
        scripted(Said(), **{name: -1})


# DVD_LM on the models that ship.


def test_texts_end_before_their_stop_string(pair):
    lm = DVD_LM(pair, "llada", gen_length=32, steps=8, block_length=32)
    whole, cut, short = generate_for(
        lm, PROBLEM, {"until": []}, {"until": ["<<", "nowhere"]}, {"until": [], "max_gen_toks": 8}
    )
    assert "<<" in whole
    assert cut == whole.split("<<")[0]
    assert len(lm.tok_encode(short)) <= 8
    assert [d.verifier_nfe for d in lm.decoded][::2] == [8, 8]
    assert [d.drafter_nfe for d in lm.decoded] == [0, 0, 0]


def generate_for(lm: DVD_LM, prompt: str, *asked: dict) -> list[str]:
    return lm.generate_until(
        [Instance("generate_until", {}, (prompt, kwargs), 0) for kwargs in asked], disable_tqdm=True
    )


def test_a_text_does_not_depend_on_its_neighbours(pair):
    prompts = [PROBLEM, "Count from 128 to 140 in steps of 4.", "Hello"]
    made = [Instance("generate_until", {}, (p, {"until": []}), 0) for p in prompts]
    texts = [
        DVD_LM(pair, "threshold_verifier", gen_length=16, steps=4, batch_size=n).generate_until(made, True)
        for n in (1, 3)
    ]
    assert texts[0] == texts[1]


def test_random_draws_belong_to_the_number_of_the_prompt(pair):
    """Whatever batch it is in, so that a run that goes on draws as one that never stopped."""
    params = {"gen_length": 16, "steps": 8, "temperature": 3.0}
    method, prompts = pair.method("llada"), [PROBLEM] * 3
    texts = [d.text for d in method.decode(prompts, params, batch_size=3, seed=5)]
    assert len(set(texts)) == 3
    assert [method.decode(prompts[:1], params, first=k, seed=5)[0].text for k in range(3)] == texts
    assert method.decode(prompts[:1], params, seed=6)[0].text != texts[0]


def test_a_prompt_that_leaves_no_room_is_refused(pair):
    lm = DVD_LM(pair, "llada", gen_length=32, steps=1)
    with pytest.raises(
        UserError, match=r"a prompt has \d+ tokens and its answer 32. Allowed with 'tiny_drafter': 2048 in all"
    ):
        generate_for(lm, "toys " * 2040, {"until": []})
    with pytest.raises(UserError, match=r"Allowed with 'tiny_verifier': 2048 in all"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("toys " * 2048, " are"), 0)], disable_tqdm=True)


def test_a_users_algorithm_need_not_know_of_stop_strings(pair):
    def run_step(drafter, verifier, prompts, step_idx, total_steps, algo_state, gen_length):
        results = [{"text": f"{p} stop here", "tokens": [1, 2], "prompt": p} for p in prompts]
        return {"algo_state": {}, "metrics": {"verifier_nfe": 1}, "results": results}

    method = pair.method("llada")
    own = replace(method, algorithm=replace(method.algorithm, name="own", step=run_step))
    assert not own.takes("temperature")
    (found,) = own.decode(["please"], {"gen_length": 4, "steps": 1}, stop=["stop"])
    assert (found.text, found.tokens, found.verifier_nfe) == ("please ", 2, 1)


def score(lm: DVD_LM, *answers: str) -> list[tuple[float, bool]]:
    made = [Instance("loglikelihood", {}, (f"{PROBLEM}\n", a), k) for k, a in enumerate(answers)]
    return lm.loglikelihood(made, disable_tqdm=True)


def test_answers_are_scored_by_the_verifier(pair):
    lm = DVD_LM(pair, "llada", mc_num=16, mc_batch=8)
    answers = ["68-23 = <<68-23=45>>45 toys", "68-23 = toys 45 <<>>45=23-68"]
    (likely, _), (unlikely, greedy) = score(lm, *answers)
    assert likely > unlikely
    assert not greedy
    again = score(DVD_LM(pair, "llada", mc_num=16, mc_batch=8, check_greedy=False), *answers)
    assert [s for s, _ in again] == [likely, unlikely], "the draws depend on the seed alone"
    assert not any(g for _, g in again)
    other = score(DVD_LM(pair, "llada", mc_num=16, mc_batch=8, seed=1), *answers)
    assert [s for s, _ in other] != [likely, unlikely]


def test_a_score_costs_so_many_forwards(pair):
    before = pair.verifier.forwards
    score(DVD_LM(pair, "llada", mc_num=9, mc_batch=4, check_greedy=False), "45")
    assert pair.verifier.forwards - before == 3


def test_the_ratio_of_costs_is_measured(pair):
    assert 0 < cost_ratio(pair, 16) < 2


def test_texts_are_the_same_with_one_model_at_a_time(pair):
    own = Pair(pair.registry, "tiny_drafter", "tiny_verifier", device="cpu")
    for algorithm in ("threshold_verifier", "cascade", "dual"):
        lms = [
            DVD_LM(p, algorithm, gen_length=16, steps=4, swap=s)
            for p, s in ((pair, None), (own, Swap(own, torch.device("cpu"))))
        ]
        assert generate_for(lms[0], PROBLEM, {"until": []}) == generate_for(lms[1], PROBLEM, {"until": []})
    assert own.verifier.model_state["model"].device == torch.device("cpu")


def test_one_model_at_a_time_is_on_the_device():
    class Model:
        def __init__(self, name):
            self.name, self.at = name, "cpu"

        def to(self, device):
            self.at = str(device)

    class Broker:
        network = None

        def __init__(self, name):
            self.model_state = {"model": Model(name)}
            self.seen: list[list[str]] = []

        def generate(self, *_, **__):
            self.seen.append([b.model_state["model"].at for b in brokers])

        logits = logits_of_states = generate

    brokers = [Broker("verifier"), Broker("drafter")]
    pair = SimpleNamespace(verifier=brokers[0], drafter=brokers[1], alone={}, device=None)
    swap = Swap(pair, torch.device("meta"))
    for name in ("logits", "generate", "logits_of_states"):
        for broker in brokers:
            getattr(broker, name)(None)
    assert [b.seen for b in brokers] == [[["meta", "cpu"]] * 3, [["cpu", "meta"]] * 3]
    swap.bring(brokers[0])
    assert [b.model_state["model"].at for b in brokers] == ["meta", "cpu"]
    assert pair.device == torch.device("meta")


# run_evals.py.


def test_the_command_of_the_seed_on_the_models_that_ship(tmp_path, capsys):
    path = tmp_path / "new" / "out"
    argv = [
        *MODELS,
        "--algorithm",
        "top_k_intersection",
        "--tasks",
        "word_problems,instructions",
        *SMALL,
        "--output_file",
        str(path),
    ]
    run_evals.main([*argv, "--nobody", "3", "--swap_models_each_step"])
    found = json.loads(path.with_suffix(".json").read_text())
    assert list(found)[:5] == ["config", "results", "dvd_metrics_average", "task_scores", "eval_time"]
    assert {k: found["config"][k] for k in ("drafter", "steps", "nobody")} == {
        "drafter": "tiny_drafter",
        "steps": 2,
        "nobody": 3,
    }
    assert set(found["task_scores"]) == {"word_problems", "instructions"}
    assert found["task_samples"] == {"word_problems": 2, "instructions": 2}
    average = found["dvd_metrics_average"]
    assert (average["verifier_nfe"], average["drafter_nfe"], average["texts"]) == (2, 2, 4)
    assert average["weighted_nfe"] == pytest.approx(2 + 2 * average["drafter_cost"])
    assert average["drafted_count"] == 16
    assert 0 <= average["acceptance_rate"] <= 1
    told = capsys.readouterr()
    assert "--nobody" in told.err
    assert f"{path}.json" in told.out


def test_results_have_a_place_of_their_own():
    asked = run_evals.parser().parse_args([*MODELS, "--algorithm", "dual"])
    assert run_evals.output_of(asked) == Path("eval_results/dual_tiny_verifier.json")
    for given, path in (("a", "eval_results/a.json"), ("a.json", "eval_results/a.json"), ("b/v0.5", "b/v0.5.json")):
        asked.output_file = given
        assert run_evals.output_of(asked) == Path(path)
    assert (asked.tasks, asked.num_fewshot, asked.limit, asked.steps, asked.gen_length, asked.batch_size) == (
        "gsm8k",
        0,
        None,
        10,
        64,
        1,
    )


@pytest.mark.parametrize(
    ("results", "score"),
    [
        ({"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2, "acc,none": 0.3}, 0.2),
        ({"exact_match_stderr,none": 0.4, "exact_match,none": 0.1, "acc,none": 0.3}, 0.1),
        ({"alias": "t", "acc,none": 0.3, "acc_norm,none": 0.5}, 0.3),
        ({"bleu,none": 3.0}, None),
    ],
)
def test_a_score_is_found_by_its_name(results, score):
    assert run_evals.task_scores({"t": results}) == {"t": score}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--drafter", "tiny_drafter", "--algorithm", "dual"], "--verifier"),
        ([*MODELS, "--algorithm", "topk"], "unknown algorithm 'topk'"),
        (
            ["--drafter", "tiny_draft", "--verifier", "tiny_verifier", "--algorithm", "dual"],
            "did you mean tiny_drafter",
        ),
        ([*MODELS, "--algorithm", "dual", "--steps", "0"], "steps is 0. Allowed: at least 1"),
        ([*MODELS, "--algorithm", "dual", "--seed", "-1"], "seed is -1"),
        ([*MODELS, "--algorithm", "dual", "--prompts", "3"], "--prompts is what the loop itself passes"),
        ([*MODELS, "--algorithm", "dual", "stray"], "'stray' belongs to no flag"),
        ([*MODELS, "--algorithm", "dual", "--tasks", "functions", "--limit", "1"], "--confirm_run_unsafe_code"),
    ],
)
def test_a_wrong_command_ends_in_one_line(capsys, argv, told):
    assert told in refused(capsys, run_evals.main, argv)


def test_an_unknown_task_is_told_before_models_are_loaded(capsys, monkeypatch):
    from lm_eval import tasks

    known = SimpleNamespace(
        all_tasks=["word_problems", "gsm8k"], match_tasks=lambda names: [n for n in names if n == "gsm8k"]
    )
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: known)
    line = refused(capsys, run_evals.main, [*MODELS, "--algorithm", "dual", "--tasks", "gsm8k,word_problem"])
    assert "unknown task 'word_problem'; did you mean word_problems?" in line
    assert len(line) < 250


def test_without_the_weights_the_models_that_ship_are_named(capsys, monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    big = ["--drafter", "llada_8b_base", "--verifier", "llada_8b_instruct"]
    line = refused(capsys, run_evals.main, [*big, "--algorithm", "top_k_intersection", "--tasks", "word_problems"])
    assert "tiny_verifier" in line
    assert "tiny_drafter" in line
    line = refused(capsys, suite.main, ["--config", "gsm8k", "--output_dir", str(tmp_path / "never")])
    assert "tiny_verifier" in line
    assert not (tmp_path / "never").exists()


# The benchmark scripts: their commands as a stand-in for Python writes them down, then run in this process.


def commands(script: str, tmp_path: Path, *argv: str, **variables: str) -> list[list[str]]:
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$RECORD"\n')
    recorder.chmod(0o755)
    clean = {
        k: v for k, v in os.environ.items() if k not in ("TASKS", "LIMIT", "STEPS", "ALGORITHM", "DRAFTER", "VERIFIER")
    }
    record = tmp_path / "commands"
    record.unlink(missing_ok=True)
    environment = clean | {"PYTHON": str(recorder), "RECORD": str(record)} | variables
    subprocess.run(["bash", str(FOLDER / script), *argv], check=True, env=environment, cwd=tmp_path)
    return [shlex.split(line) for line in record.read_text().splitlines()]


def flag(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_the_benchmark_is_one_command(tmp_path):
    (argv,) = commands("benchmark.sh", tmp_path)
    assert argv[0] == "scripts/run_evals.py"
    asked = run_evals.parser().parse_args(argv[1:])
    assert (asked.drafter, asked.verifier, asked.tasks, asked.algorithm) == (
        "tiny_drafter",
        "tiny_verifier",
        "word_problems",
        "top_k_intersection",
    )
    changed = {"ALGORITHM": "dual", "DRAFTER": "d", "VERIFIER": "v", "TASKS": "gsm8k", "LIMIT": "1", "STEPS": "2", "GEN_LENGTH": "3", "BATCH_SIZE": "4",
               "NUM_FEWSHOT": "5", "OUTPUT_FILE": "f.json"}  # fmt: skip
    (argv,) = commands("benchmark.sh", tmp_path, "--more", "6", **changed)
    for name, value in changed.items():
        assert flag(argv, f"--{name.lower()}") == value
    assert argv[-2:] == ["--more", "6"]


def test_the_suite_of_benchmarks_ends_in_plots(tmp_path, monkeypatch, capsys):
    found = commands("benchmark_suite.sh", tmp_path)
    runs, (plot,) = found[:-1], found[-1:]
    named = [(flag(a, "--algorithm"), flag(a, "--steps"), Path(flag(a, "--output_file")).name) for a in runs]
    short = {"baseline": "baseline_cascade", "threshold": "threshold_verifier", "topk": "top_k_intersection"}
    assert named == [
        (algorithm, s, f"{name}_{s}steps.json") for s in ("10", "20", "30") for name, algorithm in short.items()
    ]
    assert plot[0] == "scripts/plot_metrics.py"
    monkeypatch.chdir(tmp_path)
    small = {
        "LIMIT": "2",
        "STEPS_ARR": "3",
        "GEN_LENGTH": "16",
        "BATCH_SIZE": "2",
        "RESULTS_DIR": "small",
        "TASKS": "instructions",
    }
    for argv in commands("benchmark_suite.sh", tmp_path, **small):
        main = run_evals.main if argv[0] == "scripts/run_evals.py" else plot_metrics.main
        main([*argv[1:], *(["--device", "cpu"] if main is run_evals.main else [])])
    drawn = sorted(p.name for p in Path("small/plots").iterdir())
    assert drawn == [*sorted(plot_metrics.PLOTS), "table.csv", "table.md"]
    rows = list(csv.DictReader(Path("small/plots/table.csv").read_text().splitlines()))
    assert [(r["algorithm"], r["steps"]) for r in rows] == [(a, "3") for a in sorted(short.values())]
    assert [float(r["verifier_nfe"]) for r in rows] == [3, 3, 3]
    assert [float(r["drafter_nfe"]) for r in rows] == [0, 3, 3], "the baseline does not ask the drafter"


# plot_metrics.py.


def result_file(folder: Path, name: str, **changed: Any) -> None:
    found = {
        "config": {"algorithm": "a", "drafter": "d", "verifier": "v", "steps": 8, "gen_length": 64},
        "dvd_metrics_average": {"drafter_nfe": 4, "verifier_nfe": 8, "drafter_cost": 0.5, "total_latency": 2.0},
        "task_scores": {"t": 0.36},
        "task_samples": {"t": 64},
    }
    (folder / name).write_text(json.dumps(found | changed))


def test_rows_weigh_forwards_and_know_their_error(tmp_path):
    result_file(tmp_path, "a.json")
    result_file(
        tmp_path,
        "b.json",
        task_samples={},
        dvd_metrics_average={"verifier_nfe": 3, "drafter_nfe": 1},
        task_scores={"t": 0.5, "u": None},
    )
    result_file(tmp_path, "c.json", dvd_metrics_average={}, config={"algorithm": "b"})
    (tmp_path / "d.json").write_text("[1]")
    (tmp_path / "e.json").write_text("{")
    rows, others = plot_metrics.read(tmp_path)
    by_file = {r["file"]: r for r in rows}
    assert set(by_file) == {"a.json", "b.json", "c.json"}
    assert others == ["d.json", "e.json"]
    assert by_file["a.json"]["stderr"] == pytest.approx(sqrt(0.36 * 0.64 / 64))
    assert (by_file["a.json"]["weighted_nfe"], by_file["a.json"]["latency"]) == (10, 2.0)
    assert (by_file["b.json"]["weighted_nfe"], by_file["b.json"]["stderr"], by_file["b.json"]["latency"]) == (
        4,
        None,
        None,
    )
    assert by_file["c.json"]["weighted_nfe"] is None
    assert [p["group"] for p in plot_metrics.points(rows)] == ["a, d for v", "a, d for v", "b, None for None"]
    (point,) = plot_metrics.points([by_file["a.json"]])
    assert (point["group"], point["low"], point["high"]) == ("a", pytest.approx(0.30), pytest.approx(0.42))


def test_plots_leave_out_what_is_missing(tmp_path, capsys):
    result_file(tmp_path, "a.json", dvd_metrics_average={})
    plot_metrics.main(["--results_dir", str(tmp_path)])
    assert [p.name for p in (tmp_path / "plots").glob("*.png")] == ["pareto_steps_vs_acc.png"]
    assert ",8,64,0.36," in (tmp_path / "plots" / "table.csv").read_text()


@pytest.mark.parametrize("there", [False, True])
def test_nothing_to_plot_is_one_line(tmp_path, capsys, there):
    folder = tmp_path if there else tmp_path / "none"
    assert "run_evals.py" in refused(capsys, plot_metrics.main, ["--results_dir", str(folder)])


# The suite on the models that ship.


def test_the_suite_runs_to_its_end(tmp_path, monkeypatch, capsys):
    small = {
        "inherits": "tiny",
        "model_params": {"draft_steps": 2, "gen_length": 32},
        "datasets": {"word_problems": None},
        "metrics": {"held_out_bound": {"draws": 4}},
        "baselines": {"verifier": {"steps": 8}, "drafter": {"steps": 8}},
        "device": "cpu",
    }
    (tmp_path / "small.json").write_text(json.dumps(small))
    argv = ["--config", str(tmp_path / "small.json"), "--output_dir", str(tmp_path / "out"), "--limit", "2"]
    suite.main(argv)
    found = json.loads((tmp_path / "out" / "full_evaluation_results.json").read_text())
    runs = {r["method"]: r for r in found["all_runs"]}
    assert list(runs) == ["cascade", "verifier alone", "drafter alone"]
    assert (runs["verifier alone"]["drafter_nfe"], runs["drafter alone"]["verifier_nfe"]) == (0, 0)
    assert 0 < runs["drafter alone"]["drafter_nfe"] <= 8
    assert found["parameters"]["drafter"] < found["parameters"]["verifier"]
    bounds = {b["model"]: b["nats_per_token"] for b in found["held_out_bound"]}
    assert bounds["verifier"] < bounds["drafter"], "the verifier knows these texts better"
    assert {s["batch_size"] for s in found["speed"]} == {1, 2}
    names = {
        "full_evaluation_results.json",
        "main_results.csv",
        "hyperparameters.csv",
        "README.md",
        "reproducibility.md",
        "pareto.png",
        "accuracy.png",
    }
    assert names <= {p.name for p in (tmp_path / "out").iterdir()}
    assert "--limit 2" in (tmp_path / "out" / "reproducibility.md").read_text()

    def decoded(*_, **__):
        raise AssertionError("the second run decodes nothing")

    monkeypatch.setattr(Method, "decode", decoded)
    suite.main(argv)
    assert json.loads((tmp_path / "out" / "full_evaluation_results.json").read_text())["all_runs"] == found["all_runs"]
    assert "3 runs in" in capsys.readouterr().out


def test_only_evaluation_imports_eval():
    files = [p for p in FOLDER.rglob("*.py") if not {"evals", "scripts"} & set(p.relative_to(FOLDER).parts)]
    assert len(files) > 10
    for path in files:
        assert not {m.split(".")[0] for m in imported(path)} & {"eval", "train"}, path


# The notebook.


def test_the_notebook_shows_the_five_steps(capsys):
    """Its cells run in their order, without a notebook server."""
    cells = json.loads((FOLDER / "test_pipeline.ipynb").read_text(encoding="utf-8"))["cells"]
    titles = [c["source"][0].strip() for c in cells if c["cell_type"] == "markdown"]
    assert titles[1:] == [
        "## 1. Drafting",
        "## 2. Verification",
        "## 3. Comparison",
        "## 4. Remasking",
        "## 5. Iteration",
    ]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    shown = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("{"))
    assert list(shown) == ["Start", "Draft", "Verified", "Rejected", "Remasked", "Result"]
    assert shown["Start"] == repr("_" * names["LENGTH"])
    assert "_" not in shown["Verified"]
    assert 0 < len(names["rejected"]) < names["LENGTH"]
    unwritten = int(names["masked"].sum())
    assert sum(i == names["mask_id"] for i in names["kept"]) == len(names["rejected"]) + unwritten
    assert 1 < names["result"]["stats"]["iterations"] <= 8
