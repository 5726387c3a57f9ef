"""Exact self-speculation at temperature 1 draws from the distribution of block size one: a chi-square test against the enumerated distribution.

False alarms: every test here passes when p > 1e-4, so a correct decoder fails one of the honest settings with odds of at most 1 in
10,000 each; the seed is fixed, so a pass stays a pass. Deliberately broken rules must give p < 1e-12 with as many texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch
from scipy.stats import chisquare

from fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, generate_policy_utils, generate_utils
from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from llada2 import generate_policy_utils as llada2_policy
from llada2 import generate_utils as llada2_plain
from sdar import SDARConfig, SDARForCausalLM, generate, generate_ssd_policy
from shared.network.masks import token_causal
from shared.policy import accept as verify
from shared.policy.sampling import transform

VOCAB, MASK, TOKENS, TEXTS = 5, 4, 3, 4000
EXACT = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True}
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "mask_token_id": MASK,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 8}


@dataclass(frozen=True)
class Family:
    """``at_mask``: is a token predicted by a mask token of its own, or by the token before it? ``exact``: options of its lossless decoder."""

    model_class: type
    config: object
    plain: Callable
    speculative: Callable
    at_mask: bool = True
    exact: dict = field(default_factory=dict)


FAMILIES = {
    "SDAR": Family(
        SDARForCausalLM,
        SDARConfig(**SIZES),
        generate.block_diffusion_generate,
        generate_ssd_policy.block_diffusion_generate,
    ),
    "Fast-dLLM-v2": Family(
        Fast_dLLM_QwenForCausalLM,
        Fast_dLLM_QwenConfig(**SIZES),
        generate_utils.generate_fast,
        generate_policy_utils.generate_ssd_policy,
        at_mask=False,
    ),
    "LLaDA2": Family(
        LLaDA2MoeModelLM,
        LLaDA2MoeConfig(**SIZES, **EXPERTS),
        llada2_plain.generate_cached,
        llada2_policy.generate_ssd_policy,
        exact={"editing_threshold": 1.0},
    ),
}


@lru_cache
def model(name: str = "SDAR"):
    """Random, in float64, with a head loud enough that drafts and verifier disagree."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = family.model_class(family.config).double().eval().requires_grad_(False)
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.6)
    return net


@lru_cache
def distribution(
    prompt: tuple[int, ...], temperature: float = 1.0, top_k: int = 0, name: str = "SDAR"
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation: each token predicted after causal context."""
    joint, query = {(): 1.0}, [MASK] if FAMILIES[name].at_mask else []
    for _ in range(TOKENS):
        ids = torch.tensor([[*prompt, *text, *query] for text in joint])
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        logits = model(name)(ids, positions, None, token_causal(ids.shape[1]))[:, -1]
        logits[:, MASK] = float("-inf")
        probs = transform(logits, temperature, top_k).double().softmax(-1)
        joint = {
            (*text, token): p * float(row[token])
            for (text, p), row in zip(joint.items(), probs, strict=True)
            for token in range(VOCAB)
            if token != MASK
        }
    return joint


def draw(prompt: tuple[int, ...], *, name: str = "SDAR", plain: bool = False, **flat):
    family, flat = FAMILIES[name], {"temperature": 1.0, "max_new_tokens": TOKENS, "stopping_criteria_idx": (), **flat}
    decode = family.plain if plain else family.speculative
    flat |= {} if plain else family.exact
    return decode(model(name), [list(prompt)] * TEXTS, seed=5, batch_size=2000, **flat)


def p_value(texts: list[list[int]], joint: dict[tuple[int, ...], float]) -> float:
    """Chi-square against ``joint``; texts expected fewer than five times share one bin. A text the distribution forbids gives 0."""
    drawn = dict.fromkeys(joint, 0)
    for text in texts:
        drawn[tuple(text)] += 1
    if any(n and not joint[text] for text, n in drawn.items()):
        return 0.0
    bins = [[drawn[t], p * len(texts)] for t, p in joint.items() if p * len(texts) >= 5]
    rest = [
        sum(drawn[t] for t in joint if joint[t] * len(texts) < 5),
        sum(p for p in joint.values() if p * len(texts) < 5),
    ]
    rest[1] *= len(texts)
    bins += [rest] if rest[1] >= 1 else []
    seen, expected = zip(*bins, strict=True)
    scale = sum(seen) / sum(expected)
    return float(chisquare(seen, [e * scale for e in expected]).pvalue)


SETTINGS = {
    "one block": ("SDAR", (2,), {"block_length": 4}),
    "across a commit": ("SDAR", (1, 2), {"block_length": 3}),
    "across a commit, draft_ver": ("SDAR", (1, 2), {"block_length": 3, "draft_ver": True}),
    "cooler, top-k": ("SDAR", (1,), {"block_length": 4, "temperature": 0.7, "top_k": 3}),
    "shifted": ("Fast-dLLM-v2", (2,), {"block_length": 4}),
    "shifted, across a commit": ("Fast-dLLM-v2", (1, 2), {"block_length": 4}),
    "shifted, across a commit, block cache": ("Fast-dLLM-v2", (1, 2), {"block_length": 4, "use_block_cache": True}),
    "shifted, after a whole block": ("Fast-dLLM-v2", (1, 3), {"block_length": 2}),
    "shifted, after a whole block, cooler, top-k": (
        "Fast-dLLM-v2",
        (0, 1, 3, 2),
        {"block_length": 4, "temperature": 0.7, "top_k": 3},
    ),
    "experts": ("LLaDA2", (2,), {"block_length": 4}),
    "experts, across a commit": ("LLaDA2", (1, 2), {"block_length": 3}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_sampling_is_block_size_one(setting):
    name, prompt, flat = SETTINGS[setting]
    out = draw(prompt, name=name, **EXACT, **flat)
    joint = distribution(prompt, flat.get("temperature", 1.0), flat.get("top_k", 0), name)
    assert out.lossless
    assert p_value(out.tokens, joint) > 1e-4
    counts = [c.trace.counts() for c in out.completions]
    accepted, resampled = (sum(c.get(how, 0) for c in counts) for how in ("accepted", "resampled"))
    assert accepted > TEXTS / 2
    assert resampled > TEXTS / 20, "both branches of the rule decide many tokens"


@pytest.mark.parametrize("name", FAMILIES)
def test_block_size_one_itself(name):
    out = draw((2,), name=name, plain=True, block_length=1, **FAMILIES[name].exact)
    assert out.lossless
    assert p_value(out.tokens, distribution((2,), name=name)) > 1e-4


def test_the_likeliest_token_after_a_block_is_caught():
    """As published; with the draws it is off."""
    for prompt, flat in (((1, 3), {"block_length": 2}), ((1, 2), {"block_length": 4})):
        out = draw(prompt, name="Fast-dLLM-v2", **EXACT, **flat, greedy_next=True)
        assert not out.lossless
        assert p_value(out.tokens, distribution(prompt, name="Fast-dLLM-v2")) < 1e-12


BROKEN = {
    "p and q swapped in the ratio": ("acceptance_ratio", lambda q, p, tempering: (p / q.clamp_min(1e-12)).clamp(max=1)),
    "everything accepted": ("acceptance_ratio", lambda q, p, tempering: torch.ones_like(q)),
    "resampling from q": ("residual", lambda target, draft_probs: target),
    "resampling from p": ("residual", lambda target, draft_probs: draft_probs),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_caught(name, monkeypatch):
    monkeypatch.setattr(verify, *BROKEN[name])
    assert p_value(draw((2,), **EXACT, block_length=4).tokens, distribution((2,))) < 1e-12


def test_plain_diffusion_is_caught():
    """Tokens of one step drawn independently of each other do not follow the distribution."""
    out = draw((2,), plain=True, block_length=4, denoising_steps=1, remasking_strategy="low_confidence_static")
    assert not out.lossless
    assert p_value(out.tokens, distribution((2,))) < 1e-12


def test_a_block_causal_cache_is_caught():
    """Without ``cache_ver`` the second block is verified against keys the distribution does not have."""
    prompt = (1, 2)
    out = draw(prompt, **{**EXACT, "cache_ver": False}, block_length=3)
    assert not out.lossless
    assert p_value(out.tokens, distribution(prompt)) < 1e-12


def test_the_distribution_sums_to_one():
    joint = distribution((2,))
    assert sum(joint.values()) == pytest.approx(1.0)
    assert set(joint) == set(itertools.product(range(VOCAB - 1), repeat=TOKENS))
