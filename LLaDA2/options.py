"""Decode options of the LLaDA2 family. Defaults are those of the published scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.errors import UserError
from shared.options import Estimation, FlatOptions, Routing, Sampling, check, option


@dataclass(frozen=True, slots=True)
class Canvas:
    decoder: Literal["nocache", "cached", "ssd_policy"] = option("cached", "the decoder; ssd_policy is S2D2")
    block_length: int = option(32, "tokens decoded together", low=1)
    max_new_tokens: int = option(512, "generate at most this many tokens", low=1)
    mask_id: int | None = option(None, "mask token id; default: the checkpoint's", low=0)
    eos_id: int | None = option(None, "token id that ends the text; default: the checkpoint's", low=0)
    eos_early_stop: bool = option(True, "stop after the block that holds the end token")
    as_bias: bool = option(False, "add the 0/1 block-causal mask to the scores instead of masking (as published)")

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, slots=True)
class Editing:
    confidence_threshold: float = option(0.7, "a masked position above this confidence is filled", low=0.0)
    num_to_transfer: int = option(1, "fill at least this many masked positions a step", low=1)
    editing_threshold: float = option(
        0.5, "another token above this confidence replaces a known one; above 1: never", low=0.0
    )
    max_post_steps: int = option(0, "forwards that may still edit a block after its last mask is gone", low=0)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, slots=True)
class Speculation:
    ssd_ratio_tempering_factor: float = option(1.0, "exponent of the acceptance ratio q/p", above=0.0)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, slots=True)
class Options(FlatOptions):
    """What `reference.py` decodes by; the last three groups matter to ``ssd_policy`` alone."""

    sampling: Sampling = field(default_factory=Sampling)
    canvas: Canvas = field(default_factory=Canvas)
    editing: Editing = field(default_factory=Editing)
    routing: Routing = field(default_factory=Routing)
    estimation: Estimation = field(default_factory=Estimation)
    speculation: Speculation = field(default_factory=Speculation)

    def __post_init__(self):
        if self.routing.do_verify_policy == "contextual_bandit_ucb":
            raise UserError(
                "do_verify_policy is 'contextual_bandit_ucb'. Allowed in this family so far: mask_span_length, "
                "score_threshold, score_hysteresis, always, never"
            )
