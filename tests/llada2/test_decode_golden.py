"""Whole decodes of the published code, reproduced by the batched decoders (``tests/golden/LLaDA2/decode.json``), one test a case.

``GOLDEN_DIR=folder`` reads ``folder/LLaDA2`` instead: other checkpoints and cases in the same format must pass as well.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache

import pytest
import torch

from llada2 import LLaDA2MoeModelLM
from llada2.generate_policy_utils import generate_ssd_policy
from llada2.generate_utils import generate_cached, generate_nocache
from llada2.options import NOCACHE_PUBLISHED, PLAIN_PUBLISHED, PUBLISHED
from shared.trace import How, Trace
from tests.family_checks import golden_folder

FOLDER = golden_folder("LLaDA2")
CASES = json.loads((FOLDER / "decode.json").read_text())["cases"]
DECODERS = {
    "nocache": (generate_nocache, NOCACHE_PUBLISHED),
    "cached": (generate_cached, PLAIN_PUBLISHED),
    "ssd_policy": (generate_ssd_policy, PUBLISHED),
}

# Defaults of the published functions, where they differ from ours. A case's own keywords go on top.
FUNCTION_DEFAULTS = {
    "gen_length": 2048,
    "block_length": 32,
    "eos_early_stop": False,
    "threshold": 0.95,
    "editing_threshold": 0.9,
    "max_post_steps": 16,
}


@lru_cache(maxsize=1)
def recorded_model() -> LLaDA2MoeModelLM:
    return LLaDA2MoeModelLM.from_pretrained(FOLDER / "model", dtype=torch.float32)


def options_of(case: dict) -> dict:
    """The case's keywords in our vocabulary, over the published function defaults."""
    flat = {**DECODERS[case["decoder"]][1], **FUNCTION_DEFAULTS, **case["kwargs"]}
    if case["decoder"] == "ssd_policy" and not flat.get("temperature"):
        flat["verify_temperature"] = 1.0  # the filters apply to the verifier also under greedy drafts
    return {**flat, "as_bias": case["prefill_mask"] == "as_bias"}


def published_order(trace: Trace) -> list[dict[str, list]]:
    """The published record: one entry a draft forward, signs and fractions for how a position was decided."""
    codes = {How.UNMASKED: lambda a: a, How.ACCEPTED: lambda a: -a, How.RESAMPLED: lambda a: -a - 0.5}
    steps = [{"edit": [], "unmask": [codes[How(trace.how_of[p])](p) for p in step]} for step in trace.order()]
    for step, *edit in trace.edits:
        steps[step]["edit"].append(edit)
    return steps


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_decode(case):
    uniforms = [case["uniforms"]] if "uniforms" in case else None
    decoder, _ = DECODERS[case["decoder"]]
    out = decoder(recorded_model(), [case["prompt_ids"]], uniforms=uniforms, **options_of(case))
    (text,) = out.completions
    assert case["prompt_ids"] + text.tokens == case["output_ids"]
    assert published_order(text.trace) == case["stats"]["decoding_order"]
    assert text.trace.total_forwards == case["stats"]["nfe"]
    kinds = Counter("draft" if kind == "full" else kind for kind, _ in case["forward_trace"])
    assert {kind: n for kind, n in text.trace.forwards.items() if n} == kinds
    tokens = Counter()
    for kind, count in case["forward_trace"]:
        tokens["draft" if kind == "full" else kind] += count
    assert out.batch_tokens == tokens
    assert text.uniforms_used == len(case.get("uniforms", []))
