"""`python -m eval`: the same model through lm-eval, its options, resuming, scoring, tasks."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance

from eval import code_eval
from eval.__main__ import prepared
from eval.grid import settings_of
from eval.model import DraftAndVerifyLM, batch_of
from sdar.generate_ssd_policy import block_diffusion_generate
from shared.errors import UserError
from shared.family import FAMILIES, imported
from shared.network.loading import load_tokenizer
from shared.scripts.identity import fingerprint
from shared.scripts.models import network_of
from train.make_tasks import lines
from train.tasks import TASKS, is_held_out

ROOT = Path(__file__).parents[2]
SHIPPED = [name for name, family in FAMILIES.items() if family.shipped]
TINY = str(ROOT / "SDAR" / "tiny")


def requests_of(lm, prompts, **kwargs):
    chat = [lm.apply_chat_template([{"role": "user", "content": p}]) for p in prompts]
    made = [
        Instance("generate_until", {}, (c, {"until": [], **kwargs}), 0, metadata=("t", k, 1))
        for k, c in enumerate(chat)
    ]
    return made


def problems(task: str, count: int) -> list[str]:
    rows = (ROOT / "eval" / "tasks" / f"{task}.jsonl").read_text().splitlines()[:count]
    return [json.loads(row)["prompt"] for row in rows]


FIRST_256 = {
    "word_problems": "89aefd68a211",
    "functions": "f88a09b31dde",
    "instructions": "d19c0a4a95c7",
}  # sha256 begins


@pytest.mark.parametrize("task", list(TASKS))
def test_committed_problems_are_what_the_command_makes_and_held_out(task):
    committed = (ROOT / "eval" / "tasks" / f"{task}.jsonl").read_text()
    assert committed == lines(task)
    rows = committed.splitlines(keepends=True)
    prompts = [json.loads(row)["prompt"] for row in rows]
    assert len(set(prompts)) == len(rows) == 1024
    assert all(map(is_held_out, prompts)), "training may have shown it"
    first = hashlib.sha256("".join(rows[:256]).encode()).hexdigest()
    assert first.startswith(FIRST_256[task]), "figures recorded on 256 problems are about these"


def test_hf_is_ours_only_with_a_key_of_ours():
    def door(model, **model_args):
        call = SimpleNamespace(
            model=model,
            model_args=model_args,
            include_path=None,
            gen_kwargs=None,
            output_path=None,
            resume=False,
            device=None,
            config=None,
        )
        return prepared(call).model

    assert door("hf", pretrained="x") == "hf"
    assert door("hf", pretrained="x", custom_generate="a.py:f") == door("hf", family="SDAR") == "dllm"


def test_the_seed_of_a_run_is_that_of_its_decodes():
    def seed(given, **model_args):
        call = SimpleNamespace(
            model="dllm", model_args={"family": "SDAR", **model_args}, seed=given, device=None, output_path=None
        )
        call.include_path = call.config = None
        call.resume = False
        return prepared(call).model_args.get("seed")

    assert seed(None) is None
    assert seed([None] * 4) is seed([1, None, None, 4]) is None
    assert seed([1, 2, 3, 4]) == 3
    assert seed([1, 2, 3, 4], seed=9) == 9


@pytest.mark.parametrize("config", [None, "use_cache: somewhere\n"])
def test_lm_evals_cache_is_refused(config, monkeypatch, tmp_path):
    """Its key is the prompt alone, so that one model's texts would come back as another's; by flag or in a file."""
    words = ["--model", "dllm", "--model_args", f"pretrained={TINY}", "--tasks", "instructions", "--limit", "1"]
    if config:
        (tmp_path / "run.yaml").write_text(config)
        words += ["--config", str(tmp_path / "run.yaml")]
    else:
        words += ["--use_cache", "somewhere"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"use_cache is 'somewhere'.*Allowed: --output_path PATH with --resume"):
        command_line(monkeypatch, [*words, "--output_path", str(tmp_path / "run")])
    assert not list(tmp_path.rglob("*.jsonl"))
    assert not list(tmp_path.rglob("*.db"))


DOOR = ["--model", "dllm", "--model_args", f"pretrained={TINY}", "--limit", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "instruction"], "instruction"),
        (["--tasks", "functions"], "task 'functions' runs model-written code. Allowed: --confirm_run_unsafe_code"),
        (["--tasks", "instructions", "--log_samples"], "--output_path"),
        (["--tasks", "instructions", "--config", "/none/x.yaml"], "Config file not found"),
        (["--tasks", "{folder}/broken.yaml"], "broken"),
    ],
    ids=str,
)
def test_a_wrong_command_is_told_before_the_model_is_loaded(words, message, monkeypatch, tmp_path):
    monkeypatch.setattr("eval.model.load_models", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "broken.yaml").write_text("task: [broken")
    with pytest.raises(UserError) as caught:
        command_line(monkeypatch, [*DOOR, *(w.format(folder=tmp_path) for w in words)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "include", "whole"),
    [
        ("instructions", [], False),
        ("instructions,functions", [], False),
        (["instructions", "word_problems"], [], False),
        ("instructions,gsm8k", [], True),
        ("instruct*", [], True),
        ("instructions", ["mine"], True),  # the user's folder may have one of that name
    ],
)
def test_the_folder_of_all_public_tasks_is_read_where_one_is_asked_for(tasks, include, whole, monkeypatch):
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from eval.cells import TASKS as folder
    from eval.early import index_of_ours

    made = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: made.append(given))
    config = EvaluatorConfig(tasks=tasks, include_path=[str(folder), *include])
    with index_of_ours(config):
        lm_eval.tasks.TaskManager(include_path=config.include_path)
    lm_eval.tasks.TaskManager()
    assert [given.get("include_defaults", True) for given in made] == [whole, True]


def test_a_file_of_settings_is_read_as_flags_are(monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model: dllm\nmodel_args: pretrained={TINY},block_length=8\ngen_kwargs: max_gen_toks=4\nseed: 7\ntasks: instructions\nlimit: 1\n"
    )
    results = command_line(
        monkeypatch, ["--config", str(tmp_path / "run.yaml"), "--output_path", str(tmp_path / "run")]
    )
    decoding = results["config"]["decoding"]
    assert decoding["seed"] == 7
    assert [decoding["options"]["instructions"][k] for k in ("block_length", "max_new_tokens")] == [8, 4]


def test_results_that_are_not_saved_are_an_error(monkeypatch, tmp_path):
    """lm-eval would only warn. The texts are there, and the same command with --resume has nothing to decode."""
    write_text = Path.write_text

    def full(path, *a, **k):
        if path.name.startswith("results_"):
            raise OSError(28, "No space left on device")
        return write_text(path, *a, **k)

    words = [*DOOR, "--tasks", "instructions", "--gen_kwargs", "max_gen_toks=4", "--output_path", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(
            UserError, match=r"the results are not saved \(.*No space left on device\). Allowed: the same"
        ):
            command_line(patch, words)
    assert command_line(monkeypatch, [*words, "--resume"])["config"]["decoding"]["texts"] == 1
    assert len((tmp_path / "run/predictions/predictions.jsonl").read_text().splitlines()) == 1


SEED_COMMANDS = {
    # The published command of each family, with the tiny checkpoint for the hub id and an offline task for the public one.
    "SDAR": "--model hf --model_args pretrained=tiny,trust_remote_code=True,custom_generate=./generate_ssd_policy.py:block_diffusion_generate,"
    "block_length=16,denoising_steps=16,remasking_strategy=low_confidence_dynamic,min_ssd_span_length=1,confidence_threshold=0.85,cache_ver=true,"
    "draft_ver=true --batch_size 1 --tasks instructions",
    "Fast-dLLM-v2": "--model hf --model_args pretrained=tiny,trust_remote_code=True,custom_model_class=./modeling_fast.py:Fast_dLLM_QwenForCausalLM,"
    "custom_generate=./generate_policy_utils.py:generate_ssd_policy,block_size=32,small_block_size=32,use_block_cache=false,use_ssd_cache=false,"
    "threshold=0.9,cache_ver=false,draft_ver=false,max_new_tokens=512,do_verify_policy=mask_span_length,min_ssd_span_length=8 --batch_size 1 "
    "--tasks functions --confirm_run_unsafe_code",
}


@pytest.mark.parametrize("family", SEED_COMMANDS)
def test_seed_command_from_inside_the_folder(family, monkeypatch, tmp_path):
    """Pasted, with a limit and a place for the results."""
    monkeypatch.chdir(ROOT / family)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    words = SEED_COMMANDS[family].split()
    results = command_line(monkeypatch, [*words, "--limit", "2", "--output_path", str(tmp_path / "run")])
    decoding = results["config"]["decoding"]
    assert (decoding["family"], decoding["decoder"], decoding["texts"]) == (family, "ssd_policy", 2)
    (options,) = decoding["options"].values()
    given = dict(pair.split("=") for pair in words[3].split(",") if "./" not in pair)
    assert options["confidence_threshold"] == float(given.get("threshold") or given["confidence_threshold"])
    assert options["cache_ver"] == (given["cache_ver"] == "true")
    assert decoding["forwards"]["verify"] > 0


def command_line(monkeypatch, words: list[str]) -> dict:
    """`python -m eval` with these words, in this process and with this repository's tasks only; its results file."""
    from lm_eval.tasks import TaskManager

    from eval.__main__ import TASKS as folder
    from eval.__main__ import main

    known = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *a, **k: known(self, include_path=str(folder), include_defaults=False)
    )
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(sys, "argv", ["eval", "run", *words])
    main()
    (found,) = Path(words[words.index("--output_path") + 1]).parent.rglob("results_*.json")
    return json.loads(found.read_text())


def test_a_stock_model_of_lm_eval_runs_beside_ours(monkeypatch, tmp_path):
    """A network of transformers made here, by its own decoding, on one of our tasks."""
    from lm_eval.api.registry import model_registry
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in [n for n in model_registry.keys() if n != "dllm"]:  # noqa: SIM118
        monkeypatch.delitem(model_registry._objs, name)
    monkeypatch.delitem(sys.modules, "lm_eval.models", raising=False)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    load_tokenizer(TINY).save_pretrained(tmp_path / "llama")
    words = ["--model", "hf", "--model_args", f"pretrained={tmp_path}/llama", "--tasks", "instructions", "--limit", "2"]
    words += ["--gen_kwargs", "max_gen_toks=4", "--device", "cpu", "--batch_size", "2"]
    results = command_line(monkeypatch, [*words, "--output_path", str(tmp_path / "run")])
    assert results["config"]["model_num_parameters"] == sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert results["n-samples"]["instructions"]["effective"] == 2


def test_files_of_several_decoders_and_classes_name_theirs(monkeypatch):
    monkeypatch.chdir(ROOT / "Fast-dLLM-v2")
    lm = DraftAndVerifyLM(pretrained="tiny", custom_generate="./generate_utils.py:generate_fast")
    assert (lm.family_name, lm.decoder_name) == ("Fast-dLLM-v2", "fast")
    with pytest.raises(UserError, match="did you mean generate_fast"):
        DraftAndVerifyLM(pretrained="tiny", custom_generate="./generate_utils.py:generate_fats")


def test_precedence_and_unknown_names():
    lm = DraftAndVerifyLM(pretrained=TINY, temperature=0.5, gen_kwargs={"top_k": 3})
    flat = lm.options_for({"temperature": 0.0, "do_sample": False, "top_k": 9, "max_gen_toks": 77}).to_flat()
    assert (flat["temperature"], flat["top_k"], flat["max_new_tokens"]) == (0.5, 3, 77)
    for wrong in ({"block_lenght": 8}, {"gen_kwargs": {"block_lenght": 8}}):
        with pytest.raises(UserError, match="'block_lenght'; did you mean block_length"):
            DraftAndVerifyLM(pretrained=TINY, **wrong)
    with pytest.raises(UserError, match="decoder 'ssd'"):
        DraftAndVerifyLM(pretrained=TINY, decoder="ssd")


def test_a_task_beats_a_preset_and_what_the_user_typed_beats_the_task():
    """Each layer by itself, in another spelling than the one below."""
    length = lambda lm, task: lm.options_for(task).to_flat()["max_new_tokens"]  # noqa: E731
    lm = DraftAndVerifyLM(pretrained=TINY, preset="tiny")
    preset = length(lm, {})
    assert preset not in (48, 49, 50)
    assert length(lm, {"max_gen_toks": 48}) == 48
    lm.use("ssd_policy", "tiny", gen_length=49)
    assert length(lm, {"max_gen_toks": 48}) == 49
    lm.use("ssd_policy", "tiny", {"max_gen_toks": 50}, max_new_tokens=49)
    assert length(lm, {"max_gen_toks": 50}) == 50, "lm-eval writes gen_kwargs into the task's own"
    lm.use("ssd_policy", "tiny", block_size=8)
    assert lm.options_for({}).to_flat()["block_length"] == 8
    (run,) = settings_of({"family": "SDAR", "decoder": "ssd_policy", "preset": "tiny", "options": {"block_size": 8}})
    assert run.resolved()["block_length"] == 8
    with pytest.raises(UserError, match=r"max_new_tokens is 0\. Allowed: at least 1"):
        lm.options_for({"max_gen_toks": 0})


def test_keys_of_public_tasks_and_commands():
    lm = DraftAndVerifyLM(pretrained=TINY, batch_size="auto", dtype="float", revision="main", enable_thinking=False)
    assert (lm.batch_size, lm.model.dtype) == (32, torch.float32)
    assert lm.options_for({"num_beams": 1, "max_length": 2048, "max_gen_toks": 9}).to_flat()["max_new_tokens"] == 9
    assert [batch_of(*b) for b in (("auto:4", 8), (6, None), (None, None), ("3", None), (0o100, 8))] == [8, 6, 1, 3, 64]
    (request,) = requests_of(lm, ["one two three four five six"], max_length=12, max_gen_toks=5)
    assert (
        len(lm._fit(lm.tok_encode(request.args[0]), lm.options_for(request.args[1]), lm.limit_for(request.args[1])))
        == 7
    )
    lm.generate_until([request])
    assert lm.get_model_info()["decoding"]["options"]["t"]["max_length"] == 12
    lm.tokenizer.chat_template = "{{ 'think' if enable_thinking is not defined or enable_thinking else 'short' }}"
    assert lm.apply_chat_template([{"role": "user", "content": "x"}]) == "short"
    for wrong, message in [
        ({"num_beams": 4}, r"num_beams is 4\. Allowed: 1"),
        ({"num_return_sequences": 2}, "Allowed: 1"),
    ]:
        with pytest.raises(UserError, match=message):
            lm.options_for(wrong)
    for wrong, message in [
        ({"revision": "v2"}, "revision is 'v2'"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            DraftAndVerifyLM(pretrained=TINY, **wrong)


@pytest.mark.parametrize(("name", "kind"), [("half", torch.float16), ("bf16", torch.bfloat16)])
def test_dtypes_have_their_usual_names(name, kind):
    assert DraftAndVerifyLM(pretrained=TINY, dtype=name).model.dtype == kind


def test_a_mask_token_written_out_in_a_request_is_words(tmp_path):
    """One rule for scripts, generation and scoring; no document stops the others."""
    lm = DraftAndVerifyLM(pretrained=TINY, batch_size=2, predictions=str(tmp_path))
    mask_id, _ = lm.model.special_ids(tokenizer=lm.tokenizer)
    words = lm.tokenizer("<|MASK|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert mask_id not in words
    prompts = [*problems("word_problems", 1), "fill <|MASK|> in"]
    given = []
    generate = lm._decoder.generate
    watch = lambda model, ids, *rest, **how: given.extend(ids) or generate(model, ids, *rest, **how)  # noqa: E731
    lm._decoder = SimpleNamespace(generate=watch, options_class=lm._decoder.options_class)
    assert len(lm.generate_until(requests_of(lm, prompts, max_gen_toks=8))) == 2
    assert not any(mask_id in ids for ids in given)
    (fill,) = [ids for ids in given if any(ids[k : k + len(words)] == words for k in range(len(ids)))]
    assert "fill <|MASK|> in" in lm.tokenizer.decode(fill)
    scored = lm._loglikelihood_tokens([(None, [5, mask_id], [6, mask_id]), (None, [5, *words], [6, *words])])
    assert scored[0] == pytest.approx(scored[1])


def test_a_context_that_is_cut_for_scoring_is_told(caplog):
    lm = DraftAndVerifyLM(pretrained=TINY)
    long = [5] * lm.max_length
    with caplog.at_level("WARNING"):
        cut, fits = lm._loglikelihood_tokens([(None, long, [6, 7]), (None, long[2:], [6, 7])])
    assert cut == pytest.approx(fits)
    assert "1 of 2 contexts are cut" in caplog.text


def test_a_tokenizer_without_a_chat_template_is_told():
    lm = DraftAndVerifyLM(pretrained=TINY)
    lm.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template\. Allowed: a checkpoint with one"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])


def test_what_was_used_is_what_is_recorded():
    lm = DraftAndVerifyLM(pretrained=TINY, preset="tiny", batch_size=2)
    lm.generate_until(requests_of(lm, problems("word_problems", 2), max_gen_toks=5))
    decoding = lm.get_model_info()["decoding"]
    assert decoding["options"]["t"]["max_new_tokens"] == 5
    assert 0 < decoding["tokens"] <= 10


def test_texts_are_the_decoders_own_and_resume_repeats_none(tmp_path, monkeypatch):
    keys = {"pretrained": TINY, "preset": "tiny", "batch_size": 3, "predictions": str(tmp_path)}
    lm = DraftAndVerifyLM(**keys)
    requests = requests_of(lm, problems("word_problems", 5), max_gen_toks=128)
    texts = lm.generate_until(requests)
    ids = [lm.tok_encode(r.args[0]) for r in requests]
    assert texts == block_diffusion_generate(lm.model, ids, lm.options_for({}), tokenizer=lm.tokenizer).texts
    info = lm.get_model_info()["decoding"]
    assert info["texts"] == 5
    assert info["tokens"] > 0
    assert info["forwards"]["draft"] > 0
    stored = tmp_path / "predictions.jsonl"
    rows = stored.read_bytes().splitlines(keepends=True)
    stored.write_bytes(b"".join(rows[:3]) + rows[3][:20])  # as a killed run leaves it
    again = DraftAndVerifyLM(**keys, resume=True)
    decoded = []
    append = again._store.append
    monkeypatch.setattr(again._store, "append", lambda record: (decoded.append(record), append(record)))
    assert again.generate_until(requests) == texts
    assert len(decoded) == 2
    assert DraftAndVerifyLM(**keys, resume=True)._store.found.keys() == {r["key"] for r in again.spent}
    assert again.lossless == lm.lossless
    whole = DraftAndVerifyLM(**keys, resume=True)
    assert whole.generate_until(requests) == texts
    assert whole.lossless == lm.lossless, "nothing was decoded"
    for change, message in [
        ({"seed": 1}, r"seed is 1; the texts in .* were made with 0\. Allowed with --resume: the same"),
        ({"block_length": 8}, r"options block_length is 8; the texts in .* were made with 32"),
        ({"decoder": "standard"}, r"decoder is 'standard'; the texts in .* were made with 'ssd_policy'"),
    ]:
        with pytest.raises(UserError, match=message):
            DraftAndVerifyLM(**{**keys, **change}, resume=True)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]
)
def test_any_file_that_can_change_a_text_is_noticed(name, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY, checkpoint)
    keys = {"pretrained": str(checkpoint), "family": "SDAR", "predictions": str(tmp_path / "texts")}
    DraftAndVerifyLM(**keys)
    fingerprint.cache_clear()
    DraftAndVerifyLM(**keys, resume=True)
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes() + b" " if (checkpoint / name).exists() else b"x")
    fingerprint.cache_clear()
    with pytest.raises(UserError, match=f"file model {name} is .* Allowed with --resume: the same"):
        DraftAndVerifyLM(**keys, resume=True)


@pytest.mark.parametrize("family", SHIPPED)
def test_stop_strings_end_decoding(family):
    lm = DraftAndVerifyLM(pretrained=f"{family}/{next(iter(FAMILIES[family].shipped))}", preset="tiny", batch_size=4)
    prompts = problems("word_problems", 4)
    whole = lm.generate_until(requests_of(lm, prompts))
    spent = lm.get_model_info()["decoding"]["forwards"]["draft"]
    lm.spent.clear()
    cut = lm.generate_until(
        [Instance("generate_until", {}, (r.args[0], {"until": [","]}), 0) for r in requests_of(lm, prompts)]
    )
    assert any("," in text for text in whole)
    assert cut == [text.split(",")[0] for text in whole]
    assert lm.get_model_info()["decoding"]["forwards"]["draft"] < spent


def test_a_users_own_function(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def generate(model, input_ids, *, attention_mask, max_new_tokens, stop, tokenizer, letter='a'):\n"
        "    new = torch.tensor(tokenizer(letter + 'b').input_ids).expand(len(input_ids), -1)\n"
        "    return torch.cat([input_ids, new], 1)\n"
    )
    lm = DraftAndVerifyLM(pretrained=TINY, custom_generate=f"{tmp_path}/mine.py:generate", letter="x", batch_size=2)
    assert lm.generate_until(requests_of(lm, ["one", "two and three", "four"])) == ["xb"] * 3
    with pytest.raises(UserError, match="did you mean letter"):
        DraftAndVerifyLM(pretrained=TINY, custom_generate=f"{tmp_path}/mine.py:generate", leter="x")
    own = {"pretrained": TINY, "custom_generate": f"{tmp_path}/mine.py:generate"}
    lm = DraftAndVerifyLM(**own, max_new_tokens=9, gen_kwargs={"max_gen_toks": 7})
    assert lm.options_for({"max_gen_toks": 5})["max_new_tokens"] == 7
    assert DraftAndVerifyLM(**own).options_for({"max_gen_toks": 5})["max_new_tokens"] == 5
    for wrong, message in ((0, r"is 0\. Allowed: at least 1"), ("many", "is 'many'. Allowed: int")):
        with pytest.raises(UserError, match=f"max_new_tokens {message}"):
            DraftAndVerifyLM(**own).options_for({"max_gen_toks": wrong})


def one_by_one(model, family: str, context: list[int], continuation: list[int], mask: int) -> list[float]:
    """Log-probabilities of block size one by one forward a token: the definition."""
    found = []
    for n, token in enumerate(continuation):
        known = context + continuation[:n]
        ids = torch.tensor(
            [known if family == "Fast-dLLM-v2" or getattr(model, "predicts_next", False) else [*known, mask]]
        )
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        if family == "D2F":  # the prompt sees all of itself
            causal[: len(context), : len(context)] = True
        logits = model(ids, torch.arange(ids.shape[1])[None], None, causal)[0, -1]
        logits[mask] = float("-inf")
        found.append(logits.log_softmax(-1)[token].item())
    return found


# Where a family has a network of several kinds, or one that is tested with another family (LLaDA's).
GOLDEN = {"D2F": ["D2F-llada", "D2F-dream"], "MDLM-DVD": []}
NETWORKS = [(name, folder) for name in FAMILIES for folder in GOLDEN.get(name, [name])]


@pytest.mark.parametrize(("family", "folder"), NETWORKS)
def test_scores_are_products_of_block_size_one_probabilities(family, folder):
    source = ROOT / "tests" / "golden" / folder / "model"
    network = network_of(FAMILIES[family].networks[FAMILIES[family].first], source)
    model = network.model_class.from_pretrained(source, dtype="float64")
    mask = 255
    texts = [([5, 6, 7, 8], [9, 10, 11]), ([40], [41, 42, 43, 44, 45])]
    with torch.inference_mode():
        for text, (scores, _) in zip(texts, imported(network.scoring)(model, texts, mask), strict=True):
            assert scores.tolist() == pytest.approx(one_by_one(model, family, *text, mask), abs=1e-5)


@pytest.mark.parametrize("family", SHIPPED)
def test_likelihoods_and_perplexity_of_held_out_text(family):
    """A solution is likelier than nonsense, and a held-out one costs the model a fraction of what untrained weights pay, ln V a token."""
    lm = DraftAndVerifyLM(pretrained=f"{family}/{next(iter(FAMILIES[family].shipped))}", batch_size=4)
    rows = [json.loads(r) for r in (ROOT / "eval" / "tasks" / "word_problems.jsonl").read_text().splitlines()[:4]]
    chats = [lm.apply_chat_template([{"role": "user", "content": r["prompt"]}]) for r in rows]
    pairs = [
        Instance("loglikelihood", {}, (c, t), 0)
        for c, r in zip(chats, rows, strict=True)
        for t in (r["solution"], r["solution"][::-1])
    ]
    found = [score for score, _ in lm.loglikelihood(pairs)]
    assert all(wrong < right < 0 for right, wrong in zip(found[::2], found[1::2], strict=True))
    tokens = sum(len(lm.tok_encode(r["solution"])) for r in rows)
    assert 1.0 < math.exp(-sum(found[::2]) / tokens) < 3.0
    text = chats[0] + rows[0]["solution"]
    (rolled,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ((whole, _),) = lm._loglikelihood_tokens([(None, [lm.prefix_token_id], lm.tok_encode(text))])
    assert rolled == pytest.approx(whole, abs=1e-3)


def test_code_eval_is_run_here():
    found, results = code_eval.CodeEval().compute(
        ["assert f(2) == 4"], [["def f(x): return 2 * x", "def f(x): return x"]], k=[1]
    )
    assert found == {"pass@1": 0.5}
    assert results == {0: [True, False]}


def test_a_revision_of_a_hub_id_is_loaded(monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: asked.append((name, k["revision"])) or TINY
    )
    lm = DraftAndVerifyLM(pretrained="some/model", revision="v2")
    assert asked == [("some/model", "v2")]
    assert (lm.pretrained, lm.checkpoints) == ("some/model", {"model": TINY})


def test_programs_that_died_are_told_apart(monkeypatch, caplog):
    """A death is no failed test: it is counted, warned about, and in the results file."""
    deaths = []
    monkeypatch.setattr("shared.scripts.sandbox.DEATHS", deaths)
    programs = [
        "assert False",
        "import os\nos._exit(0)",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos._exit(0)",
    ]
    found, results = code_eval.CodeEval().compute(["x = 1"] * 4, [[p] for p in programs])
    assert (found, results) == ({"pass@1": 0.0}, {k: [False] for k in range(4)})
    assert sorted(deaths) == ["SIGSEGV", "exit code 0", "exit code 0"]
    info = DraftAndVerifyLM(pretrained=TINY).get_model_info()["decoding"]
    assert info["programs_died"] == {"exit code 0": 2, "SIGSEGV": 1}
    assert "3 programs died with their interpreter (2 x exit code 0, 1 x SIGSEGV), counted as not solved" in caplog.text


def test_public_code_tasks_are_judged_here(monkeypatch):
    """lm-eval's own humaneval and mbpp, whose metric would come from a hub."""
    import evaluate

    monkeypatch.setattr(evaluate, "load", evaluate.load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code_eval.install()
    humaneval = importlib.import_module("lm_eval.tasks.humaneval.utils")
    mbpp = importlib.import_module("lm_eval.tasks.mbpp.utils")
    good, bad = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"
    assert humaneval.pass_at_k(["assert add(2, 3) == 5"], [[good]], k=[1]) == {"pass@1": 1.0}
    assert mbpp.pass_at_1(["assert add(2, 3) == 5"], [[bad]]) == 0.0


def test_lm_eval_can_find_the_model_by_its_entry_point():
    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="dllm")
    assert entry.load() is DraftAndVerifyLM
