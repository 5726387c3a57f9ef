"""The whole decoders on a GPU in float32: eager, fast and in graphs, with and without savings, the same text token for token, both backends."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from d2f.generation_utils import generate_block_single, generate_block_speculative
from shared.family import FAMILIES
from shared.network.loading import load_tokenizer
from shared.scripts.models import load_models
from shared.scripts.prompts import encode_prompt
from tests.fast_checks import DEVICE, needs_gpu, needs_kernels
from train.tasks import held_out

pytestmark = [pytest.mark.gpu, needs_kernels]
NAMES = ["llada", "dream"]
LOSSLESS = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True}
SCORED = {"do_verify_policy": "score_threshold", "do_verify_score_type": "difference_static", "score_penalty_coef": 1.0}
EVERY = {
    "plain": (generate_block_single, {}),
    "one at a time": (generate_block_single, {"block_add_threshold": 1.0}),
    "all at once": (generate_block_single, {"block_add_threshold": 0.0}),
    "margin": (generate_block_single, {"margin_confidence": True}),
    "sampled": (generate_block_single, {"temperature": 0.8, "top_p": 0.9}),
    "span": (generate_block_speculative, {}),
    "lossless": (generate_block_speculative, LOSSLESS),
    "lossless, draft_ver": (generate_block_speculative, {**LOSSLESS, "draft_ver": True, "block_add_threshold": 0.1}),
    "score": (generate_block_speculative, {**SCORED, "token_acceptance_estimator": "soft_entropy_negexp"}),
    "bandit": (generate_block_speculative, {"do_verify_policy": "contextual_bandit_ucb"}),
    "sampled and verified": (generate_block_speculative, {"temperature": 0.8}),
}


@lru_cache(maxsize=2)
def _model(name: str):
    family = FAMILIES["D2F"]
    return load_models(family, family.checkpoints(name), dtype="float32", device=torch.device(DEVICE))["model"]


@lru_cache(maxsize=1)
def _prompts() -> list[list[int]]:
    tokenizer = load_tokenizer("D2F/llada")
    problems = held_out("word_problems", 20, seed="gpu") + held_out("instructions", 20, seed="gpu")
    return [encode_prompt(tokenizer, {"prompt": p.prompt}) for p in problems]


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("setting", EVERY)
@pytest.mark.parametrize("name", NAMES)
def test_graphs_and_savings_change_no_token(name, setting, rows):
    """Graph == fast == plain, every saving on == all off."""
    decode, flat = EVERY[setting]
    prompts = _prompts()[: {1: 2, 7: 12, 32: 40}[rows]]
    unsaved = {"end_early": False, **({"short_verify": False} if decode is generate_block_speculative else {})}
    flat = {"max_new_tokens": 56, "block_length": 16, "skip_threshold": 0.9, **flat}
    run = lambda **more: decode(_model(name), prompts, batch_size=rows, seed=4, **{**flat, **more})  # noqa: E731
    plain = run(fast=False, **unsaved)
    for more in ({"graphs": False, **unsaved}, unsaved, {}):
        assert run(**more).tokens == plain.tokens, more


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_reuses_the_graphs(name):
    flat = {"max_new_tokens": 32, "block_length": 16}
    first = generate_block_speculative(_model(name), _prompts()[:4], **flat)
    engine = _model(name).engine
    again = generate_block_speculative(_model(name), _prompts()[:3], **flat)
    assert _model(name).engine is engine
    assert again.tokens == first.tokens[:3]
