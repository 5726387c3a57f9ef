"""Decode options of the SDAR family and the settings of the papers, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.options import (
    Acceptance,
    Bandit,
    Blocks,
    Cache,
    Estimation,
    FlatOptions,
    Routing,
    Runtime,
    Sampling,
    Savings,
    Unmask,
)


@dataclass(frozen=True, slots=True)
class StandardOptions(FlatOptions):
    """Plain block diffusion (`generate.py`)."""

    sampling: Sampling = field(default_factory=Sampling)
    blocks: Blocks = field(default_factory=Blocks)
    unmask: Unmask = field(default_factory=Unmask)
    savings: Savings = field(default_factory=Savings)
    runtime: Runtime = field(default_factory=Runtime)


@dataclass(frozen=True, slots=True)
class Options(StandardOptions):
    """S2D2, the model drafting for itself (`generate_ssd_policy.py`)."""

    routing: Routing = field(default_factory=Routing)
    bandit: Bandit = field(default_factory=Bandit)
    estimation: Estimation = field(default_factory=Estimation)
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache: Cache = field(default_factory=Cache)


# Every switch that makes a decode repeat the published code, forwards included.
PUBLISHED = {
    "suppress_mask": False,
    "round_to_blocks": True,
    "skip_last_commit": False,
    "fuse_commit": False,
    "reuse_verify": False,
    "short_verify": False,
}

_PAPER = {
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.85,
    "do_verify_policy": "score_threshold",
    "do_verify_score_threshold": 0.0,
    "do_verify_score_type": "difference_static",
    "token_acceptance_estimator": "soft_entropy_negexp",
    "cache_ver": True,
    "draft_ver": True,
}

# The settings at which each decoder is at its best on the checkpoint in tiny/ (README.md, "Measured"). At block length 32 drafts are long enough to
# pay for their verification, and the text is exactly that of block size one.
_TINY_PLAIN = {"block_length": 16, "max_new_tokens": 256, "confidence_threshold": 0.95}
_TINY = {
    "block_length": 32,
    "max_new_tokens": 256,
    "confidence_threshold": 0.99,
    "do_verify_policy": "always",
    "acceptance": "exact",
    "cache_ver": True,
    "draft_ver": True,
}

PLAIN_PRESETS = {"published": PUBLISHED, "tiny": _TINY_PLAIN}
PRESETS = {
    "tiny": _TINY,
    "published": PUBLISHED,
    "paper-a": {**_PAPER, "block_length": 4, "denoising_steps": 4, "score_penalty_coef": 1.0},
    "paper-b": {**_PAPER, "block_length": 16, "denoising_steps": 16, "score_penalty_coef": 0.0},
}

DEFAULT_PROMPT = (
    "Olivia walks each of her ten dogs for 15 minutes twice a day and spends 5 minutes feeding each of them. "
    "How many hours does she spend on her dogs in a week? Reason step by step and put the final answer in \\boxed{}."
)


def plain(options: Options) -> StandardOptions:
    """The same settings without speculation."""
    return StandardOptions(options.sampling, options.blocks, options.unmask, options.savings, options.runtime)
