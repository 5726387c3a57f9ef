"""The whole decoder on a GPU in float32: eager, fast and in graphs, with and without savings, the same text token for token."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

import llada2
from llada2 import LLaDA2MoeModelLM
from llada2.generate_policy_utils import generate_ssd_policy
from llada2.generate_utils import generate_cached, generate_nocache
from shared.network.loading import load_tokenizer
from shared.scripts.prompts import encode_prompt
from tests.fast_checks import DEVICE, needs_gpu, needs_kernels
from train.tasks import held_out

TINY = Path(llada2.__file__).parent / "tiny"
pytestmark = [pytest.mark.gpu, needs_kernels]
LOSSLESS = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True, "editing_threshold": 1.0}
SCORED = {"do_verify_policy": "score_threshold", "do_verify_score_type": "difference_static", "score_penalty_coef": 1.0}
EVERY = {
    "nocache": (generate_nocache, {"max_post_steps": 1}),
    "cached": (generate_cached, {"max_post_steps": 2}),
    "static": (generate_cached, {"confidence_threshold": 1.0, "num_to_transfer": 2}),
    "span": (generate_ssd_policy, {"max_post_steps": 2}),
    "lossless": (generate_ssd_policy, {**LOSSLESS, "draft_ver": True}),
    "edited": (generate_ssd_policy, {**LOSSLESS, "editing_threshold": 0.9, "max_post_steps": 1}),
    "score": (generate_ssd_policy, {**SCORED, "token_acceptance_estimator": "soft_entropy_negexp"}),
    "bandit": (generate_ssd_policy, {"do_verify_policy": "contextual_bandit_ucb", "max_post_steps": 1}),
    "sampled": (generate_ssd_policy, {"temperature": 0.8, "top_p": 0.9}),
    "unedited": (generate_cached, {"temperature": 0.8, "editing_threshold": 1.0, "max_post_steps": 1}),
}
_UNSAVED_PLAIN = {"skip_last_commit": False, "fuse_commit": False, "reuse_draft": False, "skip_idle_post_steps": False}
UNSAVED = {
    "nocache": {"skip_idle_post_steps": False},
    "cached": _UNSAVED_PLAIN,
    "ssd_policy": {**_UNSAVED_PLAIN, "reuse_verify": False, "short_verify": False},
}


@lru_cache(maxsize=1)
def _model() -> LLaDA2MoeModelLM:
    return LLaDA2MoeModelLM.from_pretrained(TINY, device=DEVICE, dtype=torch.float32)


@lru_cache(maxsize=1)
def _prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(TINY)
    problems = held_out("word_problems", 20, seed="gpu") + held_out("instructions", 20, seed="gpu")
    return [encode_prompt(tokenizer, {"prompt": p.prompt}) for p in problems]


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("name", EVERY)
def test_graphs_and_savings_change_no_token(name, rows):
    """Graph == fast == plain, every saving on == all off; the edits too."""
    decode, flat = EVERY[name]
    prompts = _prompts()[: {1: 2, 7: 12, 32: 40}[rows]]
    unsaved = UNSAVED[decode.__name__.removeprefix("generate_")]
    flat = {"max_new_tokens": 48, "block_length": 16, "confidence_threshold": 0.9, "editing_threshold": 0.7, **flat}
    run = lambda **more: decode(_model(), prompts, batch_size=rows, seed=4, **{**flat, **more})  # noqa: E731
    plain = run(fast=False, **unsaved)
    for more in ({"graphs": False, **unsaved}, unsaved, {}):
        out = run(**more)
        assert out.tokens == plain.tokens, more
        assert [c.trace.edits for c in out.completions] == [c.trace.edits for c in plain.completions], more


@needs_gpu
def test_a_second_call_reuses_the_graphs():
    flat = {"max_new_tokens": 32, "block_length": 16}
    first = generate_ssd_policy(_model(), _prompts()[:4], **flat)
    engine = _model().engine
    again = generate_ssd_policy(_model(), _prompts()[:3], **flat)
    assert _model().engine is engine
    assert again.tokens == first.tokens[:3]
