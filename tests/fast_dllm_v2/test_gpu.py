"""The whole decoder on a GPU in float32: eager, fast and in graphs, with and without a block cache, the same text token for token."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

import fast_dllm_v2
from fast_dllm_v2 import Fast_dLLM_QwenForCausalLM
from fast_dllm_v2.generate_policy_utils import generate_ssd_policy
from fast_dllm_v2.generate_utils import generate_fast
from shared.gpu.graphs import Shape
from shared.network.loading import load_tokenizer
from shared.scripts.prompts import encode_prompt
from tests.fast_checks import DEVICE, needs_kernels
from train.tasks import held_out

TINY = Path(fast_dllm_v2.__file__).parent / "tiny"
pytestmark = [pytest.mark.gpu, needs_kernels]
LOSSLESS = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True, "draft_ver": True}
EVERY = {
    "plain": (generate_fast, {}),
    "plain-block_cache": (generate_fast, {"use_block_cache": True}),
    "lossless": (generate_ssd_policy, LOSSLESS),
    "lossless-block_cache": (generate_ssd_policy, {**LOSSLESS, "use_block_cache": True}),
    "commits": (generate_ssd_policy, {**LOSSLESS, "reuse_verify": False}),
    "span": (generate_ssd_policy, {"do_verify_policy": "mask_span_length", "min_ssd_span_length": 4}),
    "sampled": (generate_ssd_policy, {"do_verify_policy": "always", "temperature": 0.8}),
    "one": (generate_ssd_policy, {**LOSSLESS, "small_block_length": 1}),
}


@lru_cache(maxsize=1)
def _model() -> Fast_dLLM_QwenForCausalLM:
    return Fast_dLLM_QwenForCausalLM.from_pretrained(TINY, device=DEVICE, dtype=torch.float32)


@lru_cache(maxsize=1)
def _prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(TINY)
    problems = held_out("word_problems", 20, seed="gpu") + held_out("instructions", 20, seed="gpu")
    return [encode_prompt(tokenizer, {"prompt": p.prompt}) for p in problems]


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("name", EVERY)
def test_graphs_change_no_token(name, rows):
    """Graph == fast == plain."""
    decode, flat = EVERY[name]
    prompts = _prompts()[: {1: 2, 7: 12, 32: 40}[rows]]
    flat = {
        "max_new_tokens": 48, "block_length": 16, "small_block_length": 4, "confidence_threshold": 0.9, "seed": 4,
        "batch_size": rows, **flat,
    }  # fmt: skip
    plain = decode(_model(), prompts, **flat, fast=False)
    for more in ({"graphs": False}, {}):
        assert decode(_model(), prompts, **flat, **more).tokens == plain.tokens, more


@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
def test_every_forward_of_a_block_finds_its_graph():
    """What the decoder asks for after the prefill has been captured: at any batch size, nothing runs eagerly."""
    flat = {"block_length": 16, "small_block_length": 4, "max_new_tokens": 32, **LOSSLESS, "reuse_verify": False}
    for more in ({}, {"use_block_cache": True}):
        generate_ssd_policy(_model(), _prompts()[:5], **flat, **more)
        engine = _model().engine
        eager, seen = engine.runner.forward, []
        engine.runner.forward = lambda eager=eager, seen=seen, **given: (
            seen.append(given["input_ids"].shape[1]) or eager(**given)
        )
        generate_ssd_policy(_model(), _prompts()[:5], **flat, **more)
        engine.runner.forward = eager
        assert len(seen) <= 1, f"only the prefill runs eagerly: {seen}"
        assert {s.tokens for s in engine.runner.captured} >= {4, 8, 12, 16}
        assert Shape(5, 16, picks=4) in engine.runner.captured
