"""Whole decodes of the recorded checkpoints (``tests/golden/D2F-*/decode.json``), one test a case.

``GOLDEN_DIR=folder`` reads ``folder/D2F-llada`` and ``folder/D2F-dream`` instead: other checkpoints and cases in the same format must pass as well.
"""

from __future__ import annotations

import json

import pytest

from d2f import reference
from d2f.generation_utils import generate_block_single, generate_block_speculative
from d2f.options import PLAIN_PUBLISHED, PUBLISHED, Options, StandardOptions
from d2f.stats import forward_stats
from tests.d2f.test_modeling_d2f import NAMES, model_of
from tests.family_checks import golden_folder

CASES = [
    pytest.param(name, case, id=f"{name}-{case['name']}")
    for name in NAMES
    for case in json.loads((golden_folder(f"D2F-{name}") / "decode.json").read_text())["cases"]
]
DECODERS = {"d2f": generate_block_single, "ssd": generate_block_speculative}
# Defaults of the published functions, where they differ from ours. A case's own keywords go on top.
FUNCTION_DEFAULTS = {"block_add_threshold": 0.1, "decoded_token_threshold": 0.5, "skip_threshold": 0.9}


def options_of(case: dict) -> dict:
    """The case's keywords in our vocabulary, over the published function defaults."""
    flat = FUNCTION_DEFAULTS | (PLAIN_PUBLISHED if case["decoder"] == "d2f" else PUBLISHED) | case["kwargs"]
    flat["attention"] = case["attention"]
    flat["mask_id"] = flat.pop("mask_token_id")
    for name in ("model_type", "device", "dtype"):
        flat.pop(name, None)
    stops = flat.pop("eos_token_id", None)
    return flat | {"stopping_criteria_idx": stops} if stops is not None else flat | {"truncate_at_eos": False}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden_decode(name, case):
    uniforms = [case.get("uniforms", [])]
    model = model_of(name, bool(case.get("adapter")))
    out = DECODERS[case["decoder"]](model, [case["prompt_ids"]], uniforms=uniforms, **options_of(case))
    (text,) = out.completions
    assert text.tokens == case["output_ids"]
    got, want = forward_stats(text.trace), dict(case["stats"])
    want["per_block_forwards"] = {int(k): v for k, v in want["per_block_forwards"].items()}
    assert got["decoding_order"] == want["decoding_order"]
    assert got["per_block_forwards"] == want["per_block_forwards"]
    assert set(got) == set(want)
    for name in set(got) - {"decoding_order", "per_block_forwards"}:
        assert got[name] == pytest.approx(want[name]), name
    drafts = [(p.end - p.start, p.start) for p in text.trace.passes]
    assert drafts == [(tokens, cached) for kind, tokens, cached, _ in case["forward_trace"] if kind == "draft"]
    assert text.trace.forwards.get("verify", 0) == sum(kind == "verify" for kind, *_ in case["forward_trace"])
    assert text.uniforms_used == len(uniforms[0])


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden_decode_by_the_definition(name, case):
    options = (StandardOptions if case["decoder"] == "d2f" else Options).from_flat(options_of(case))
    uniforms = iter(case.get("uniforms", []))
    out = reference.generate(model_of(name, bool(case.get("adapter"))), case["prompt_ids"], options, uniforms)
    assert out.tokens == case["output_ids"]
    assert out.order == [[int(abs(p)) for p in step] for step in case["stats"]["decoding_order"]]
    assert sum(out.forwards.values()) == case["stats"]["total_forwards"]
    assert next(uniforms, None) is None, "every recorded number is used"
