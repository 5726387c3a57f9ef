"""Decode options of the Fast-dLLM v2 family and the settings of the papers, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.errors import UserError
from shared.options import (
    Acceptance,
    Bandit,
    BlockLength,
    Ending,
    Estimation,
    FlatOptions,
    Group,
    LastCommit,
    Routing,
    Runtime,
    Sampling,
    Threshold,
    check,
    option,
)
from shared.options import Cache as CommonCache


@dataclass(frozen=True)
class SmallBlocks:
    __slots__ = ()
    small_block_length: int | None = option(
        None,
        "tokens drafted together, a divisor of block_length; default: 8, or block_length where 8 does not divide it",
        low=1,
    )


@dataclass(frozen=True, slots=True)
class Blocks(Ending, SmallBlocks, BlockLength, Group):
    block_length: int | None = option(None, "tokens committed together; default: the checkpoint's bd_size", low=1)
    round_to_blocks: bool = option(
        False, "max_new_tokens // block_length blocks from the prompt's on, and one token (as published)"
    )
    greedy_next: bool = option(
        False, "the token that a commit predicts is the likeliest one at any temperature (as published), not a draw"
    )

    def __post_init__(self):
        check(self)
        length, small = self.block_length, self.small_block_length
        if length and small and length % small:
            raise UserError(f"small_block_length is {small}. Allowed: a divisor of block_length ({length})")


@dataclass(frozen=True, slots=True)
class BlockCache(Group):
    use_block_cache: bool = option(
        False, "draft a small block on cached keys of the whole block (of its other positions)"
    )
    refresh_block_cache: bool = option(
        True, "those keys are computed anew when a small block begins; false: never, as published with S2D2"
    )


@dataclass(frozen=True, slots=True)
class StandardOptions(FlatOptions):
    """Blocks, sub-blocks and a threshold (``fast``)."""

    sampling: Sampling = field(default_factory=Sampling)
    blocks: Blocks = field(default_factory=Blocks)
    unmask: Threshold = field(default_factory=Threshold)
    block_cache: BlockCache = field(default_factory=BlockCache)
    savings: LastCommit = field(default_factory=LastCommit)
    runtime: Runtime = field(default_factory=Runtime)


@dataclass(frozen=True, slots=True)
class Cache(CommonCache):
    draft_ver_rows: Literal["block", "small_block"] = option(
        "block", "count draft_ver's known tokens from the block's start, or (as published) the small_block's"
    )
    reuse_verify: bool = option(True, "with cache_ver, a verify that saw the final tokens of a block is its commit")
    use_ssd_cache: bool = option(False, "accepted as false; the published code has no working cache of this name")

    def __post_init__(self):
        check(self)
        if self.use_ssd_cache:
            raise UserError(
                "use_ssd_cache is True. Allowed: false; the published code fails with it, and there is no other definition"
            )


@dataclass(frozen=True, slots=True)
class Options(StandardOptions):
    """S2D2 with the causal verifier (``ssd``, ``ssd_policy``)."""

    routing: Routing = field(default_factory=Routing)
    bandit: Bandit = field(default_factory=Bandit)
    estimation: Estimation = field(default_factory=Estimation)
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache: Cache = field(default_factory=Cache)


# Every switch that makes a decode repeat the published code, forwards included.
PLAIN_PUBLISHED = {
    "suppress_mask": False,
    "round_to_blocks": True,
    "trim_stop_tokens": False,
    "skip_last_commit": False,
    "greedy_next": True,
}
PUBLISHED = {**PLAIN_PUBLISHED, "reuse_verify": False, "draft_ver_rows": "small_block", "refresh_block_cache": False}

_PAPER = {
    "block_length": 32,
    "confidence_threshold": 0.9,
    "do_verify_policy": "score_hysteresis",
    "hysteresis_threshold_on": 1.0,
    "hysteresis_threshold_off": -5.0,
    "do_verify_score_type": "difference_dynamic",
    "score_penalty_coef": 1.0,
    "token_acceptance_estimator": "soft_entropy_negexp",
}
_TINY = {
    "block_length": 32,
    "max_new_tokens": 256,
    "confidence_threshold": 0.9,
}

PLAIN_PRESETS = {"tiny": {**_TINY, "small_block_length": 8}, "published": PLAIN_PUBLISHED}
PRESETS = {
    "tiny": {
        **_TINY,
        "small_block_length": 32,
        "do_verify_policy": "always",
        "acceptance": "exact",
        "cache_ver": True,
        "draft_ver": True,
    },
    "published": PUBLISHED,
    "paper-a": {**_PAPER, "small_block_length": 4},
    "paper-b": {**_PAPER, "small_block_length": 16},
    "paper-c": {
        "block_length": 32,
        "small_block_length": 32,
        "confidence_threshold": 0.9,
        "do_verify_policy": "mask_span_length",
        "min_ssd_span_length": 8,
    },
}

# `ssd` has one policy.
SSD_PRESETS = {
    "tiny": {**PRESETS["tiny"], "do_verify_policy": "mask_span_length", "min_ssd_span_length": 1},
    "published": PUBLISHED,
    "paper-c": PRESETS["paper-c"],
}

DEFAULT_PROMPT = (
    "Write a python function to remove first and last occurrence of a given character from the string. "
    "Your code should pass these tests: assert remove_Occ('hello','l') == 'heo'"
)


def plain(options: Options) -> StandardOptions:
    """The same settings without speculation."""
    o = options
    return StandardOptions(o.sampling, o.blocks, o.unmask, o.block_cache, o.savings, o.runtime)
