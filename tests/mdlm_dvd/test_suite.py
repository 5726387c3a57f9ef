"""The evaluation suite: answers, figures, likelihoods, configurations, and whole runs with scripted decoders."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, fields, is_dataclass, replace
from math import exp, log
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

import mdlm_dvd
from mdlm_dvd.src.evals.suite import config as configs
from mdlm_dvd.src.evals.suite import driver, likelihood, metrics, problems, report
from mdlm_dvd.src.evals.suite.answers import as_choice, as_number, extract_choice, extract_number
from mdlm_dvd.src.evals.suite.decoders import Decoded
from mdlm_dvd.src.evals.suite.problems import Problem
from shared.errors import UserError
from shared.network.loading import load_tokenizer

MASK = 4


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.", "1234"),
        ("Answer: $1,234,567.50", "1234567.5"),
        ("Answer: **18.0**", "18"),
        ("answer:-3.50 done", "-3.5"),
        ("Answer: -$5", "-5"),
        ("$-5 it is", "-5"),
        ("Answer: .5", "0.5"),
        ("Answer: 18 dollars. 3", "18"),
        ("pages 3-4", "4"),
        ("x1 = 7", "7"),
        ("1,23", "23"),
        ("-0.0", "0"),
        ("007", "7"),
        ("Answer: none\n12", "12"),
        ("no digits", None),
        ("", None),
    ],
)
def test_numbers_are_found_and_shortened(text, number):
    assert extract_number(text) == number


def test_a_number_is_a_whole_text():
    assert [as_number(t) for t in (" 1,000 ", "18.00", "$20", "twenty", "1 2", "")] == ["1000", "18", "20", *[None] * 3]


@pytest.mark.parametrize(
    ("text", "count", "letter"),
    [
        ("Answer: B", 4, "B"),
        ("answer: (c)", 4, "C"),
        ("Answer: 3", 4, "C"),
        ("Answer: 5", 4, None),
        ("Answer: E", 4, None),
        ("Answer: E", 5, "E"),
        ("Answer: Apple", 4, None),
        ("I think\n(b).", 4, "B"),
        ("B. apples", 4, None),
        ("A\n\n", 4, "A"),
        ("", 4, None),
    ],
)
def test_choices_are_found(text, count, letter):
    assert extract_choice(text, count) == letter


def test_keys_of_choices_are_letters_or_numbers():
    assert [as_choice(k, 4) for k in ("a", "D", "1", "4", "0", "5", "E", "²")] == ["A", "D", "A", "D", *[None] * 4]


def test_problems_of_the_public_sets():
    gsm = problems.gsm8k({"question": "How many?", "answer": "so <<1*1=1>>\n#### 1,234"}, 0)
    assert gsm.judge("Answer: 1234.0")
    assert not gsm.judge("Answer: 234")
    row = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2}
    assert problems.mmlu(row, 0).judge("Answer: C")
    row = {
        "id": "q1",
        "question": "Which?",
        "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    }
    arc = problems.arc_challenge(row, 0)
    assert (arc.id, "\nB. x\n" in arc.prompt, " Format: " in arc.prompt) == ("q1", True, True)
    assert arc.judge("B")
    for problem in (gsm, arc):
        assert problem.judge(problem.solution)


def test_a_set_that_cannot_be_had_is_one_line(monkeypatch):
    import datasets

    def fails(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(
        UserError, match=r"data set 'gsm8k' \(openai/gsm8k\) cannot be had .*no route to the hub.*word_problems"
    ) as told:
        problems.load("gsm8k")
    assert "\n" not in str(told.value)


def test_public_sets_are_read_whole(monkeypatch):
    import datasets

    asked = []
    rows = [{"question": f"{k}?", "answer": f"#### {k}"} for k in range(7)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    assert [len(problems.load("gsm8k")), len(problems.load("gsm8k", 3))] == [7, 3]
    assert asked[0] == (("openai/gsm8k", "main"), {"split": "test"})


@pytest.mark.parametrize("name", problems.OFFLINE)
def test_offline_solutions_solve_their_problems(name):
    found = problems.load(name, 3, run_unsafe_code=True)
    assert len(found) == 3
    assert all(p.judge(p.solution) for p in found)
    assert not any(p.judge("no idea") for p in found)


def test_functions_are_run_when_they_may():
    with pytest.raises(UserError, match="--confirm_run_unsafe_code"):
        problems.load("functions", 1)


def test_interval_of_one_number_has_no_end():
    assert metrics.confidence_interval([0.5]) == (0.5, float("inf"))


def test_an_interval_holds_the_mean_as_often_as_it_says():
    source = torch.Generator().manual_seed(0)
    held = 0
    for row in torch.randn(2000, 5, generator=source).tolist():
        mean, margin = metrics.confidence_interval(row, 0.8)
        held += abs(mean) <= margin
    assert held / 2000 == pytest.approx(0.8, abs=0.03)


def test_self_bleu_is_high_where_samples_are_alike():
    same = ["the cat sat on the mat today"] * 3
    others = ["the cat sat on the mat today", "a dog ran over that hill now", "many birds fly south in cold winters"]
    assert metrics.self_bleu(same) == pytest.approx(100)
    assert metrics.self_bleu(others) < 15
    assert metrics.self_bleu(["one"]) is None
    assert metrics.self_bleu(["two words"] * 2) == pytest.approx(100), "short texts have no runs of four words"


def test_peak_memory_is_counted_anew():
    device = torch.device("cpu")
    size = 1 << 26
    with metrics.peak_memory(device) as large:
        torch.ones(size, dtype=torch.uint8)
    with metrics.peak_memory(device) as small:
        pass
    if large.bytes is None:
        pytest.skip("this system counts no peaks")
    assert large.bytes > small.bytes + size // 2


# Likelihoods. A network by a table: what it says of a place depends on the visible tokens.


def table(seed: int = 0):
    source = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, 5, 3, 5, generator=source)

    def logits_of(states):
        seen = torch.nn.functional.one_hot(states, 5).float()
        logits = torch.einsum("msv,sviw->miw", seen, weights)
        logits[..., MASK] = -torch.inf
        return logits

    return logits_of


def exact_bound(logits_of, target) -> float:
    """By all sets of masks: each count of masks as likely as any other, each set of that size too."""
    length, total = len(target), 0.0
    for count in range(1, length + 1):
        sets = list(itertools.combinations(range(length), count))
        for hidden in sets:
            state = [MASK if k in hidden else t for k, t in enumerate(target)]
            scores = logits_of(torch.tensor([state]))[0].double().log_softmax(-1)
            said = sum(float(scores[k, target[k]]) for k in hidden)
            total += said * length / count / len(sets) / length
    return total


def test_the_estimate_is_the_bound():
    logits_of, target = table(), [0, 3, 1]
    found = likelihood.masked_log_likelihood(logits_of, target, MASK, draws=4096, at_once=64)
    assert found == pytest.approx(exact_bound(logits_of, target), abs=0.05)


@pytest.mark.parametrize("draws", [1, 5, 64])
def test_the_estimate_is_exact_where_every_token_is_as_likely(draws):
    def uniform(states):
        return torch.zeros(*states.shape, 7)

    assert likelihood.masked_log_likelihood(uniform, [1, 2, 3, 4], 6, draws=draws, at_once=8) == pytest.approx(
        -4 * log(7)
    )


def test_an_estimate_depends_on_its_seed_alone():
    logits_of, target = table(), [2, 2, 0]
    one, other = (likelihood.masked_log_likelihood(logits_of, target, MASK, draws=7, seed=(s, 3)) for s in (1, 2))
    torch.manual_seed(99)
    assert likelihood.masked_log_likelihood(logits_of, target, MASK, draws=7, seed=(1, 3)) == one
    assert one != other
    assert likelihood.masked_log_likelihood(logits_of, [], MASK) == 0


def test_greedy_is_what_greedy_decoding_writes():
    logits_of, state = table(3), [MASK] * 3
    for _ in range(3):
        prob, tokens = logits_of(torch.tensor([state]))[0].softmax(-1).max(-1)
        place = max((k for k in range(3) if state[k] == MASK), key=lambda k: float(prob[k]))
        state[place] = int(tokens[place])
    assert likelihood.is_greedy(logits_of, state, MASK)
    for k in range(3):
        other = [(t + 1) % 4 if j == k else t for j, t in enumerate(state)]
        assert not likelihood.is_greedy(logits_of, other, MASK)


class Words:
    """A tokenizer: a word is its length."""

    bos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [len(w) for w in text.split()]}


def test_generative_perplexity_weighs_tokens():
    class Fixed:
        """Says 1/2 for token 1 and 1/8 for the others, of which there are four."""

        device, config = torch.device("cpu"), SimpleNamespace(max_position_embeddings=6)

        def __call__(self, ids):
            row = torch.tensor([1 / 8, 1 / 2, 1 / 8, 1 / 8, 1 / 8]).log()
            return SimpleNamespace(logits=row.expand(1, ids.shape[1], 5))

    found = likelihood.generative_perplexity(Fixed(), Words(), ["a a a", "bb", "", "a bb a bb a bb a"])
    ones, others = 3 + 3, 1 + 2  # the last text is cut to five words behind BOS
    assert (found.tokens, found.texts) == (9, 3)
    assert found.value == pytest.approx(exp((ones * log(2) + others * log(8)) / 9))
    assert found.mean_tokens == 3


def test_perplexity_under_a_network_of_transformers(tmp_path):
    """A small GPT-2 with random weights, whose own loss is what a text costs it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 1024}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path)
    load_tokenizer(Path(mdlm_dvd.__file__).parent / "tiny" / "drafter").save_pretrained(tmp_path)
    model, tokenizer = likelihood.load_causal(str(tmp_path), torch.device("cpu"))
    texts = ["Tom has 68 toys.", "Count from 128 to 140 in steps of 4."]
    found = likelihood.generative_perplexity(model, tokenizer, texts)
    nats = tokens = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        tokens += ids.shape[1] - 1
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert found.tokens == tokens
    assert found.value == pytest.approx(exp(nats / tokens), rel=1e-4)


def test_a_causal_network_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"generative_perplexity\.model"):
        likelihood.load_causal(str(tmp_path), torch.device("cpu"))


# Configurations.


def written(folder, name: str, **values) -> str:
    (folder / name).write_text(json.dumps(values))
    return str(folder / name)


BASE = {
    "experiment_name": "base",
    "drafter": "small",
    "verifier": "large",
    "algorithm": "threshold_verifier",
    "model_params": {"gen_length": 8, "steps": [2, 4]},
    "datasets": {"word_problems": {"limit": 4}, "instructions": {}},
    "metrics": {"speed": {"batch_sizes": [1, 2]}},
    "seeds": [1, 2],
}


def test_a_configuration_inherits(tmp_path):
    written(tmp_path, "base.json", **BASE)
    written(
        tmp_path, "middle.json", inherits="base.json", seeds=[7], model_params={"steps": 3}, metrics={"speed": None}
    )
    child = written(
        tmp_path, "child.json", inherits="middle.json", experiment_name="child", datasets={"instructions": None}
    )
    config = configs.load(child)
    assert (config.experiment_name, config.seeds, config.metrics.speed) == ("child", [7], None)
    assert config.model_params == {"gen_length": 8, "steps": 3}
    assert config.datasets == {"word_problems": configs.DataSet(4)}


def test_configurations_do_not_inherit_in_a_circle(tmp_path):
    written(tmp_path, "a.json", inherits="b.json")
    with pytest.raises(UserError, match="inherits itself"):
        configs.load(written(tmp_path, "b.json", inherits="a.json"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sedes": [1]}, r"unknown key in config c.json: 'sedes'; did you mean seeds"),
        ({"metrics": {"speed": {"batchsizes": [1]}}}, r"unknown key in config c.json: metrics: speed: 'batchsizes'"),
        ({"datasets": {"gsm8": {}}}, r"datasets: 'gsm8'; did you mean gsm8k"),
        ({"datasets": {"gsm8k": {"limit": 0}}}, r"datasets: gsm8k: limit is 0. Allowed: at least 1"),
        ({"datasets": {}}, r"datasets is \{\}"),
        ({"baselines": {"autoregressive": {}}}, r"baselines: 'autoregressive'"),
        ({"seeds": []}, r"seeds is \[\]"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
        ({"seeds": [True]}, r"seeds\[0\] is True"),
        ({"batch_size": "8"}, r"batch_size is '8'. Allowed: a whole number"),
        ({"model_params": {"steps": []}}, r"model_params is"),
        ({"metrics": {"accuracy": {"confidence": 95}}}, r"confidence is 95. Allowed: between 0 and 1"),
        ({"metrics": {"generative_perplexity": {}}}, r"generative_perplexity: model is missing. Allowed: a text"),
        ({"drafter": None}, r"drafter is missing"),
        ({"inherits": "nobody.json"}, r"config 'nobody.json' is no file. Allowed: .*default"),
    ],
)
def test_a_wrong_configuration_is_refused_by_its_key(tmp_path, changed, told):
    values = {k: v for k, v in BASE.items() if k not in changed} | changed
    with pytest.raises(UserError, match=told):
        configs.load(written(tmp_path, "c.json", **values))


def test_shipped_configurations_say_what_they_are_for():
    found = {p.stem: configs.load(p.stem) for p in configs.SHIPPED.glob("*.json")}
    assert set(found) == {"default", "gsm8k", "mmlu", "arc_challenge", "full_suite", "test_metrics", "tiny"}
    for name in ("gsm8k", "mmlu", "arc_challenge"):
        assert list(found[name].datasets) == [name]
        assert (found[name].batch_size, found[name].seeds) == (8, [42])
    assert all(c.datasets[d].limit is None for n in ("default", "full_suite") for c in [found[n]] for d in c.datasets)
    assert found["full_suite"].metrics.robustness.prompts
    assert {n: c.experiment_name for n, c in found.items()} == {n: n for n in found}


def test_every_key_is_explained():
    page = (Path(mdlm_dvd.__file__).parent / "EVALUATION.md").read_text(encoding="utf-8")
    for kind in (configs.Config, configs.Metrics):
        for f in fields(kind):
            assert f"`{f.name}`" in page, f.name
    metrics_of = get_type_hints(configs.Metrics)
    for name, kind in metrics_of.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `metrics` `{name}`")]
        inner = kind if is_dataclass(kind) else get_args(kind)[0]
        for f in fields(inner):
            assert f"`{f.name}`" in row, f"{name}: {f.name}"
    for shipped in configs.SHIPPED.glob("*.json"):
        assert f"`{shipped.stem}`" in page


# Whole runs.


@dataclass(frozen=True)
class Scripted:
    """A method that says the solution of every problem whose number its ``knows`` takes, and notes what it was asked."""

    name: str
    knows: int
    asked: list

    def takes(self, name):
        return name in ("gen_length", "steps")

    def decode(self, prompts, params, *, first=0, batch_size=1, seed=0):
        self.asked.append((list(prompts), dict(params), first, batch_size, seed))
        return [
            Decoded(
                f"yes {prompt}" if (first + k + seed) % self.knows == 0 else "no", 2, 0.5, 0.1, len(prompts), 3, 5, 8, 4
            )
            for k, prompt in enumerate(prompts)
        ]


class Table:
    """A pair by scripts."""

    device = torch.device("cpu")

    def __init__(self):
        self.asked = []

    def method(self, algorithm):
        return Scripted(algorithm, 1, self.asked)

    def baseline(self, role):
        return Scripted(f"{role} alone", 2, self.asked)

    def parameters(self):
        return {"drafter": 10, "verifier": 1000}

    def scorer(self, role):
        return SimpleNamespace(
            ids=lambda text: [0, 1, 2][: len(text.split())],
            mask_id=MASK,
            logits_of=lambda prompt, n: lambda s: table()(s),
        )


def some(count: int) -> list[Problem]:
    return [Problem(str(k), f"p{k}", "one two three", lambda text, k=k: text == f"yes p{k}") for k in range(count)]


@pytest.fixture
def config(tmp_path):
    made = configs.load(written(tmp_path, "c.json", **BASE))
    asked = configs.Metrics(
        diversity=configs.Diversity([1], 2),
        speed=configs.Speed([1, 3], 3),
        robustness=configs.Robustness([["a b", "a c"], ["lonely"]], ["bad"]),
        held_out_bound=configs.HeldOutBound(2, 2),
    )
    return replace(made, metrics=asked, baselines={"verifier": {"steps": [2]}}, batch_size=3)


def test_a_run_asks_for_everything_and_reports_it(config, tmp_path):
    pair, folder = Table(), tmp_path / "out"
    found = driver.evaluate(config, pair, {"word_problems": some(7)}, folder, "python -m suite")
    assert [(r["method"], r["params"].get("steps"), r["seed"]) for r in found["all_runs"]] == [
        (name, steps, seed)
        for name, grid in (("threshold_verifier", (2, 4)), ("verifier alone", (2,)))
        for steps in grid
        for seed in (1, 2)
    ]
    # The baseline knows every second problem, other ones with the other seed; it takes gen_length from the method.
    assert [r["solved"] for r in found["all_runs"][-2:]] == ["0101010", "1010101"]
    assert found["all_runs"][-1]["params"] == {"gen_length": 8, "steps": 2}
    assert found["all_runs"][0]["flops_estimate"] == 2 * 10 * 3 + 2 * 1000 * 5
    assert found["all_runs"][0]["acceptance_rate"] == 0.5
    first = [a for a in pair.asked if a[1].get("steps") == 4]
    assert [(len(a[0]), a[2], a[3], a[4]) for a in first] == [
        (n, at, 3, s) for s in (1, 2) for n, at in ((3, 0), (3, 3), (1, 6))
    ]
    timed = [a for a in pair.asked if a[4] == 1 and a[3] == 1 and len(a[0]) == 3]
    assert len(timed) == 2, "a batch size is what is decoded with"
    assert [(s["method"], s["batch_size"], s["texts_at_a_time"]) for s in found["speed"]] == [
        (m, n, n) for m in ("threshold_verifier", "verifier alone") for n in (1, 3)
    ]
    # Of "yes a b" and "yes a c" half the words are shared; the verifier alone answers one of the two.
    assert [r["mean_similarity"] for r in found["robustness"]] == [0.5, 0.5, 0, 0]
    assert found["robustness"][0]["adversarial"] == [{"prompt": "bad", "output": "yes bad"}]
    assert [(b["model"], b["texts"], b["tokens"]) for b in found["held_out_bound"]] == [
        ("verifier", 2, 6),
        ("drafter", 2, 6),
    ]
    assert json.loads((folder / "full_evaluation_results.json").read_text())["all_runs"] == found["all_runs"]
    main = (folder / "main_results.csv").read_text().splitlines()
    assert main[0] == "method,setting,word_problems"
    assert main[1] == 'threshold_verifier,"gen_length=8, steps=2",100.0 ± 0.0'
    assert main[3].endswith(",50.0 ± 0.0"), "each problem was solved with one seed of two"
    assert (folder / "hyperparameters.csv").read_text().startswith("method,gen_length,steps,task,")
    assert "python -m suite" in (folder / "reproducibility.md").read_text()
    for plot in ("pareto.png", "accuracy.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda rows, folder: None)
    asked = {"word_problems": some(7)}
    whole = driver.evaluate(config, Table(), asked, tmp_path / "whole", "")
    pair, keep, kept = Table(), driver.Suite._keep, []

    def killed(self, record):
        if len(kept) == 19:
            raise KeyboardInterrupt
        kept.append(record["key"])
        keep(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(driver.Suite, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            driver.evaluate(config, Table(), asked, tmp_path / "half", "")
    again = driver.evaluate(config, pair, asked, tmp_path / "half", "")
    told = lambda r: [{k: v for k, v in run.items() if k != "peak_memory"} for run in r["all_runs"]]  # noqa: E731
    assert told(again) == told(whole)
    assert min(a[2] for a in pair.asked if a[1].get("steps") == 4 and a[4] == 1) == 3, "the first batch of three stands"
    before = len(pair.asked)
    driver.evaluate(config, pair, asked, tmp_path / "half", "")
    assert len(pair.asked) == before


def test_parameters_that_nobody_asks_for_are_refused(config, tmp_path):
    for wrong in ({"model_params": {"step": 2}}, {"baselines": {"drafter": {"step": 2}}}):
        with pytest.raises(UserError, match=r": step is nothing that (threshold_verifier|drafter alone) asks for"):
            driver.evaluate(replace(config, **wrong), Table(), {"word_problems": some(1)}, tmp_path, "")


def test_a_folder_holds_one_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda rows, folder: None)
    driver.evaluate(config, Table(), {"word_problems": some(2)}, tmp_path, "")
    with pytest.raises(UserError, match="holds results of other settings: config batch_size is 2, there it was 3"):
        driver.evaluate(replace(config, batch_size=2), Table(), {"word_problems": some(2)}, tmp_path, "")


def test_rows_that_lack_a_figure_leave_it_empty():
    assert report.as_csv([{"a": 1}, {"b": None, "a": 2}]) == "a,b\n1,\n2,\n"
    assert report.as_markdown([{"a": 1.23456, "b": "x|y"}]).splitlines()[-1] == "| 1.235 | x\\|y |"
