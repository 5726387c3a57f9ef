"""Options of the MDLM-DVD decoders, as plain data. Names are those of LLaDA, DVD and DualDiffusion where they have one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.errors import UserError
from shared.options import Ending, FlatOptions, Group, Runtime, check, option

AcceptRule = Literal["all", "threshold", "exact", "disagreement", "topk_sets"]


@dataclass(frozen=True, slots=True)
class Region(Ending, Group):
    max_new_tokens: int = option(256, "masks behind the prompt, all of which are decoded (--gen_length)", low=1)
    block_length: int | None = option(None, "decode the region in blocks of this many tokens; default: whole", low=1)
    truncate_at_eos: bool = option(True, "stop tokens end a text; false: the whole region is decoded and returned")

    @property
    def ends_anywhere(self) -> bool:
        """Texts need no whole blocks."""
        return True


@dataclass(frozen=True, slots=True)
class Sampling(Group):
    temperature: float = option(0.0, "softmax temperature of predictions; 0 is greedy", low=0.0)
    cfg_scale: float = option(0.0, "classifier-free guidance, which costs a second forward; 0 is off", low=0.0)


@dataclass(frozen=True, slots=True)
class Unmask(Group):
    """Which masked positions a step of a model alone fills (Nie et al. 2025, algorithms 4 and 5)."""

    steps: int | None = option(None, "steps that share out the region's tokens; default: one a token", low=1)
    confidence_threshold: float | None = option(
        None, "take every prediction above this probability instead of a share a step; default: off", low=0.0, high=1.0
    )
    remasking: Literal["low_confidence", "random", "max_logit"] = option(
        "low_confidence", "what predictions are ranked by: probability, chance, or their logit (DVD)"
    )
    logits_eos_inf: bool = option(False, "never predict the end of the text (eos_token_id)")
    confidence_eos_eot_inf: bool = option(False, "take the ends of the text and of the turn last")
    eos_token_id: int | None = option(None, "end of the text; default: config", low=0)
    eot_token_id: int | None = option(None, "end of the turn; default: the other stop token", low=0)


@dataclass(frozen=True, slots=True)
class VerifierOptions(FlatOptions):
    """One model alone (``llada``)."""

    region: Region = field(default_factory=Region)
    sampling: Sampling = field(default_factory=Sampling)
    unmask: Unmask = field(default_factory=Unmask)
    runtime: Runtime = field(default_factory=Runtime)

    @property
    def blocks(self) -> Region:
        """What the other families call it."""
        return self.region


@dataclass(frozen=True, slots=True)
class Steps(Group):
    steps: int | None = option(None, "steps that share out the region's tokens; default: one a token", low=1)


@dataclass(frozen=True, slots=True)
class PublishedThreshold(Group):
    threshold: float = option(0.5, "keep a proposal from this probability of the verifier's on", low=0.0)


@dataclass(frozen=True, slots=True)
class StepOptions(FlatOptions):
    """The published algorithms: both models once a step (``top_k_intersection``, ``baseline_cascade``)."""

    region: Region = field(default_factory=Region)
    unmask: Steps = field(default_factory=Steps)
    runtime: Runtime = field(default_factory=Runtime)

    @property
    def blocks(self) -> Region:
        return self.region


@dataclass(frozen=True, slots=True)
class ThresholdOptions(StepOptions):
    """``threshold_verifier``."""

    acceptance: PublishedThreshold = field(default_factory=PublishedThreshold)


@dataclass(frozen=True, slots=True)
class Draft(Group):
    draft_steps: int = option(1, "forwards of the drafter a round", low=0)
    draft_threshold: float = option(
        0.0,
        "each takes every prediction above this probability in the first open block, the likeliest at least",
        low=0.0,
        high=1.0,
    )
    draft_cache: bool = option(True, "a drafter that attends block by block keeps what is finished in a cache")


@dataclass(frozen=True, slots=True)
class Acceptance(Group):
    accept: AcceptRule = option("exact", "which drafts the verifier keeps (verification_algos.ACCEPT_RULES)")
    accept_threshold: float = option(0.5, "p of the rules threshold and disagreement", low=0.0)
    set_size: int = option(5, "k of topk_sets: 1 is an exact match, the vocabulary's size the verifier alone", low=1)
    min_prob: float = option(0.0, "least probability of a token that topk_sets commits", low=0.0, high=1.0)
    fill_threshold: float | None = option(
        0.9, "the verify also writes its own predictions above this probability; none: only where it must", low=0.0
    )
    verify_mode: Literal["ordered", "visible", "leave_out", "queried"] = option(
        "ordered",
        "what the verifier sees of the draft it judges: the tokens before (as at block size one); all; all but a group; all but that token",
    )
    verify_groups: int = option(4, "leave_out: forwards, each without its share of the drafts", low=1)
    max_iterations: int | None = option(None, "rounds, after which the verifier alone fills the rest", low=1)


@dataclass(frozen=True, slots=True)
class CascadeOptions(FlatOptions):
    """``cascade`` and ``topk_sets``: several cached steps of the drafter, then one verify."""

    region: Region = field(default_factory=Region)
    unmask: Steps = field(default_factory=Steps)
    draft: Draft = field(default_factory=Draft)
    acceptance: Acceptance = field(default_factory=Acceptance)
    runtime: Runtime = field(default_factory=Runtime)

    @property
    def blocks(self) -> Region:
        return self.region


@dataclass(frozen=True, slots=True)
class Lookahead(Group):
    lookahead: int = option(4, "states of the verifier's decode that a round proposes", low=1)
    draft_with: Literal["drafter", "verifier"] = option(
        "drafter", "who proposes them: the drafter, one forward a state, or the verifier's last prediction, for nothing"
    )
    draft_cache: bool = option(True, "a drafter that attends block by block keeps what is finished in a cache")


@dataclass(frozen=True, slots=True)
class ExactUnmask(Unmask):
    def __post_init__(self):
        check(self)
        if self.confidence_threshold is not None or self.remasking == "random":
            name = "remasking" if self.confidence_threshold is None else "confidence_threshold"
            raise UserError(
                f"{name} is {getattr(self, name)}. Allowed with verify_exact: a decode in fixed steps, by confidence"
            )


@dataclass(frozen=True, slots=True)
class ExactOptions(FlatOptions):
    """``verify_exact``: the verifier's own greedy decode, several of its steps a pass."""

    region: Region = field(default_factory=Region)
    unmask: ExactUnmask = field(default_factory=ExactUnmask)
    lookahead: Lookahead = field(default_factory=Lookahead)
    runtime: Runtime = field(default_factory=Runtime)

    @property
    def blocks(self) -> Region:
        return self.region


_TINY = {"max_new_tokens": 128, "block_length": 32}
PUBLISHED = {"truncate_at_eos": False}

VERIFIER_PRESETS = {
    "tiny": _TINY,
    "published": PUBLISHED,
    # Evaluation settings of LLaDA-8B-Instruct (its EVAL.md): pure diffusion, a token a step.
    "llada-gsm8k": {"max_new_tokens": 512, "confidence_eos_eot_inf": True},
    "llada-math": {"max_new_tokens": 512, "confidence_eos_eot_inf": True},
    "llada-humaneval": {"max_new_tokens": 512, "logits_eos_inf": True},
    "llada-mbpp": {"max_new_tokens": 256, "confidence_eos_eot_inf": True},
    "llada-gpqa": {"max_new_tokens": 64, "confidence_eos_eot_inf": True},
    "llada-gsm8k-blocks": {"max_new_tokens": 256, "block_length": 8},
    "llada-math-blocks": {"max_new_tokens": 512, "block_length": 64},
}
STEP_PRESETS = {"tiny": {"max_new_tokens": 128}, "published": PUBLISHED}
CASCADE_PRESETS = {"tiny": _TINY}
EXACT_PRESETS = {"tiny": _TINY}
