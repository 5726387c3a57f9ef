"""Whole decodes of the published code, reproduced by the definition: ids, decoding order, forwards in order, uniforms consumed."""

from __future__ import annotations

import pytest

from llada2.options import NoCacheOptions, Options, StandardOptions
from llada2.reference import Step, generate
from shared.errors import UserError
from shared.trace import How
from tests.llada2.test_decode_golden import CASES, options_of, recorded_model

KINDS = {kind.decoder: kind for kind in (NoCacheOptions, StandardOptions, Options)}


def published_step(step: Step) -> dict[str, list]:
    codes = {How.UNMASKED: lambda a: a, How.ACCEPTED: lambda a: -a, How.RESAMPLED: lambda a: -a - 0.5}
    return {
        "edit": [[step.start + i, step.known[i], token] for i, token in sorted(step.edits.items())],
        "unmask": [codes[how](step.start + i) for i, (_, how) in step.chosen.items()],
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_decode_by_the_definition(case):
    uniforms = iter(case.get("uniforms", []))
    options = KINDS[case["decoder"]].from_flat(options_of(case))
    out = generate(recorded_model(), case["prompt_ids"], options, uniforms)
    assert case["prompt_ids"] + out.tokens == case["output_ids"]
    assert len(out.forwards) == case["stats"]["nfe"]
    assert [list(f) for f in out.forwards] == case["forward_trace"]
    assert [published_step(s) for s in out.steps] == case["stats"]["decoding_order"]
    assert next(uniforms, None) is None, "every recorded number is used"


def short(decoder: str = "cached", **flat) -> NoCacheOptions:
    return KINDS[decoder].from_flat({"block_length": 8, "max_new_tokens": 16, **flat})


PROMPT = CASES[0]["prompt_ids"]


def test_nocache_is_cached():
    """With a mask that masks, recomputing everything changes nothing."""
    texts = [generate(recorded_model(), PROMPT, short(d, max_post_steps=2)) for d in ("nocache", "cached")]
    assert texts[0].tokens == texts[1].tokens
    assert [published_step(s) for s in texts[0].steps] == [published_step(s) for s in texts[1].steps]


def test_never_verifying_is_cached():
    flat = {"max_post_steps": 2, "num_to_transfer": 2}
    plain = generate(recorded_model(), PROMPT, short(**flat))
    never = generate(recorded_model(), PROMPT, short("ssd_policy", do_verify_policy="never", **flat))
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


@pytest.mark.parametrize("prompt", [[], [3, 255]])
def test_prompts_that_cannot_be_decoded(prompt):
    with pytest.raises(UserError, match="the prompt is"):
        generate(recorded_model(), prompt, short())
