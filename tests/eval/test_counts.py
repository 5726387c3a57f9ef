"""How many tokens a text has: what a user's own decoder returns, and what is kept before a stop string."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from eval.model import DraftAndVerifyLM, new_ids
from sdar.generate_ssd_policy import block_diffusion_generate
from shared.decode.calls import Stop
from shared.decode.stop_strings import StopStrings
from shared.errors import UserError
from shared.network.loading import load_tokenizer

TINY = str(Path(__file__).parents[2] / "SDAR" / "tiny")
EXACT = {"acceptance": "exact", "cache_ver": True, "do_verify_policy": "always", "block_length": 32}

OWN = """import torch
from sdar.generate_ssd_policy import block_diffusion_generate


def padded(model, input_ids, *, attention_mask, max_new_tokens, tokenizer, **unused):
    out = block_diffusion_generate(model, input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, acceptance="exact",
                                   cache_ver=True, do_verify_policy="always", block_length=32, trim_stop_tokens=False)
    rows = [r + [tokenizer.pad_token_id] * (max_new_tokens - len(r)) for r in out.tokens]
    return torch.cat([input_ids, torch.tensor(rows)], 1)


def as_lists(model, input_ids, **call):
    return padded(model, input_ids, **call).tolist()


def only_new(model, input_ids, **call):
    return padded(model, input_ids, **call)[:, input_ids.shape[1]:]


def nothing(model, input_ids, **call):
    return None


def too_few(model, input_ids, **call):
    return input_ids[1:]
"""


@pytest.fixture(scope="module")
def asked():
    """Three prompts of different lengths, and what this repository's decoder makes of them."""
    lm = DraftAndVerifyLM(pretrained=TINY, batch_size=3, **EXACT)
    rows = (Path(TINY).parents[1] / "eval" / "tasks" / "word_problems.jsonl").read_text().splitlines()[:3]
    prompts = [lm.apply_chat_template([{"role": "user", "content": json.loads(r)["prompt"]}]) for r in rows]
    requests = requests_of(prompts)
    return prompts, lm.generate_until(requests), counts_of(lm)


def requests_of(prompts, until=()):
    return [
        Instance("generate_until", {}, (p, {"until": list(until), "max_gen_toks": 96}), 0, metadata=("t", k, 1))
        for k, p in enumerate(prompts)
    ]


def counts_of(lm) -> list[int]:
    """Tokens of each text, in the order of the documents: texts finish in another."""
    return [r["tokens"] for r in sorted(lm.spent, key=lambda r: r["doc"])]


@pytest.mark.parametrize("function", ["padded", "as_lists", "only_new"])
def test_rows_of_a_users_function_count_what_they_hold(asked, function, tmp_path):
    prompts, texts, counts = asked
    (tmp_path / "own.py").write_text(OWN)
    lm = DraftAndVerifyLM(pretrained=TINY, custom_generate=f"{tmp_path}/own.py:{function}", batch_size=3)
    assert lm.generate_until(requests_of(prompts)) == texts
    assert counts_of(lm) == counts
    assert min(counts) < 96, "padding is there"


@pytest.mark.parametrize(("function", "what"), [("nothing", "NoneType"), ("too_few", "2 rows")])
def test_a_wrong_return_is_told_in_one_line(asked, function, what, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    lm = DraftAndVerifyLM(pretrained=TINY, custom_generate=f"{tmp_path}/own.py:{function}", batch_size=3)
    with pytest.raises(UserError, match=f"custom_generate returned {what} for 3 prompts. Allowed: ids"):
        lm.generate_until(requests_of(asked[0]))


def test_new_ids_in_every_form():
    padded, prompts = [[0, 0, 5], [0, 6, 7]], [[5], [6, 7]]
    with_prompts = [[0, 0, 5, 8, 9, 0], [0, 6, 7, 8, 0, 0]]
    assert new_ids(with_prompts, padded, prompts, {0}) == [[8, 9], [8]]
    assert new_ids([[5, 8, 9], [6, 7, 8, 0]], padded, prompts, {0}) == [[8, 9], [8]]
    assert new_ids([[8, 9], [8, 0]], padded, prompts, {0}) == [[8, 9], [8]]


def test_a_stop_string_may_be_a_special_token(asked):
    """Without stop ids the text goes on behind ``<|im_end|>``; the string ends it where the id would."""
    prompts, texts, counts = asked
    lm = DraftAndVerifyLM(pretrained=TINY, batch_size=3, stopping_criteria_idx="none", **EXACT)
    assert lm.generate_until(requests_of(prompts, ["<|im_end|>", "</s>"])) == texts
    assert counts_of(lm) == counts
    ids = [lm.tok_encode(p) for p in prompts]
    call = {"tokenizer": lm.tokenizer, "max_new_tokens": 96, **EXACT, "stopping_criteria_idx": []}
    whole = block_diffusion_generate(lm.model, ids, **call)
    assert whole.token_count > sum(counts)
    assert block_diffusion_generate(lm.model, ids, stop="<|im_end|>", **call).texts == texts


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("caf\u00e9\u20ac\U0001f600!", ["!"], "caf\u00e9\u20ac\U0001f600"),
        ("caf\u00e9 and \u20ac", ["\u20ac"], "caf\u00e9 and "),
        ("\U0001f600\U0001f600", ["\U0001f600"], ""),
        ("ab\u00e9<|im_end|>c", ["<|im_end|>"], "ab\u00e9"),
        ("a\n<|im_end|>c", ["\n<|im_end|>"], "a"),
        ("a<|im_end|>b!c", ["!", "b<|im_end|>"], "ab"),
        ("a!<|im_end|>b", ["<|im_end|>", "!"], "a"),
        ("a<|im_end|>!b", ["!", "<|im_end|>"], "a"),
    ],
)
def test_kept_tokens_decode_to_the_kept_text(text, stop, kept):
    tokenizer = load_tokenizer(TINY)
    text_of = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    found = StopStrings(Stop.of(stop, tokenizer), text_of).kept(tokenizer(text).input_ids)
    assert found.text == kept
    assert text_of(found.tokens) == kept


def test_of_a_token_that_goes_on_into_the_stop_string_the_text_is_cut():
    words = {1: "one ", 2: "two three", 3: " four", 4: "<end>"}
    tokenizer = type("T", (), {"all_special_tokens": ["<end>"], "decode": None})()
    tokenizer.decode = lambda ids, skip_special_tokens: "".join(
        words[i] for i in ids if i != 4 or not skip_special_tokens
    )
    text_of = lambda ids: tokenizer.decode(ids, True)  # noqa: E731
    assert StopStrings(Stop.of(" three", tokenizer), text_of).kept([1, 2, 3]) == ([1, 2], "one two")
    assert StopStrings(Stop.of("three<end>", tokenizer), text_of).kept([1, 2, 4, 3]) == ([1, 2], "one two ")
    assert StopStrings(Stop.of("four<end>", tokenizer), text_of).kept([1, 2, 4, 3]) is None


@pytest.mark.parametrize("wrong", [5, [""], ["a", 3], None])
def test_what_is_no_stop_string_is_refused(wrong):
    with pytest.raises(UserError, match=r"stop is .* Allowed: strings that are not empty"):
        Stop.of(wrong, None)
