"""The whole decoder on a GPU in float32: eager, fast and in graphs, with and without savings, the same text token for token."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

import sdar
from sdar import SDARForCausalLM, generate, generate_ssd_policy
from shared.gpu.launch import available
from shared.network.loading import load_tokenizer
from shared.scripts.prompts import encode_prompt
from tests.sdar.test_decoding import EVERY, UNSAVED
from train.tasks import held_out

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = Path(sdar.__file__).parent / "tiny"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not available(DEVICE), reason="no CUDA device, and triton does not interpret"),
]
DECODERS = {"plain": generate.block_diffusion_generate, "speculative": generate_ssd_policy.block_diffusion_generate}


@lru_cache(maxsize=1)
def _model() -> SDARForCausalLM:
    return SDARForCausalLM.from_pretrained(TINY, device=DEVICE, dtype=torch.float32)


@lru_cache(maxsize=1)
def _prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(TINY)
    problems = held_out("word_problems", 20, seed="gpu") + held_out("instructions", 20, seed="gpu")
    return [encode_prompt(tokenizer, {"prompt": p.prompt}) for p in problems]


ALONE_AND_WIDE = ("dynamic", "static", "always-exact-draft_ver", "span1", "bandit", "sampled")
CASES = [
    pytest.param(d, f, rows, id=f"{d}-{n}-{rows}")
    for d, n, f in EVERY
    for rows in (1, 7, 32)
    if rows == 7 or n in ALONE_AND_WIDE
]


@pytest.mark.parametrize(("decoder", "flat", "rows"), CASES)
def test_graphs_and_savings_change_no_token(decoder, flat, rows):
    """Graph == fast == plain, every saving on == all off."""
    prompts = _prompts()[: {1: 2, 7: 12, 32: 40}[rows]]
    flat = {"max_new_tokens": 48, "block_length": 16, "confidence_threshold": 0.9, **flat}
    run = lambda **more: DECODERS[decoder](_model(), prompts, batch_size=rows, seed=4, **{**flat, **more})  # noqa: E731
    plain = run(fast=False, **UNSAVED)
    for name, more in {
        "fast": {"graphs": False, **UNSAVED},
        "graphs": UNSAVED,
        "graphs and savings": {k: True for k in UNSAVED},
    }.items():
        assert run(**more).tokens == plain.tokens, name


def test_a_second_call_reuses_the_graphs():
    flat = {"max_new_tokens": 32, "block_length": 16}
    first = DECODERS["speculative"](_model(), _prompts()[:4], **flat)
    engine = _model().engine
    again = DECODERS["speculative"](_model(), _prompts()[:3], **flat)
    assert _model().engine is engine
    assert again.tokens == first.tokens[:3]
