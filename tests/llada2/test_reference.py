"""Whole decodes of the published code, reproduced by the definition: ids, decoding order, forwards in order, uniforms consumed."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch

from llada2 import LLaDA2MoeModelLM
from llada2.options import Options
from llada2.reference import Step, generate
from shared.draft import How
from shared.errors import UserError
from tests.family_checks import golden_folder

FOLDER = golden_folder("LLaDA2")
CASES = json.loads((FOLDER / "decode.json").read_text())["cases"]

# Defaults of the published functions, where they differ from ours. A case's own keywords go on top.
FUNCTION_DEFAULTS = {
    "gen_length": 2048,
    "eos_early_stop": False,
    "threshold": 0.95,
    "editing_threshold": 0.9,
    "max_post_steps": 16,
    "suppress_mask": False,
}


@lru_cache(maxsize=1)
def recorded_model() -> LLaDA2MoeModelLM:
    return LLaDA2MoeModelLM.from_pretrained(FOLDER / "model", dtype=torch.float32)


def options_of(case: dict) -> Options:
    parity = {"decoder": case["decoder"], "as_bias": case["prefill_mask"] == "as_bias"}
    return Options.from_flat({**FUNCTION_DEFAULTS, **case["kwargs"]}, **parity)


def published_step(step: Step) -> dict[str, list]:
    codes = {How.UNMASKED: lambda a: a, How.ACCEPTED: lambda a: -a, How.RESAMPLED: lambda a: -a - 0.5}
    return {
        "edit": [[step.start + i, step.known[i], token] for i, token in sorted(step.edits.items())],
        "unmask": [codes[how](step.start + i) for i, (_, how) in step.chosen.items()],
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_decode(case):
    uniforms = iter(case.get("uniforms", []))
    out = generate(recorded_model(), case["prompt_ids"], options_of(case), uniforms)
    assert case["prompt_ids"] + out.tokens == case["output_ids"]
    assert len(out.forwards) == case["stats"]["nfe"]
    assert [list(f) for f in out.forwards] == case["forward_trace"]
    assert [published_step(s) for s in out.steps] == case["stats"]["decoding_order"]
    assert next(uniforms, None) is None, "every recorded number is used"


def short(**flat) -> Options:
    return Options.from_flat({"block_length": 8, "max_new_tokens": 16, **flat})


PROMPT = CASES[0]["prompt_ids"]


def test_nocache_is_cached():
    """With a mask that masks, recomputing everything changes nothing."""
    texts = [generate(recorded_model(), PROMPT, short(decoder=d, max_post_steps=2)) for d in ("nocache", "cached")]
    assert texts[0].tokens == texts[1].tokens
    assert [published_step(s) for s in texts[0].steps] == [published_step(s) for s in texts[1].steps]


def test_never_verifying_is_cached():
    flat = {"max_post_steps": 2, "num_to_transfer": 2}
    plain = generate(recorded_model(), PROMPT, short(**flat))
    never = generate(recorded_model(), PROMPT, short(decoder="ssd_policy", do_verify_policy="never", **flat))
    assert (plain.tokens, plain.forwards) == (never.tokens, never.forwards)


@pytest.fixture
def model_that_predicts_masks():
    def prefer_mask(module, args, logits):
        logits[..., 255] = 100.0

    handle = recorded_model().lm_head.register_forward_hook(prefer_mask)
    yield recorded_model()
    handle.remove()


def test_a_predicted_mask_cannot_loop(model_that_predicts_masks):
    text = generate(model_that_predicts_masks, PROMPT, short())
    assert 255 not in text.tokens, "by default it is never predicted"
    with pytest.raises(RuntimeError, match="predicts the mask token"):
        generate(model_that_predicts_masks, PROMPT, short(suppress_mask=False, editing_threshold=2.0))


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"do_verify_policy": "contextual_bandit_ucb"}, "Allowed in this family so far: mask_span_length"),
        ({"editing_treshold": 0.5}, "did you mean editing_threshold"),
        ({"num_to_transfer": 0}, "num_to_transfer is 0. Allowed: at least 1"),
        ({"decoder": "ssd"}, "ssd_policy"),
    ],
)
def test_options_that_do_not_exist(flat, message):
    with pytest.raises(UserError, match=message):
        short(**flat)


@pytest.mark.parametrize("prompt", [[], [3, 255]])
def test_prompts_that_cannot_be_decoded(prompt):
    with pytest.raises(UserError, match="the prompt is"):
        generate(recorded_model(), prompt, short())
