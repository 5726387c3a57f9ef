"""Decode options of the LLaDA2 family and the settings of the papers, as plain data. Defaults are those of the published scripts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from shared.errors import UserError
from shared.options import (
    Acceptance,
    Bandit,
    BlockLength,
    Cache,
    CommitSavings,
    Ending,
    Estimation,
    FlatOptions,
    Group,
    Routing,
    Runtime,
    Sampling,
    Threshold,
    option,
)
from shared.options import Savings as CommonSavings


@dataclass(frozen=True, slots=True)
class Blocks(Ending, BlockLength, Group):
    eos_early_stop: bool = option(True, "stop after the block that holds a stop token; otherwise decode on and cut")
    as_bias: bool = option(False, "add the 0/1 block-causal mask to the scores instead of masking (as published)")


@dataclass(frozen=True, slots=True)
class Unmask(Threshold):
    confidence_threshold: float = option(
        0.7, "a masked position above this confidence is filled; 1: none, so num_to_transfer a step", low=0.0
    )
    num_to_transfer: int = option(1, "fill at least this many masked positions a step", low=1)


@dataclass(frozen=True, slots=True)
class Editing(Group):
    editing_threshold: float = option(
        0.5, "another token above this confidence replaces a known one of the block; 1: never", low=0.0
    )
    max_post_steps: int = option(
        0, "forwards that may still edit a block after its last mask is gone", low=0, high=1024
    )

    @property
    def on(self) -> bool:
        """May a token ever be replaced? No confidence is above 1."""
        return self.editing_threshold < 1


@dataclass(frozen=True)
class IdlePostSteps:
    __slots__ = ()
    skip_idle_post_steps: bool = option(True, "no post steps where editing is off: they could change nothing")


@dataclass(frozen=True)
class ReuseDraft:
    __slots__ = ()
    reuse_draft: bool = option(True, "a draft that found a block finished and changed nothing is its commit")


@dataclass(frozen=True, slots=True)
class NoCacheSavings(IdlePostSteps, Group):
    """Switches that change how many forwards a text costs, never the text."""


@dataclass(frozen=True, slots=True)
class PlainSavings(IdlePostSteps, ReuseDraft, CommitSavings):
    """The same where finished blocks are kept in a cache."""


@dataclass(frozen=True, slots=True)
class Savings(IdlePostSteps, ReuseDraft, CommonSavings):
    """The same where spans are verified."""


@dataclass(frozen=True, slots=True)
class NoCacheOptions(FlatOptions):
    """Every forward over everything so far (``nocache``)."""

    decoder: ClassVar[str] = "nocache"

    sampling: Sampling = field(default_factory=Sampling)
    blocks: Blocks = field(default_factory=Blocks)
    unmask: Unmask = field(default_factory=Unmask)
    editing: Editing = field(default_factory=Editing)
    runtime: Runtime = field(default_factory=Runtime)
    savings: NoCacheSavings = field(default_factory=NoCacheSavings)

    @property
    def skips_post_steps(self) -> bool:
        """Does a block end with its last mask? Where post steps can change nothing; score_hysteresis switches off in one, edits or not."""
        routing = getattr(self, "routing", None)
        noticed = routing is not None and routing.do_verify_policy == "score_hysteresis"
        return (
            self.savings.skip_idle_post_steps
            and self.editing.max_post_steps > 0
            and not self.editing.on
            and not noticed
        )


@dataclass(frozen=True, slots=True)
class StandardOptions(NoCacheOptions):
    """Threshold decoding with editing on cached blocks (``cached``)."""

    decoder: ClassVar[str] = "cached"

    savings: PlainSavings = field(default_factory=PlainSavings)


@dataclass(frozen=True, slots=True)
class Options(StandardOptions):
    """S2D2, the model verifying its own drafts (``ssd_policy``)."""

    decoder: ClassVar[str] = "ssd_policy"

    savings: Savings = field(default_factory=Savings)
    routing: Routing = field(default_factory=Routing)
    bandit: Bandit = field(default_factory=Bandit)
    estimation: Estimation = field(default_factory=Estimation)
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache: Cache = field(default_factory=Cache)

    def __post_init__(self):
        if self.blocks.as_bias and self.cache.cache_ver:
            raise UserError("cache_ver is True. Allowed with as_bias: false, prompts are encoded one way or the other")


# Every switch that makes a decode repeat the published code, forwards included. It never commits the last block.
NOCACHE_PUBLISHED = {"suppress_mask": False, "trim_stop_tokens": False, "as_bias": True, "skip_idle_post_steps": False}
PLAIN_PUBLISHED = {**NOCACHE_PUBLISHED, "fuse_commit": False, "reuse_draft": False}
PUBLISHED = {**PLAIN_PUBLISHED, "reuse_verify": False, "short_verify": False}

_CONSERVATIVE = {"block_length": 32, "confidence_threshold": 0.95, "editing_threshold": 0.9}
_QUALITY = {"block_length": 32, "confidence_threshold": 0.7, "editing_threshold": 0.5}
_ROUTED = {
    "do_verify_policy": "score_threshold",
    "do_verify_score_type": "difference_static",
    "score_penalty_coef": 4.0,
    "token_acceptance_estimator": "soft_entropy_negexp",
}
# The settings at which each decoder is at its best on the checkpoint in tiny/: at block length 16 and threshold 0.8 editing pays; S2D2 accepts so much that
# longer blocks pay, and its text is exactly that of block size one.
_TINY_PLAIN = {"block_length": 16, "max_new_tokens": 256, "confidence_threshold": 0.8, "editing_threshold": 0.6}
_TINY = {
    "block_length": 32,
    "max_new_tokens": 256,
    "confidence_threshold": 0.9,
    "editing_threshold": 1.0,
    "do_verify_policy": "always",
    "acceptance": "exact",
    "cache_ver": True,
    "draft_ver": True,
}
_PLAIN = {"tiny": _TINY_PLAIN, "conservative": _CONSERVATIVE, "quality": _QUALITY}

NOCACHE_PRESETS = {**_PLAIN, "published": NOCACHE_PUBLISHED}
PLAIN_PRESETS = {**_PLAIN, "published": PLAIN_PUBLISHED}
PRESETS = {
    "tiny": _TINY,
    "published": PUBLISHED,
    # A score is never below -4, so this verifies every step that has something masked.
    "conservative": {**_CONSERVATIVE, **_ROUTED, "do_verify_score_threshold": -5.0},
    "quality": {**_QUALITY, **_ROUTED, "do_verify_score_threshold": 0.0},
}

DEFAULT_PROMPT = (
    "Write a python function to remove first and last occurrence of a given character from the string. "
    "Your code should pass these tests: assert remove_Occ('hello','l') == 'heo'"
)


def plain(options: NoCacheOptions) -> StandardOptions:
    """The same settings on a cache, without speculation."""
    names = [f.name for f in fields(PlainSavings) if hasattr(options.savings, f.name)]
    return StandardOptions(
        sampling=options.sampling,
        blocks=options.blocks,
        unmask=options.unmask,
        editing=options.editing,
        runtime=options.runtime,
        savings=PlainSavings(**{name: getattr(options.savings, name) for name in names}),
    )
