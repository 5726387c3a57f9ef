"""`python -m eval`: the same model through lm-eval, its options, resuming, scoring, tasks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance

from eval import code_eval
from eval.__main__ import prepared
from eval.model import DraftAndVerifyLM
from sdar import SDARForCausalLM
from sdar.generate_ssd_policy import block_diffusion_generate
from shared.errors import UserError
from shared.scoring import block_size_one_scores
from train.make_tasks import lines
from train.tasks import TASKS, is_held_out

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("task", list(TASKS))
def test_committed_problems_are_what_the_command_makes_and_held_out(task):
    committed = (ROOT / "eval" / "tasks" / f"{task}.jsonl").read_text()
    assert committed == lines(task)
    assert all(is_held_out(json.loads(row)["prompt"]) for row in committed.splitlines())


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


def test_seed_command_from_inside_the_folder(monkeypatch):
    monkeypatch.chdir(ROOT / "SDAR")
    lm = DraftAndVerifyLM(pretrained="tiny", trust_remote_code=True, custom_generate="./generate_ssd_policy.py:block_diffusion_generate",
                          custom_model_class="./modeling_sdar.py:SDARForCausalLM", block_length=16, denoising_steps=16, cache_ver=True)  # fmt: skip
    assert (lm.family_name, lm.decoder_name) == ("SDAR", "ssd_policy")
    assert lm.options_for({}).cache.cache_ver


def test_precedence_and_unknown_names():
    lm = DraftAndVerifyLM(pretrained=TINY, temperature=0.5, gen_kwargs={"top_k": 3})
    flat = lm.options_for({"temperature": 0.0, "do_sample": False, "top_k": 9, "max_gen_toks": 77}).to_flat()
    assert (flat["temperature"], flat["top_k"], flat["max_new_tokens"]) == (0.5, 3, 77)
    for wrong in ({"block_lenght": 8}, {"gen_kwargs": {"block_lenght": 8}}):
        with pytest.raises(UserError, match="'block_lenght'; did you mean block_length"):
            DraftAndVerifyLM(pretrained=TINY, **wrong)
    with pytest.raises(UserError, match="decoder 'ssd'"):
        DraftAndVerifyLM(pretrained=TINY, decoder="ssd")


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
    stored = tmp_path / "predictions-0.jsonl"
    rows = stored.read_bytes().splitlines(keepends=True)
    stored.write_bytes(b"".join(rows[:3]) + rows[3][:20])  # as a killed run leaves it
    again = DraftAndVerifyLM(**keys, resume=True)
    decoded = []
    append = again._store.append
    monkeypatch.setattr(again._store, "append", lambda record: (decoded.append(record), append(record)))
    assert again.generate_until(requests) == texts
    assert len(decoded) == 2
    assert DraftAndVerifyLM(**keys, resume=True)._store.found.keys() == {r["key"] for r in again.spent}
    other = DraftAndVerifyLM(**{**keys, "seed": 1}, resume=True)
    assert not other._store.found.keys() & {r["key"] for r in other.spent}


def test_stop_strings_end_decoding():
    lm = DraftAndVerifyLM(pretrained=TINY, preset="tiny", batch_size=4)
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


def test_scores_are_products_of_block_size_one_probabilities():
    model = SDARForCausalLM.from_pretrained(TINY, dtype="float64")
    mask, _ = model.special_ids()
    texts = [([5, 6, 7, 8], [9, 10, 11]), ([40], [41, 42, 43, 44, 45])]
    for (context, continuation), (scores, _) in zip(texts, block_size_one_scores(model, texts, mask), strict=True):
        for n, token in enumerate(continuation):
            ids = torch.tensor([context + continuation[:n] + [mask]])
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            logits = model(ids, torch.arange(ids.shape[1])[None], None, causal)[0, -1]
            logits[mask] = float("-inf")
            assert scores[n].item() == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-5)


def test_a_solution_is_likelier_than_nonsense():
    lm = DraftAndVerifyLM(pretrained=TINY, batch_size=2)
    row = json.loads((ROOT / "eval" / "tasks" / "word_problems.jsonl").read_text().splitlines()[0])
    chat = lm.apply_chat_template([{"role": "user", "content": row["prompt"]}])
    pairs = [Instance("loglikelihood", {}, (chat, text), 0) for text in (row["solution"], row["solution"][::-1])]
    (right, _), (wrong, _) = lm.loglikelihood(pairs)
    assert wrong < right < 0


def test_code_eval_is_run_here():
    found, results = code_eval.CodeEval().compute(
        ["assert f(2) == 4"], [["def f(x): return 2 * x", "def f(x): return x"]], k=[1]
    )
    assert found == {"pass@1": 0.5}
    assert results == {0: [True, False]}
