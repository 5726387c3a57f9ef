"""One vocabulary of decode options: frozen groups, one way in from flat keywords, one parser.

A field's name is its command-line flag, its lm-eval ``model_args`` key and its key in result files. A family's options class
composes the groups it supports; a group that is absent means its flags do not exist there.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shared.errors import UserError, unknown_name

Strategy = Literal[
    "low_confidence_dynamic", "low_confidence_static", "sequential", "entropy_bounded", "entropy_bounded_blocksum"
]
Policy = Literal["mask_span_length", "score_threshold", "score_hysteresis", "contextual_bandit_ucb", "always", "never"]
Estimator = Literal[
    "hard_margin_threshold",
    "hard_entropy_threshold",
    "soft_confidence_power",
    "soft_clipped_linear_margin",
    "soft_entropy_negexp",
    "soft_renyi_2_entropy",
]


_hints = cache(get_type_hints)  # reading annotations takes longer than all else an options object does


def option(default, help: str, *, low: float | None = None, high: float | None = None, above: float | None = None):
    """A dataclass field with its help text and its range: ``low <= value <= high`` or ``value > above``."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "above": above})


def _unwrap(kind: Any) -> tuple[Any, bool]:
    """``X | None`` -> ``(X, True)``; any other type -> ``(itself, False)``."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    return next(k for k in get_args(kind) if k is not type(None)), True


def _is(value: Any, kind: Any) -> bool:
    """Is ``value`` of this type? An int will do for a float, a bool for neither."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(v, int) for v in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


def _named(kind: Any) -> str:
    """A type as messages call it."""
    return {bool: "true or false", str: "text"}.get(kind) or getattr(kind, "__name__", "")


def check(group) -> None:
    """Raise `UserError` unless every field of ``group`` has its type, is one of its choices and inside its range."""
    hints = _hints(type(group))
    for f in dataclasses.fields(group):
        value, (kind, nullable) = getattr(group, f.name), _unwrap(hints[f.name])
        if value is None and nullable:
            continue
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise unknown_name(f.name, str(value), get_args(kind))
        elif not _is(value, kind):
            raise UserError(f"{f.name} is {value!r}. Allowed: {_named(kind)}")
        elif kind in (int, float):
            _check_range(f, value)


def _check_range(f: dataclasses.Field, value: float) -> None:
    low, high, above = (f.metadata.get(k) for k in ("low", "high", "above"))
    inside = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    finite = isinstance(value, Integral) or math.isfinite(value)
    if inside and finite:
        return
    bounds = ["a finite number"] * (not finite) + [f"above {above}"] * (above is not None)
    bounds += [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    raise UserError(f"{f.name} is {value}. Allowed: {' and '.join(bounds)}")


@dataclass(frozen=True, slots=True)
class Group:
    """Base of a group of options: every field is checked when one is made."""

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, slots=True)
class Sampling(Group):
    temperature: float = option(0.0, "softmax temperature of drafts; 0 is greedy", low=0.0)
    top_k: int = option(
        0, "keep the k most likely tokens (ties kept); 0 keeps all. Without a temperature nothing is filtered", low=0
    )
    top_p: float = option(
        1.0,
        "keep the most likely tokens up to this mass. Without a temperature nothing is filtered",
        above=0.0,
        high=1.0,
    )
    verify_temperature: float | None = option(
        None, "temperature of verifier and estimators under greedy drafts; default: the drafts' own", low=0.0
    )
    suppress_mask: bool = option(True, "never predict the mask token")

    def __post_init__(self):
        check(self)
        if self.verify_temperature is not None and self.temperature > 0:
            raise UserError(
                f"verify_temperature is {self.verify_temperature} with temperature {self.temperature}. "
                "Allowed: only with greedy drafts (temperature 0)"
            )

    @property
    def target_temperature(self) -> float:
        """The temperature of the distribution that verification and estimators use."""
        return self.temperature if self.verify_temperature is None else self.verify_temperature


# Parts of groups, for a family to make its own group of. Their slots are those of the group: a class can have several such bases. The flags of a group
# follow its bases from right to left; a field that is declared again keeps its place.


@dataclass(frozen=True)
class BlockLength:
    __slots__ = ()
    block_length: int | None = option(None, "tokens decoded together; default: the checkpoint's block_size", low=1)


@dataclass(frozen=True)
class Ending:
    __slots__ = ()
    max_new_tokens: int = option(512, "generate at most this many tokens", low=1)
    mask_id: int | None = option(None, "mask token id; default: config, then tokenizer, then the released one", low=0)
    stopping_criteria_idx: tuple[int, ...] | None = option(
        None, "token ids that end the text; default: generation config, then config, then tokenizer"
    )
    trim_stop_tokens: bool = option(True, "cut the output before the first stop token, not after it")


@dataclass(frozen=True)
class Steps:
    __slots__ = ()
    denoising_steps: int | None = option(
        None, "steps that share out a block's tokens; default: block_length", low=1, high=65536
    )


@dataclass(frozen=True, slots=True)
class Blocks(Ending, Steps, BlockLength, Group):
    mask_id: int | None = option(None, "mask token id; default: config, then tokenizer", low=0)
    trim_stop_tokens: bool = option(True, "cut the output before the first stop token")
    round_to_blocks: bool = option(False, "return whole blocks, past max_new_tokens (as published)")


@dataclass(frozen=True, slots=True)
class Threshold(Group):
    confidence_threshold: float = option(0.9, "every draft above this confidence is taken", low=0.0, high=1.0)


@dataclass(frozen=True, slots=True)
class Unmask(Group):
    remasking_strategy: Strategy = option("low_confidence_dynamic", "which masked positions a step fills")
    confidence_threshold: float = option(0.85, "a draft above this confidence may be kept", low=0.0, high=1.0)
    eb_threshold: float = option(0.35, "entropy a step may spend (entropy_bounded strategies), in nats", above=0.0)


@dataclass(frozen=True, slots=True)
class Routing(Group):
    do_verify_policy: Policy = option("mask_span_length", "when a drafted span is verified")
    min_ssd_span_length: int = option(1, "shortest span worth verifying (mask_span_length)", low=1)
    legacy_ssd_span_strategy: bool = option(
        False, "also verify a shorter span while few masked positions are confident"
    )
    do_verify_score_threshold: float = option(0.0, "verify from this score on (score_threshold)")
    hysteresis_threshold_on: float = option(0.0, "start verifying above this score (score_hysteresis)")
    hysteresis_threshold_off: float = option(-1.0, "stop verifying below this score (score_hysteresis)")
    do_verify_score_type: Literal["difference_dynamic", "difference_static"] = option(
        "difference_dynamic", "expected accepted length less c x confident positions (dynamic) or less c (static)"
    )
    score_penalty_coef: float = option(2.0, "c of the score: the price of a verify forward, in tokens")

    def __post_init__(self):
        check(self)
        if self.hysteresis_threshold_on <= self.hysteresis_threshold_off:
            raise UserError(
                f"hysteresis_threshold_on is {self.hysteresis_threshold_on}. "
                f"Allowed: above hysteresis_threshold_off ({self.hysteresis_threshold_off})"
            )


@dataclass(frozen=True, slots=True)
class Bandit(Group):
    ucb_beta: float = option(1.0, "width of the confidence bound (contextual_bandit_ucb)", low=0.0)
    ucb_span_length_bins: int = option(2, "context bins for the span's length", low=1)
    ucb_block_progress_bins: int = option(2, "context bins for the block's progress", low=1)
    ucb_entropy_bins: int = option(2, "context bins for the draft's entropy", low=1)
    ucb_entropy_source: Literal["span", "masked"] = option("span", "positions whose entropy the context averages")


@dataclass(frozen=True, slots=True)
class Estimation(Group):
    token_acceptance_estimator: Estimator = option("hard_margin_threshold", "how likely a drafted token is accepted")
    ssd_confidence_margin_threshold: float = option(0.05, "t of hard_margin_threshold")
    ssd_entropy_threshold: float = option(0.1, "t of hard_entropy_threshold, in units of ln V")
    ssd_confidence_power: float = option(0.8, "exponent of soft_confidence_power", low=0.0)
    ssd_confidence_margin_coef: float = option(1.0, "slope of soft_clipped_linear_margin")
    ssd_entropy_temperature: float = option(1.0, "T of soft_entropy_negexp")


@dataclass(frozen=True, slots=True)
class Acceptance(Group):
    acceptance: Literal["published", "exact"] = option(
        "published", "exact preserves the verifier's distribution (and greedy text); published is the paper's rule"
    )
    allow_resample: bool = option(
        True, "replace the first rejected token; otherwise its draft is kept (Fast-dLLM v2: it stays masked)"
    )
    ssd_ratio_tempering_factor: float = option(1.0, "exponent of the acceptance ratio q/p", above=0.0)
    ssd_ratio_threshold: float = option(-1.0, "also take later drafts with at least this ratio; negative is off")
    ssd_threshold_all_spans: bool = option(False, "ssd_ratio_threshold looks at the whole block, not only the span")
    always_check_high_confidence: bool = option(False, "also take every draft above confidence_threshold")

    @property
    def least_confidence(self) -> float | None:
        """A draft that is not above this confidence is rejected (None: by the verifier alone)."""
        return None

    @property
    def least_target(self) -> float | None:
        """A rejected draft is replaced only where the verifier gives it at least this probability (None: always)."""
        return None

    @property
    def least_run(self) -> int:
        """Does somebody ask which drafts would be accepted by themselves, past a rejection? Runs of at least this many of them (0: nobody)."""
        return 0

    def __post_init__(self):
        check(self)
        if self.acceptance == "exact":
            for name, needed in (("allow_resample", True), ("ssd_ratio_tempering_factor", 1.0)):
                if getattr(self, name) != needed:
                    raise UserError(f"{name} is {getattr(self, name)}. Allowed with acceptance exact: {needed}")


@dataclass(frozen=True, slots=True)
class Cache(Group):
    cache_ver: bool = option(False, "commit blocks token-causally, so that cached keys are the verifier's own")
    draft_ver: bool = option(False, "known tokens of the block attend causally while drafting")


@dataclass(frozen=True, slots=True)
class LastCommit(Group):
    """Switches that change how many forwards a text costs, never the text."""

    skip_last_commit: bool = option(True, "the last block of a text is not committed: nothing will read it")


@dataclass(frozen=True, slots=True)
class CommitSavings(LastCommit):
    """The same where a commit can share a forward with a draft."""

    fuse_commit: bool = option(True, "a finished block is committed in the forward of the next block's first draft")


@dataclass(frozen=True, slots=True)
class Savings(CommitSavings):
    """The same where spans are verified."""

    reuse_verify: bool = option(True, "with cache_ver, a verify that saw the final tokens of a block is its commit")
    short_verify: bool = option(True, "verify the block up to the span's end, with mask queries for the span only")


@dataclass(frozen=True, slots=True)
class Runtime(Group):
    """How forwards are run; the text is the same up to rounding."""

    fast: bool | None = option(None, "the family's GPU kernels; default: where they can run")
    graphs: bool | None = option(None, "CUDA graphs of the fast forward; default: where they can run")


# Other spellings of a field, accepted wherever flat keywords are. An earlier name in a row wins over a later one.
ALIASES = {
    "max_new_tokens": ("max_new_tokens", "max_gen_toks", "gen_length"),
    "block_length": ("block_length", "block_size"),
    "small_block_length": ("small_block_length", "small_block_size"),
    "stopping_criteria_idx": ("stopping_criteria_idx", "stop_token", "eos_id"),
    "confidence_threshold": ("confidence_threshold", "threshold"),
}

_NONE = (None, "None", "none")
_TRUE, _FALSE = {"true", "yes", "t", "y", "1"}, {"false", "no", "f", "n", "0"}


class FlatOptions:
    """Base of a family's options class: a frozen dataclass whose fields are groups."""

    __slots__ = ()

    @classmethod
    def groups(cls) -> dict[str, type]:
        return {f.name: _hints(cls)[f.name] for f in dataclasses.fields(cls)}

    @classmethod
    def names(cls) -> dict[str, tuple[str, Any]]:
        """Field name -> (name of its group, its type), in order."""
        return {n: (g, t) for g, group in cls.groups().items() for n, t in _hints(group).items()}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any] | None = None, **more):
        """Options from flat keywords over the defaults, ``more`` over ``flat``. An unknown key raises with a suggestion.

        ``do_sample=False`` means temperature 0; ``do_sample=True`` means temperature 1 unless its own mapping names a temperature or the one
        below has one above 0.
        """
        return cls.from_layers(flat or {}, more)

    @classmethod
    def from_layers(cls, *layers: Mapping[str, Any]):
        """Options from any number of mappings over the defaults, later ones over earlier ones, whatever spelling each uses."""
        names, by_group = cls.names(), {}
        for key, value in cls._layered(*layers).items():
            by_group.setdefault(names[key][0], {})[key] = value
        return cls(**{g: kind(**by_group.get(g, {})) for g, kind in cls.groups().items()})

    @classmethod
    def _layered(cls, *layers: Mapping[str, Any]) -> dict[str, Any]:
        """Later layers over earlier ones. Each is made canonical first, so that any spelling overrides any other."""
        merged: dict[str, Any] = {}
        for layer in map(cls._canonical, layers):
            do_sample = layer.pop("do_sample", None)
            merged |= layer
            if do_sample is False:
                merged["temperature"] = 0.0
            elif do_sample and "temperature" not in layer:
                merged["temperature"] = merged.get("temperature") or 1.0
        return merged

    @classmethod
    def _canonical(cls, flat: Mapping[str, Any]) -> dict[str, Any]:
        """``flat`` with every option under its own name and of its own type, and ``do_sample``, a bool, if it was there."""
        flat, names = dict(flat), cls.names()
        for name, spellings in ALIASES.items():
            given = [flat.pop(s) for s in spellings if s in flat] if name in names else []
            # A list of ids says "no ids" by none; for anything else none is "not given".
            is_list = bool(given) and get_origin(_unwrap(names[name][1])[0]) is tuple
            value = next((v for v in given if (v is not None if is_list else v not in _NONE)), None)
            if value is not None or (given and _unwrap(names[name][1])[1]):
                flat[name] = value
        kinds = {name: kind for name, (_, kind) in names.items()}
        if "temperature" in names:
            kinds["do_sample"] = bool | None
        for key in flat:
            if key not in kinds:
                raise unknown_name(
                    "option", key, [*kinds, *(s for n, row in ALIASES.items() if n in names for s in row)]
                )
        # The published decoders say "no filter" by None.
        unfiltered = {"top_k": 0, "top_p": 1.0}
        flat = {k: unfiltered[k] if k in unfiltered and v in _NONE else v for k, v in flat.items()}
        return {key: coerce(key, value, kinds[key]) for key, value in flat.items()}

    def to_flat(self) -> dict[str, Any]:
        """Every option by its flat name, as plain JSON data."""
        return {
            n: list(v) if isinstance(v := getattr(getattr(self, g), n), tuple) else v
            for n, (g, _) in self.names().items()
        }

    def replace(self, **flat):
        """A copy with some options changed."""
        return type(self).from_flat(self.to_flat(), **flat)


def coerce(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind``; accepts what command lines and lm-eval produce (``"true"``, ``-1.0`` for an int, one id for a tuple).

    ``"none"`` is None where a number or a bool may be None, no ids where a list of ids is wanted, and a text where a text is.
    """
    kind, nullable = _unwrap(kind)
    is_list = get_origin(kind) is tuple
    if nullable and (value is None or (value in ("None", "none") and kind is not str and not is_list)):
        return None
    if get_origin(kind) is Literal:
        return str(value)
    try:
        if is_list:
            return _token_ids(value)
        if kind is bool:
            return _bool(value)
        if isinstance(value, bool) or (value is None and kind is str):
            raise ValueError
        return _int(value) if kind is int else kind(value)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        wanted = "a list of token ids" if is_list else _named(kind)
        raise UserError(f"{name} is {value!r}. Allowed: {wanted}") from error


def _bool(value: Any) -> bool:
    if isinstance(value, str):
        return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[value.lower()]
    if value not in (0, 1):
        raise ValueError
    return bool(value)


def _int(value: Any) -> int:
    """An integer, also one written as a float; others never pass through a float, which rounds above 2**53."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, (str, Integral)):
        with suppress(ValueError):
            return int(value)
    if float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def _token_ids(value: Any) -> tuple[int, ...]:
    """Ids from ``5``, ``[1, 2]``, ``"1, 2 3"``, or what a command line makes of them (``["1,2", "3"]``); none from ``"none"`` and ``""``."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    words = [w for item in items for w in (item.replace(",", " ").split() if isinstance(item, str) else [item])]
    return () if words in (["none"], ["None"]) else tuple(map(_int, words))
