"""Whole decodes of the published code, reproduced: ids, decoding order, forward counts, uniforms consumed.

The published order codes how a position was decided into signs and fractions; `published_order` rebuilds it from our trace.
"""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch

from sdar import SDARForCausalLM, generate, generate_ssd_policy
from sdar.options import PUBLISHED
from shared.trace import How, Trace
from tests.family_checks import golden_folder

FOLDER = golden_folder("SDAR")
CASES = json.loads((FOLDER / "decode.json").read_text())

# Defaults of the published functions, where they differ from ours. A case's own keywords go on top.
FUNCTION_DEFAULTS = {
    "gen_length": 128,
    "block_length": 8,
    "denoising_steps": 8,
    "temperature": 1.0,
    "do_sample": False,
    "stopping_criteria_idx": None,
    "do_verify_score_threshold": -1.0,
    "ssd_entropy_threshold": 0.5,
    "ssd_confidence_power": 1.0,
}
# What the original does under these tags, the option of ours that does the same, and what we do by default instead.
QUIRKS = {
    "quirk:entropy_is_block_sum": "remasking_strategy=entropy_bounded_blocksum; entropy_bounded ranks by each token's own entropy",
    "quirk:greedy_draft_untempered_verify_tempered": "verify_temperature=T; by default drafts and verifier share a temperature",
    "quirk:sequential_records_positions_past_block": "ids and forwards are equal; our order never names a position outside the block",
}


@lru_cache(maxsize=1)
def _model() -> SDARForCausalLM:
    return SDARForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)


def options_of(case: dict) -> dict:
    """The case's keywords in our vocabulary, over the published function defaults."""
    flat = {**FUNCTION_DEFAULTS, **case["kwargs"]}
    if case["decoder"] == "standard":
        for name in ("do_verify_score_threshold", "ssd_entropy_threshold", "ssd_confidence_power"):
            flat.pop(name)
    if not flat["do_sample"]:
        if case["decoder"] == "ssd_policy":
            flat["verify_temperature"] = flat["temperature"]
        flat["temperature"] = 0.0
    flat.pop("do_sample")
    if flat.get("remasking_strategy") == "entropy_bounded":
        flat["remasking_strategy"] = "entropy_bounded_blocksum"
    flat["stopping_criteria_idx"] = flat["stopping_criteria_idx"] or ()
    return {**PUBLISHED, **flat}


def published_order(trace: Trace, decoder: str) -> list[list]:
    codes = {
        How.UNMASKED: lambda a: a if decoder == "standard" else -a,
        How.ACCEPTED: lambda a: a,
        How.KEPT: lambda a: a,
        How.RESAMPLED: lambda a: a + 0.5,
        How.RATIO: lambda a: a + 0.2,
        How.CONFIDENT: lambda a: -a - 0.4,
    }
    steps, block = [], None
    for positions in trace.order():
        here = positions[0] // trace.block_length
        steps.append((["|"] if here != block else []) + [codes[How(trace.how_of[a])](a) for a in positions])
        block = here
    return steps


def _plain(order: list[list]) -> list[list]:
    return [[e if isinstance(e, str) else round(float(e), 3) for e in step] for step in order]


def _published_kind(forwards: dict) -> dict:
    return {("store" if k == "commit" else k): v for k, v in forwards.items() if v}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_decode(case):
    unknown = [t for t in case["tags"] if t.startswith("quirk:") and t not in QUIRKS]
    assert not unknown, f"untold quirks {unknown}: name an option for them in QUIRKS"
    decoder = {"standard": generate, "ssd_policy": generate_ssd_policy}[case["decoder"]]
    uniforms = [case["uniforms"]] if "uniforms" in case else None
    out = decoder.block_diffusion_generate(_model(), [case["prompt_ids"]], uniforms=uniforms, **options_of(case))
    (text,) = out.completions
    assert case["prompt_ids"] + text.tokens == case["output_ids"]
    assert text.trace.total_forwards == case["stats"]["total_forward_steps"]
    if "stats_order_unrepresentable" not in case["tags"]:
        assert _plain(published_order(text.trace, case["decoder"])) == _plain(case["stats"]["decoding_order"])
    if uniforms:
        assert text.uniforms_used == len(case["uniforms"])
    seen = case.get("observed", {})
    if "forwards" in seen:
        assert _published_kind(text.trace.forwards) == {k: v for k, v in seen["forwards"].items() if v}
    if "do_verify" in seen:
        assert [s > 0 for s in text.trace.verified_span] == seen["do_verify"]
    if "span_lengths" in seen:
        verified = [(s, a) for s, a in zip(text.trace.verified_span, text.trace.accepted, strict=True) if s]
        assert [s for s, _ in verified] == seen["span_lengths"]
        assert [a for _, a in verified] == seen["accepted_lengths"]
