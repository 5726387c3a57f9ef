"""main.py, the registry and the broker: what users type, and what they are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdlm_dvd import main as program
from mdlm_dvd.src.flags import parse, pool_of
from mdlm_dvd.src.model import ModelBroker, Pool, call
from mdlm_dvd.src.registry import HOME, ModelRegistry
from shared.errors import UserError

PROMPT = "Tom has 68 toys. He gives away 23 toys. How many toys does Tom have now?"
QUICK = ["--prompt", PROMPT, "--gen_length", "64"]
SEED = (
    '--drafter llada_8b_base --verifier llada_8b_instruct --algorithm baseline_cascade --prompt "Give me a short story for a 5 year old" '
    "--output_dir baseline_output --tokenizer_max_len 32 --gen_length 64 --steps 32"
)


@pytest.fixture(scope="module")
def registry():
    """Models are loaded once for this module."""
    return ModelRegistry()


@pytest.fixture
def go(monkeypatch, registry, capsys):
    """Runs main.py on words and returns what it printed."""
    monkeypatch.setattr(program, "ModelRegistry", lambda path=None: registry if path is None else ModelRegistry(path))

    def run(*words: str) -> str:
        program.main_run([str(w) for w in words])
        return capsys.readouterr().out

    return run


def test_flags():
    words = [
        "--steps",
        "-5",
        "--rate=1e-3",
        "--flag",
        "--no-cache",
        "--gen-length",
        "64",
        "--verifier.steps",
        "2",
        "--l",
        "[1, 2]",
        "--n",
        "null",
    ]
    found = parse(words)
    assert found == {
        "steps": -5, "rate": 0.001, "flag": True, "cache": False, "gen_length": 64, "verifier.steps": 2, "l": [1, 2], "n": None
    }  # fmt: skip
    assert parse(["--prompt", "How much? 3"]) == {"prompt": "How much? 3"}
    for words, said in (
        (["stray"], "belongs to no flag"),
        (["--a", "1", "--a", "2"], "given twice"),
        (["--gen-length", "1", "--gen_length", "2"], "given twice"),
        (["--1x"], "is no name"),
    ):
        with pytest.raises(UserError, match=said):
            parse(words)
    for flag, said in (
        ("--model", "the loop itself"),
        ("--verifer.steps", "no such role"),
        ("--drafter.state", "the loop"),
    ):
        with pytest.raises(UserError, match=said):
            pool_of(parse([flag, "1"]))


def test_precedence_and_what_is_used():
    pool = pool_of(parse(["--a", "1", "--b", "1", "--drafter.b", "2", "--c", "1", "--unused", "1"]))
    pool.published["c"] = 3

    def asks(first, a, b, c=0, d=4):
        return first, a, b, c, d

    noted = lambda names: pool.use("drafter", names)  # noqa: E731
    assert call(asks, {"x": "own"}, pool.of("drafter", {"a": 0, "d": 5}), noted) == ("own", 1, 2, 3, 5)
    assert pool.unused() == ["unused"]
    assert call(lambda **all_: sorted(all_), {}, {"a": 1, "b": 2}) == ["a", "b"]
    with pytest.raises(UserError, match=r"test_main.py:asks asks for a, b, which nobody gives. Allowed: --a VALUE"):
        call(asks, {"x": 1}, {})


def test_an_entry_of_both_roles_is_loaded_once(registry):
    one, two = (
        registry.load("tiny_drafter", role, Pool({"device": "cpu", "dtype": "float32"}))
        for role in ("drafter", "verifier")
    )
    assert one.model_state is two.model_state
    assert (one.role, two.role) == ("drafter", "verifier")


BAD = {
    "extra: 1": "unknown key of registry.yaml 'extra'",
    "available_models: 3": "available_models is no list",
    "available_models: [3]": r"available_models\[0\] is no mapping",
    "available_models: [{name: a}]": r"available_models\[0\].gen_func is missing",
    "available_models: [{name: a, paht: b}]": "did you mean path",
    "available_algorithms: [{name: a, path: gone.py, step_func: f}]": "'gone.py' is no file",
    "available_algorithms: [{name: a, path: here.py, step_func: f}, {name: a, path: here.py, step_func: f}]": "there twice",
    "available_algorithms: [{name: a, path: here.py, step_func: 1}]": "step_func is no text",
    "a: [": "is not YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_registry_is_told_by_its_path(text, tmp_path):
    (tmp_path / "here.py").write_text("def g(): pass\n")
    (tmp_path / "registry.yaml").write_text(text)
    with pytest.raises(UserError, match=BAD[text]):
        ModelRegistry(tmp_path / "registry.yaml")


def test_bad_scripts_are_told(tmp_path):
    (tmp_path / "here.py").write_text("import nothing_of_that_name\n")
    entry = "available_algorithms: [{name: a, path: here.py, step_func: f}]"
    (tmp_path / "registry.yaml").write_text(entry)
    with pytest.raises(UserError, match="nothing_of_that_name"):
        ModelRegistry(tmp_path / "registry.yaml").algorithm("a")
    (tmp_path / "here.py").write_text("f = 3\n")
    with pytest.raises(UserError, match=r"'f' is no function of here\.py"):
        ModelRegistry(tmp_path / "registry.yaml").algorithm("a")
    with pytest.raises(UserError, match="cannot be read"):
        ModelRegistry(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="did you mean"):
        ModelRegistry().algorithm("cascad")


def test_the_default_pair_solves_and_says_that_it_is_lossless(go):
    out = go(*QUICK)
    assert "#### 45" in out
    assert "lossless: yes" in out
    assert "drafts accepted" in out


@pytest.mark.parametrize(
    "name", ["baseline", "threshold", "top_k_intersection", "topk_sets", "verify_exact", "llada", "dual"]
)
def test_every_algorithm_runs(go, name):
    out = go(*QUICK, "--algorithm", name, "--steps", "16")
    assert f"{name}: " in out


def test_output_dir_appends_and_resumes(go, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": PROMPT, "id": k, "kind": "toys"}) + "\n\n" for k in "ab"))
    words = ["--prompt_file", file, "--output_dir", tmp_path / "out", "--gen_length", "32", "--verbose"]
    out = go(*words)
    assert "[it=0]" in out
    lines = [json.loads(line) for line in (tmp_path / "out/output.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b"]
    assert list(lines[0])[:3] == ["prompt", "output", "metrics"]
    assert lines[0]["kind"] == "toys"
    assert {"drafter_nfe", "verifier_nfe", "total_latency", "avg_step_latency", "acceptance_rate"} <= set(
        lines[0]["metrics"]
    )
    assert 0 <= lines[0]["metrics"]["acceptance_rate"] <= 1
    assert lines[0]["stats"]["verifier_nfe"] == lines[0]["metrics"]["verifier_nfe"], "a batch of one"
    traced = [json.loads(line) for line in (tmp_path / "out/trace.jsonl").read_text().splitlines()]
    assert len(traced) == sum(line["stats"]["iterations"] for line in lines)
    program.main_run([str(w) for w in words])
    assert "2 of 2 prompts are done" in capsys.readouterr().err
    with pytest.raises(UserError, match="other settings"):
        go(*words[:-1], "--accept", "threshold")


def test_what_nobody_takes_is_told(go, capsys):
    program.main_run([*QUICK, "--colour", "red"])
    assert "no function takes --colour" in capsys.readouterr().err
    with pytest.raises(UserError, match="no function takes --colour"):
        go(*QUICK, "--colour", "red", "--strict")
    go(*QUICK, "--accept_threshold", "0.3", "--accept", "threshold", "--tokenizer_max_len", "50", "--strict")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--drafter", "tiny_drafer"], "did you mean tiny_drafter"),
        (["--prompt", "a", "--prompt_file", "b"], "both given"),
        (["--prompt", " "], "prompt is empty"),
        (["--prompt_file", "gone.txt"], "cannot be read"),
        (["--prompt", "a", "--gen_length", "0"], "gen_length is 0"),
        (["--prompt", "a", "--steps", "1"], "steps is 1. Allowed: at least 4"),
        (["--prompt", "a", "--batch_size", "x"], "batch_size is 'x'"),
        (["--prompt", PROMPT, "--tokenizer_max_len", "5"], "--truncate_prompt keeps its beginning"),
        (["--prompt", "a", "--accept", "exat"], "did you mean exact"),
        (["--prompt", "a", "--gen_length", "2048"], "Allowed together: 2048, the positions of 'tiny_verifier'"),
        (
            ["--prompt", "a", "--drafter", "sdar_tiny", "--verifier", "sdar_tiny", "--algorithm", "verify_exact"],
            "block by block",
        ),
    ],
)
def test_bad_input_is_one_line(go, words, said):
    with pytest.raises(UserError, match=said) as error:
        go(*words)
    assert "\n" not in str(error.value)


def test_truncated_as_published(go):
    assert "tokens" in go(*QUICK, "--tokenizer_max_len", "5", "--truncate_prompt")


def test_the_seed_command_parses_and_names_what_ships(go, monkeypatch, tmp_path):
    """As pasted: without the released weights it ends in one line that says what to type instead; with tiny names it runs."""
    import shlex

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = shlex.split(SEED)
    with pytest.raises(UserError, match="tiny_drafter and tiny_verifier, which ship here") as error:
        go(*words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "baseline_output").exists()
    out = go(
        *[{"llada_8b_base": "tiny_drafter", "llada_8b_instruct": "tiny_verifier"}.get(w, w) for w in words],
        "--truncate_prompt",
    )
    assert (Path("baseline_output") / "output.jsonl").is_file()
    assert "baseline_cascade: " in out


def test_divergence_is_an_entropy(go):
    out = go(*QUICK, "--compute_divergence")
    value = float(out.split("divergence: ")[1].split()[0])
    assert 0 <= value < 7, "nats of 1024 tokens"


def test_ours_are_found_in_the_package():
    registry = ModelRegistry()
    for name in registry.algorithms:
        assert registry.algorithm(name).step.__module__.startswith("mdlm_dvd.algorithms"), name
    assert (HOME / "main.py").is_file()


def test_a_broker_asks_for_model_and_tokenizer():
    with pytest.raises(UserError, match="returns no 'tokenizer'"):
        ModelBroker(type("M", (), {"load": staticmethod(lambda: {"model": 1})}), {"name": "x", "init_func": "load"})
