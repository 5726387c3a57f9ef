"""Decode options of the D2F family and the settings of the papers, as plain data. Defaults are those of the published script."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.errors import UserError
from shared.options import Acceptance as CommonAcceptance
from shared.options import (
    Bandit,
    BlockLength,
    Ending,
    Estimation,
    FlatOptions,
    Group,
    Routing,
    Runtime,
    option,
)
from shared.options import Cache as CommonCache
from shared.options import Sampling as CommonSampling


@dataclass(frozen=True, slots=True)
class Sampling(CommonSampling):
    top_p_first: bool = option(
        False, "filter by top_p before top_k, and confidences at temperature 0 as well (as published)"
    )


@dataclass(frozen=True, slots=True)
class Blocks(Ending, BlockLength, Group):
    block_length: int = option(32, "tokens a block, counted from the prompt's end", low=1)
    max_new_tokens: int = option(256, "generate at most this many tokens", low=1)
    max_length: int | None = option(
        None, "most tokens of prompt and text together; default: what the network has positions for", low=1
    )
    floor_to_blocks: bool = option(
        False, "no part of a block: max_new_tokens // block_length blocks (as published); otherwise the last one is cut"
    )
    truncate_at_eos: bool = option(True, "stop tokens end a text; false: there are none, whatever else says so")

    @property
    def ends_anywhere(self) -> bool:
        """The last block is cut to the text, so that may take every position there is."""
        return True


@dataclass(frozen=True, slots=True)
class Pipeline(Group):
    """When a further block joins those in flight (Wang et al. 2025, D2F, section 3.3)."""

    block_add_threshold: float = option(
        0.5, "a block of masks is added once this share of the newest is decided", low=0.0, high=1.0
    )
    decoded_token_threshold: float = option(
        0.8, "a block goes on in every step once this share of the block before it is decided", low=0.0, high=1.0
    )
    max_blocks_in_flight: int | None = option(
        None, "no block is added to that many; default: as many as there are", low=1
    )
    attention: Literal["block", "full"] = option(
        "block", "full: no mask at all, which is what the published code runs on Dream"
    )


@dataclass(frozen=True, slots=True)
class Unmask(Group):
    skip_threshold: float = option(0.9, "every draft above this confidence is taken", low=0.0, high=1.0)
    margin_confidence: bool = option(False, "drafts are ranked by the margin to the second most likely token")
    neg_entropy: bool = option(False, "drafts are ranked by negative entropy")

    @property
    def confidence_threshold(self) -> float:
        """What the other families call it."""
        return self.skip_threshold


@dataclass(frozen=True, slots=True)
class PlainSavings(Group):
    """Switches that change how many forwards a text costs, never the text."""

    end_early: bool = option(True, "a text ends once all before its stop token is decided, whatever is still in flight")


@dataclass(frozen=True, slots=True)
class Savings(PlainSavings):
    """The same where spans are verified."""

    short_verify: bool = option(True, "verify up to the span's end, with mask queries for the span only")


@dataclass(frozen=True, slots=True)
class StandardOptions(FlatOptions):
    """Several blocks in flight and a threshold (``d2f``)."""

    sampling: Sampling = field(default_factory=Sampling)
    blocks: Blocks = field(default_factory=Blocks)
    pipeline: Pipeline = field(default_factory=Pipeline)
    unmask: Unmask = field(default_factory=Unmask)
    savings: PlainSavings = field(default_factory=PlainSavings)
    runtime: Runtime = field(default_factory=Runtime)


@dataclass(frozen=True, slots=True)
class Acceptance(CommonAcceptance):
    target_block_size: int = option(1, "tokens that the verifier decodes together; 1 is autoregressive", low=1)
    min_tokens_per_step: int = option(
        1, "tokens each block that goes on gains at least in a step; exact acceptance forces none", low=1
    )
    ssd_partial_ar_span: int = option(
        0,
        "from a text's second step on, runs of at least this many accepted drafts past a rejection are taken; 0: none",
        low=0,
    )
    ssd_threshold_draft_confidence: bool = option(False, "reject drafts that are not above draft_confidence_threshold")
    draft_confidence_threshold: float | None = option(None, "see there; default: skip_threshold", low=0.0, high=1.0)
    verify_confidence_threshold: float | None = option(
        None,
        "replace a rejected draft only where the verifier gives it at least this probability; otherwise it stays masked",
        low=0.0,
        high=1.0,
    )

    def __post_init__(self):
        CommonAcceptance.__post_init__(self)
        if self.acceptance == "exact":
            for name, needed in (("verify_confidence_threshold", None), ("min_tokens_per_step", 1)):
                if getattr(self, name) != needed:
                    raise UserError(f"{name} is {getattr(self, name)}. Allowed with acceptance exact: {needed}")

    @property
    def least_confidence(self) -> float | None:
        return self.draft_confidence_threshold if self.ssd_threshold_draft_confidence else None

    @property
    def least_target(self) -> float | None:
        return self.verify_confidence_threshold

    @property
    def least_run(self) -> int:
        return self.ssd_partial_ar_span


@dataclass(frozen=True, slots=True)
class Cache(CommonCache):
    cache_ver: bool = option(False, "cache finished blocks token-causally, so that cached keys are the verifier's own")
    draft_ver: bool = option(False, "known tokens of blocks in flight attend causally while drafting")
    cache_ver_is_noop: bool = option(False, "cache_ver and draft_ver change nothing (as published)")

    @property
    def causal_cache(self) -> bool:
        return self.cache_ver and not self.cache_ver_is_noop

    @property
    def causal_drafts(self) -> bool:
        return self.draft_ver and not self.cache_ver_is_noop


@dataclass(frozen=True, slots=True)
class Options(StandardOptions):
    """S2D2, the model verifying its own drafts (``ssd``)."""

    savings: Savings = field(default_factory=Savings)
    routing: Routing = field(default_factory=Routing)
    bandit: Bandit = field(default_factory=Bandit)
    estimation: Estimation = field(default_factory=Estimation)
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache: Cache = field(default_factory=Cache)


# Every switch that makes a decode repeat the published code, forwards included.
PLAIN_PUBLISHED = {"suppress_mask": False, "top_p_first": True, "floor_to_blocks": True, "end_early": False}
PUBLISHED = {**PLAIN_PUBLISHED, "short_verify": False, "cache_ver_is_noop": True}
# Dream never received its mask there.
_DREAM = {"attention": "full"}

# Evaluation settings of the D2F paper's scripts, by backend and task; decoded_token_threshold and skip_threshold are the same but for one.
_PAPER = {"decoded_token_threshold": 0.95, "skip_threshold": 0.9}
_TASKS = {
    "llada-gsm8k": {"max_new_tokens": 512, "block_length": 64, "block_add_threshold": 0.7},
    "llada-mbpp": {"max_new_tokens": 512, "block_length": 32, "block_add_threshold": 0.9},
    "llada-math": {"max_new_tokens": 512, "block_length": 32, "block_add_threshold": 0.1},
    "llada-humaneval": {"max_new_tokens": 512, "block_length": 32, "block_add_threshold": 0.1},
    "dream-gsm8k": {"max_new_tokens": 256, "block_length": 32, "block_add_threshold": 0.1},
    "dream-mbpp": {"max_new_tokens": 256, "block_length": 48, "block_add_threshold": 0.1},
    "dream-math": {"max_new_tokens": 256, "block_length": 64, "block_add_threshold": 0.1},
    "dream-humaneval": {"max_new_tokens": 256, "block_length": 32, "block_add_threshold": 0.9, "skip_threshold": 0.95},
}
_PAPER_PRESETS = {name: {**_PAPER, **values} for name, values in _TASKS.items()}

_TINY_PLAIN = {
    "block_length": 8,
    "max_new_tokens": 256,
    "block_add_threshold": 0.5,
    "decoded_token_threshold": 0.8,
    "skip_threshold": 0.99,
}
_TINY = {
    "block_length": 32,
    "max_new_tokens": 256,
    "block_add_threshold": 0.5,
    "skip_threshold": 0.9,
    "do_verify_policy": "always",
    "acceptance": "exact",
    "cache_ver": True,
    "draft_ver": True,
}

PLAIN_PRESETS = {
    "tiny": _TINY_PLAIN,
    "published": PLAIN_PUBLISHED,
    "published-dream": PLAIN_PUBLISHED | _DREAM,
    **_PAPER_PRESETS,
}
PRESETS = {
    "tiny": _TINY,
    "published": PUBLISHED,
    "published-dream": PUBLISHED | _DREAM,
    # What the S2D2 authors advise for Dream, whose verifier never got its mask in their code.
    "dream-advice": {
        "allow_resample": False,
        "ssd_threshold_draft_confidence": True,
        "draft_confidence_threshold": 0.5,
    },
    **_PAPER_PRESETS,
}

# Problems that --prompt names in angle brackets.
PROMPTS = {
    "<dog>": (
        "Olivia has 10 dogs. Each of them needs half an hour of walking and play a day. "
        "How many hours does she spend on her dogs in a week?"
    ),
    "<lily>": "Lily runs 12 km an hour for 4 hours, then 6 km an hour. How far has she come after 8 hours?",
    "<quantum>": "Explain in plain words what a quantum computer does differently.",
    "<count>": "Count from 1000 down to 1.",
    "<code>": "Write a Python function that returns the n largest numbers of a list, the largest first.",
}
DEFAULT_PROMPT = PROMPTS["<dog>"]


def plain(options: Options) -> StandardOptions:
    """The same settings without speculation."""
    savings = PlainSavings(options.savings.end_early)
    return StandardOptions(options.sampling, options.blocks, options.pipeline, options.unmask, savings, options.runtime)
