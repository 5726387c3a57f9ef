"""Whole decodes of the recorded checkpoint (``tests/golden/Fast-dLLM-v2/decode.json``), one test a case.

``GOLDEN_DIR=folder`` reads ``folder/Fast-dLLM-v2`` instead: other checkpoints and cases in the same format must pass as well.
"""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch

from fast_dllm_v2 import Fast_dLLM_QwenForCausalLM, reference
from fast_dllm_v2.generate_policy_utils import generate_ssd_policy
from fast_dllm_v2.generate_utils import generate_fast, generate_ssd
from fast_dllm_v2.options import PLAIN_PUBLISHED, PUBLISHED, Options, StandardOptions
from shared.policy.uniforms import request_uniforms
from shared.trace import How, Trace
from tests.family_checks import golden_folder

FOLDER = golden_folder("Fast-dLLM-v2")
CASES = json.loads((FOLDER / "decode.json").read_text())
DECODERS = {"fast": generate_fast, "ssd": generate_ssd, "ssd_policy": generate_ssd_policy}

# Defaults of the published functions, where they differ from ours. A case's own keywords go on top.
FUNCTION_DEFAULTS = {"threshold": 1.0, "small_block_size": 8, "block_size": 32, "top_p": 0.95}
# What the original does under these tags and the option of ours that does the same.
QUIRKS = {
    "quirk:length_is_block_rounded": "round_to_blocks=true; by default a text has at most max_new_tokens tokens",
    "quirk:greedy_draft_unfiltered_verify_top_p": "verify_temperature=1 filters the verifier under greedy drafts; by default greedy means unfiltered",
    "quirk:draft_ver_rows_relative_to_small_block": "draft_ver_rows=small_block; by default rows count from the block's start",
}


@lru_cache(maxsize=1)
def _model() -> Fast_dLLM_QwenForCausalLM:
    return Fast_dLLM_QwenForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)


def options_of(case: dict) -> dict:
    """The case's keywords in our vocabulary, over the published function defaults."""
    flat = {**FUNCTION_DEFAULTS, **case["kwargs"]}
    flat.pop("use_attention_mask", None)  # explicit masks equal to the implied ones
    total = flat.pop("max_length", None)
    if total is not None:
        flat.setdefault("max_new_tokens", total - len(case["prompt_ids"]))
    if case["decoder"] != "fast" and not flat.get("temperature"):
        flat["verify_temperature"] = 1.0
    return {**(PLAIN_PUBLISHED if case["decoder"] == "fast" else PUBLISHED), **flat}


def published_order(trace: Trace) -> list[list[float]]:
    codes = {
        How.UNMASKED: lambda a: -a,
        How.ACCEPTED: lambda a: a,
        How.RESAMPLED: lambda a: a + 0.5,
        How.NEXT: lambda a: -a - 0.5,
    }
    return [[round(float(codes[How(trace.how_of[a])](a)), 3) for a in step] for step in trace.order() if step]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_decode(case):
    unknown = [t for t in case["tags"] if t.startswith("quirk:") and t not in QUIRKS]
    assert not unknown, f"untold quirks {unknown}: name an option for them in QUIRKS"
    uniforms = [case["uniforms"]] if "uniforms" in case else None
    out = DECODERS[case["decoder"]](_model(), [case["prompt_ids"]], uniforms=uniforms, **options_of(case))
    (text,) = out.completions
    assert case["prompt_ids"] + text.tokens == case["output_ids"]
    assert published_order(text.trace) == [
        [round(float(a), 3) for a in step] for step in case["stats"]["decoding_order"]
    ]
    assert text.trace.total_forwards == case["stats"]["total_forward_steps"]
    if uniforms:
        assert text.uniforms_used == len(case["uniforms"])
    seen = case.get("observed", {})
    if "forwards" in seen:
        want = {"prefill": 0, "draft": 0, "verify": 0, "commit": 0}
        for kind, count in seen["forwards"].items():
            want["commit" if kind == "store" else kind.split("_")[0]] += count
        assert {k: text.trace.forwards.get(k, 0) for k in want} == want
    if "span_lengths" in seen:
        verified = [(s, a) for s, a in zip(text.trace.verified_span, text.trace.accepted, strict=True) if s]
        assert [s for s, _ in verified] == seen["span_lengths"]
        assert [a for _, a in verified] == seen["accepted_lengths"]
    if "do_verify" in seen:
        steps = [
            s > 0
            for s, order in zip(text.trace.verified_span, text.trace.order(), strict=True)
            if not any(text.trace.how_of[p] == How.NEXT for p in order)
        ]
        assert steps == seen["do_verify"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_decode_by_the_definition(case):
    """A case without recorded numbers needs none in particular: its acceptance ratios are 0 or 1."""
    options = (StandardOptions if case["decoder"] == "fast" else Options).from_flat(options_of(case))
    recorded = case.get("uniforms")
    uniforms = iter(request_uniforms(0, 0, 20_000).tolist() if recorded is None else recorded)
    out = reference.generate(_model(), case["prompt_ids"], options, uniforms)
    assert case["prompt_ids"] + out.tokens == case["output_ids"]
    assert [step for step in out.order if step] == [[int(abs(a)) for a in s] for s in case["stats"]["decoding_order"]]
    assert sum(out.forwards.values()) == case["stats"]["total_forward_steps"]
    assert recorded is None or next(uniforms, None) is None, "every recorded number is used"
