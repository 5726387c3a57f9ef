"""Files of users: those of customization.md, as they stand on the page, and some as the published framework's users write them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from mdlm_dvd.main import main_run
from mdlm_dvd.src.model import RUNTIME_NAMES
from mdlm_dvd.src.registry import HOME, script
from shared.errors import UserError

PAGE = (HOME / "customization.md").read_text(encoding="utf-8")
STYLE = Path(__file__).parent / "published_style"
LLADA = HOME / "adapters/llada_adapter.py"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The page's files, under the names that their first lines give them."""
    for code in blocks("py") + blocks("yaml"):
        (tmp_path / code.partition("\n")[0].removeprefix("# ")).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outputs(*words: object) -> list[dict]:
    """What main.py wrote for these words."""
    main_run([*map(str, words), "--output_dir", "out", "--strict", "--device", "cpu", "--dtype", "float32"])
    lines = [json.loads(line) for line in Path("out/output.jsonl").read_text().splitlines()]
    shutil.rmtree("out")
    return lines


def commands() -> list[list[str]]:
    (block,) = blocks("sh")
    return [shlex.split(line)[2:] for line in block.replace("\\\n", " ").splitlines()]


def test_the_page_runs_as_it_stands(folder):
    assert len(list(folder.iterdir())) == 4
    for words in commands():
        (line,) = outputs(*words)
        assert len(line["token_ids"]) == 64
        assert 1023 not in line["token_ids"], "the mask token"
        assert line["metrics"]["verifier_nfe"] == 32
        assert "####" in line["output"]
    assert len(commands()) == 2


def test_flags_and_entries_reach_the_page_s_functions(folder):
    words = ["8" if word == "32" else word for word in commands()[0]]
    shares = {}
    for more in ((), ("--keep_from", 0.0), ("--algorithm.keep_from", 30.0), ("--verifier.logit_scale", 0.0)):
        (line,) = outputs(*words, *more)
        shares[" ".join(map(str, more))] = line["metrics"]["acceptance_rate"]
    assert shares["--keep_from 0.0"] == 1.0
    assert shares["--algorithm.keep_from 30.0"] == 0.0, "30 * 0.9 ** 7 is above 1"
    assert 0 < shares[""] < 1
    assert shares["--verifier.logit_scale 0.0"] == 0.0, "each token has 1 / 1024"


RECEIVER = """
from dataclasses import dataclass
from mdlm_dvd.adapters.llada_adapter import *


@dataclass
class Seen:
    values: "list[int]"


def load_seen(model_id, device, dtype):
    return {**load_llada_model(model_id, device, dtype), "seen": Seen([])}


def seeing(tensors, state, gen_length, mask_id, prompt_len, told=0):
    state["seen"].values.append(told)
    return llada_generate(tensors, state, False, gen_length, mask_id, prompt_len)


def run_step(drafter, verifier, prompts, step_idx, total_steps, algo_state, gen_length, mask_id, told=0):
    from mdlm_dvd.algorithms._common import initialize_content
    initialize_content(verifier, prompts, gen_length, mask_id)
    seen = algo_state.get("seen", []) + [told]
    found = {"results": [{"text": repr((seen, verifier.model_state["seen"].values)), "tokens": []}] * len(prompts)}
    return {"algo_state": {"seen": seen}, "publish": {"NAME": told + 5}, **found}
"""


@pytest.mark.parametrize("name", ["told", "model", "prompts"])
def test_what_a_step_publishes_is_received_until_its_batch_is_done(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = RECEIVER.replace("NAME", name)
    Path("user.py").write_text(code)
    Path("registry.yaml").write_text(
        "available_models: [{name: m, path: user.py, init_func: load_seen, tokenizer_func: llada_tokenize, gen_func: seeing, "
        f"model_id: {HOME / 'tiny/drafter'}}}]\navailable_algorithms: [{{name: a, path: user.py, step_func: run_step}}]\n"
    )
    Path("two.txt").write_text("one\ntwo\n")
    words = ["--registry", "registry.yaml", "--drafter", "m", "--verifier", "m", "--algorithm", "a", "--gen_length", 8]
    words += ["--steps", 3, "--prompt_file", "two.txt", "--told", 1]
    if name != "told":
        with pytest.raises(UserError, match=f"'{name}' is published"):
            outputs(*words)
        return
    lines = outputs(*words)
    assert lines[0]["output"] == "([1, 6, 11], [1, 6, 11])", "a flag, then what was published"
    assert lines[1]["output"] == "([1, 6, 11], [1, 6, 11, 1, 6, 11])", "the next batch begins anew"


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """The published-style files beside weights of their network and our tokenizer."""
    shutil.copytree(STYLE, tmp_path, dirs_exist_ok=True)
    shutil.copytree(HOME / "tiny/drafter", tmp_path / "model")
    torch.manual_seed(0)
    weights = script(tmp_path / "adapters/my_adapter.py", tmp_path).MyModel().state_dict()
    weights["head.bias"][1023] = -50.0  # a mask that is predicted is written, here as there
    torch.save(weights, tmp_path / "model/weights.pt")
    with (tmp_path / "registry.yaml").open("a") as file:  # beside ours
        for name in ("baseline_cascade", "threshold_verifier", "cascade", "llada"):
            path = HOME / f"algorithms/{'baseline' if name[0] == 'b' else name}.py"
            file.write(f"  - {{name: {name}, path: {path}, step_func: run_step}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ["--registry", "registry.yaml", "--gen_length", "32", "--steps", "8"]


def test_published_files_run_unchanged(published):
    """Both forms, over an adapter that returns bare logits, write what ours writes; prompts of a batch too."""
    words = [*WORDS, "--drafter", "my_custom_model", "--verifier", "my_custom_model", "--prompt", "Two and two?"]
    newer, older, ours = (
        outputs(*words, "--algorithm", name, *more)[0]
        for name, more in (
            ("my_confidence", ()),
            ("my_older_algorithm", ()),
            ("baseline_cascade", ("--truncate_at_eos", "false")),
        )
    )
    assert len(newer["token_ids"]) == 32
    assert newer["token_ids"] == older["token_ids"] == ours["token_ids"]
    assert newer["metrics"]["verifier_nfe"] == older["metrics"]["verifier_nfe"] == 8
    outputs(*words, "--algorithm", "threshold_verifier")
    for name, more, said in (
        ("cascade", (), "verify_mode ordered. Allowed: visible or leave_out"),
        ("llada", ("--cfg_scale", 1), "cfg_scale. Allowed: 0"),
    ):
        with pytest.raises(UserError, match=said):
            main_run([*words, "--algorithm", name, *map(str, more)])
    outputs(*words, "--algorithm", "cascade", "--verify_mode", "leave_out")
    Path("two.txt").write_text("one\ntwo words\n")
    with pytest.raises(UserError, match="older form"):
        outputs(*words[:-2], "--prompt_file", "two.txt", "--batch_size", 2, "--algorithm", "my_older_algorithm")


def test_published_files_run_on_the_models_that_ship(published):
    """With the template that the adapter puts around prompts, and prompts of unequal lengths in one batch."""
    entry = "init_func: load_llada_model, tokenizer_func: llada_tokenize, gen_func: llada_generate"
    models = f"available_models:\n  - {{name: tiny, path: {LLADA}, {entry}, model_id: {HOME / '../D2F/tiny/llada'}}}\n"
    text = Path("registry.yaml").read_text()
    Path("registry.yaml").write_text(text.replace("available_models:\n", models))
    Path("two.txt").write_text(
        "Tom has 3 toys. He gets 4 toys. How many toys does Tom have now?\nList three colours.\n"
    )
    words = [*WORDS, "--drafter", "tiny", "--verifier", "tiny", "--prompt_file", "two.txt"]
    theirs = outputs(*words, "--batch_size", 2, "--algorithm", "my_confidence")
    ours = outputs(*words, "--algorithm", "baseline_cascade", "--truncate_at_eos", "false")
    assert [line["token_ids"] for line in theirs] == [line["token_ids"] for line in ours]


def test_flags_that_an_older_step_does_not_ask_for_are_told(folder):
    with pytest.raises(UserError, match="no function takes --colour"):
        outputs(*commands()[1], "--colour", "red")
    shutil.rmtree("out")
    Path("my_older_one.py").write_text("def run_step(current_tokens, verifier, colour): pass\n")
    with pytest.raises(UserError, match=r"my_older_one.py:run_step asks for colour, which nobody gives"):
        outputs(*commands()[1])


def test_flags_of_forwards_reach_the_networks(monkeypatch):
    from mdlm_dvd import main as program

    loaded = []
    load = program.load
    monkeypatch.setattr(program, "load", lambda *given: loaded.append(load(*given)) or loaded[-1])
    main_run(["--prompt", "a", "--gen_length", "8", "--fast", "false", "--device", "cpu"])
    assert [b.network.runtime.fast for b in (loaded[0].drafter, loaded[0].verifier)] == [False, False]


def test_the_page_names_what_is_reserved():
    reserved = PAGE.partition("Reserved,")[2].partition(".\n")[0]
    assert set(re.findall(r"`(\w+)`", reserved)) == RUNTIME_NAMES
