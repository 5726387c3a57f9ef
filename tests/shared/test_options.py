from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import options as groups
from shared.errors import UserError
from shared.options import (
    ALIASES,
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
    coerce,
)


@dataclass(frozen=True, slots=True)
class Every(FlatOptions):
    """All groups there are."""

    sampling: Sampling = field(default_factory=Sampling)
    blocks: Blocks = field(default_factory=Blocks)
    unmask: Unmask = field(default_factory=Unmask)
    savings: Savings = field(default_factory=Savings)
    routing: Routing = field(default_factory=Routing)
    bandit: Bandit = field(default_factory=Bandit)
    estimation: Estimation = field(default_factory=Estimation)
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache: Cache = field(default_factory=Cache)
    runtime: Runtime = field(default_factory=Runtime)


@dataclass(frozen=True, slots=True)
class Few(FlatOptions):
    cache: Cache = field(default_factory=Cache)


GROUPS = list(Every.groups().values())
FIELDS = [(group, f) for group in GROUPS for f in dataclasses.fields(group)]


def test_every_group_is_covered_and_no_name_is_taken_twice():
    mine = [c for c in vars(groups).values() if dataclasses.is_dataclass(c) and c.__module__ == groups.__name__]
    bases = {base for c in mine for base in c.__mro__[1:]}
    assert {c for c in mine if c not in bases} == set(GROUPS) | {groups.Threshold}
    names = [f.name for _, f in FIELDS]
    assert len(names) == len(set(names)) == len(Every.names())
    assert all(f.metadata["help"] for _, f in FIELDS)


@st.composite
def flats(draw):
    """Some options, each with an allowed value."""
    flat = {}
    for group in GROUPS:
        hints = groups.get_type_hints(group)
        for f in dataclasses.fields(group):
            kinds = get_args(hints[f.name])
            if f.name in ("acceptance", "verify_temperature", "hysteresis_threshold_on", "hysteresis_threshold_off"):
                continue  # cross-checked: see below
            if draw(st.integers(0, 3)):
                continue
            if bool in (hints[f.name], *kinds):
                flat[f.name] = draw(st.booleans())
            elif groups.get_origin(hints[f.name]) is Literal:
                flat[f.name] = draw(st.sampled_from(kinds))
            elif f.name == "stopping_criteria_idx":
                flat[f.name] = draw(st.none() | st.lists(st.integers(0, 9), max_size=3))
            elif hints[f.name] is int or int in kinds:
                flat[f.name] = draw(st.integers(max(1, f.metadata["low"] or 1), 99))
            else:
                low = f.metadata["low"] if f.metadata["low"] is not None else f.metadata["above"]
                high = f.metadata["high"]
                exclusive = f.metadata["above"] is not None
                bounds = {"exclude_min": exclusive, "allow_nan": False, "allow_infinity": False}
                flat[f.name] = draw(st.floats(low, 5 if high is None else high, **bounds))
    return flat


@given(flats())
def test_flat_round_trip(flat):
    options = Every.from_flat(flat)
    saved = options.to_flat()
    assert {k: saved[k] for k in flat} == flat
    assert list(saved) == list(Every.names())
    assert Every.from_flat(json.loads(json.dumps(saved))) == options
    assert Every.from_flat({k: str(v) if isinstance(v, (bool, int, float)) else v for k, v in flat.items()}) == options


def test_defaults_and_nothing():
    assert Every.from_flat() == Every.from_flat({}) == Every()
    assert Every.from_flat({"top_k": 3}, top_k=4).sampling.top_k == 4


@pytest.mark.parametrize("name", ["max_new_tokens", "block_length", "confidence_threshold"])
def test_aliases_and_their_precedence(name):
    group = Every.names()[name][0]
    value = {"max_new_tokens": 7, "block_length": 7, "confidence_threshold": 0.25}[name]
    for k, spelling in enumerate(ALIASES[name]):
        later = dict.fromkeys(ALIASES[name][k + 1 :], value + 0.5 if value < 1 else value + 1)
        options = Every.from_flat({**later, spelling: value})
        assert getattr(getattr(options, group), name) == value
        assert spelling == name or spelling not in options.to_flat()


def test_the_one_stop_token_of_older_command_lines():
    for ids, want in ((5, (5,)), ("none", ()), (None, None)):
        assert Every.from_flat(stop_token=ids).blocks.stopping_criteria_idx == want


def test_published_length_precedence():
    assert Every.from_flat(gen_length=9, max_gen_toks=5).blocks.max_new_tokens == 5
    assert Every.from_flat(gen_length=9, max_new_tokens=None).blocks.max_new_tokens == 9


def test_an_alias_that_is_none():
    assert Every.from_flat({"gen_length": 128, "max_gen_toks": None}).blocks.max_new_tokens == 128
    assert Every.from_flat({"max_gen_toks": None}) == Every()
    assert Every.from_flat({"max_new_tokens": 9}, max_gen_toks="None").blocks.max_new_tokens == 9
    assert Every.from_flat({"block_length": 8}, block_size=None).blocks.block_length is None, (
        "None is a value of this one"
    )


@pytest.mark.parametrize("below", ALIASES["max_new_tokens"])
@pytest.mark.parametrize("above", ALIASES["max_new_tokens"])
def test_any_spelling_overrides_any_other(below, above):
    assert Every.from_flat({below: 9}, **{above: 16}).blocks.max_new_tokens == 16
    assert Every.from_flat({below: 9}).replace(**{above: 16}).blocks.max_new_tokens == 16


def test_do_sample_over_other_options():
    sampled = lambda below, **above: Every.from_flat(below, **above).sampling.temperature  # noqa: E731
    assert sampled({"temperature": 0.7}, do_sample=False) == 0
    assert sampled({"temperature": 0.7}, do_sample=True) == 0.7
    assert sampled({"temperature": 0.0}, do_sample=True) == 1
    assert sampled({"do_sample": False}, temperature=0.7) == 0.7
    assert sampled({"do_sample": True}, temperature=0) == 0
    assert sampled({"do_sample": True}, do_sample="false") == 0
    assert Every().replace(do_sample=True).sampling.temperature == 1


def test_an_alias_of_an_absent_group_is_unknown():
    with pytest.raises(UserError, match="unknown option 'gen_length'"):
        Few.from_flat(gen_length=3)
    with pytest.raises(UserError, match="unknown option 'temperature'"):
        Few.from_flat(temperature=1.0)


@pytest.mark.parametrize("spelling", [False, "false", 0, "no"])
def test_do_sample_false_is_temperature_zero(spelling):
    assert Every.from_flat(do_sample=spelling, temperature=0.7).sampling.temperature == 0


def test_do_sample_true_keeps_a_given_temperature():
    assert Every.from_flat(do_sample=True).sampling.temperature == 1
    assert Every.from_flat(do_sample="true", temperature=0.7).sampling.temperature == 0.7
    assert Every.from_flat(do_sample=None).sampling.temperature == 0


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("cache_ver", "true", True),
        ("cache_ver", "No", False),
        ("cache_ver", 1, True),
        ("cache_ver", 0.0, False),
        ("block_length", "8", 8),
        ("block_length", 8.0, 8),
        ("block_length", "8.0", 8),
        ("block_length", "None", None),
        ("block_length", None, None),
        ("ssd_ratio_threshold", "-1", -1.0),
        ("ssd_ratio_threshold", -1, -1.0),
        ("top_p", "1e-1", 0.1),
        ("verify_temperature", "none", None),
        ("stopping_criteria_idx", "1,2", (1, 2)),
        ("stopping_criteria_idx", "1, 2 3", (1, 2, 3)),
        ("stopping_criteria_idx", 5, (5,)),
        ("stopping_criteria_idx", 5.0, (5,)),
        ("stopping_criteria_idx", ["1", 2], (1, 2)),
        ("stopping_criteria_idx", ["1,2", "3"], (1, 2, 3)),
        ("stopping_criteria_idx", "1 2", (1, 2)),
        ("stopping_criteria_idx", "none", ()),
        ("stopping_criteria_idx", ["none"], ()),
        ("stopping_criteria_idx", None, None),
        ("stopping_criteria_idx", "", ()),
        ("stopping_criteria_idx", (), ()),
        ("do_verify_policy", "always", "always"),
    ],
)
def test_coercion(name, given, value):
    options = Every.from_flat({name: given})
    got = getattr(getattr(options, Every.names()[name][0]), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("cache_ver", "maybe", "true or false"),
        ("cache_ver", 2, "true or false"),
        ("top_k", 1.5, "int"),
        ("top_k", "many", "int"),
        ("top_k", True, "int"),
        ("top_k", float("inf"), "int"),
        ("top_k", float("nan"), "int"),
        ("min_ssd_span_length", None, "int"),
        ("temperature", "hot", "float"),
        ("temperature", False, "float"),
        ("stopping_criteria_idx", "a,b", "a list of token ids"),
        ("stopping_criteria_idx", {"eos": 1}, "a list of token ids"),
        ("stopping_criteria_idx", [1.7], "a list of token ids"),
        ("stopping_criteria_idx", 1.7, "a list of token ids"),
        ("stopping_criteria_idx", [True], "a list of token ids"),
        ("stopping_criteria_idx", "1 none", "a list of token ids"),
    ],
)
def test_values_of_another_kind(name, given, allowed):
    with pytest.raises(UserError, match=rf"{name} is .*Allowed: .*{allowed}"):
        Every.from_flat({name: given})


def test_coerce_names_the_field_and_the_value():
    with pytest.raises(UserError, match="seed is 'x'"):
        coerce("seed", "x", int)


@pytest.mark.parametrize(("group", "f"), [pytest.param(*pair, id=pair[1].name) for pair in FIELDS])
def test_ranges(group, f):
    """The bounds of every field are allowed (or, for ``above``, not), and what lies beyond them is refused by name."""
    low, high, above = (f.metadata[k] for k in ("low", "high", "above"))
    others = {"hysteresis_threshold_on": 5.0} if f.name == "hysteresis_threshold_off" else {}
    for value in (low, high):
        if value is not None:
            group(**{f.name: value}, **others)
    beyond = [None if low is None else low - 1, None if high is None else high + 1, above]
    beyond = [value for value in beyond if value is not None]
    for value in beyond:
        with pytest.raises(UserError, match=rf"{f.name} is {value}\. Allowed: (at|above)"):
            group(**{f.name: value}, **others)
    if beyond:
        with pytest.raises(UserError, match=f.name):
            group(**{f.name: math.nan}, **others)


FLOATS = [
    pair
    for pair in FIELDS
    if float in (groups.get_type_hints(pair[0])[pair[1].name], *get_args(groups.get_type_hints(pair[0])[pair[1].name]))
]


@pytest.mark.parametrize(("group", "f"), [pytest.param(*pair, id=pair[1].name) for pair in FLOATS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_are_finite(group, f, value):
    with pytest.raises(UserError, match=rf"{f.name} is {value}\. Allowed: a finite number"):
        group(**{f.name: value})


@pytest.mark.parametrize(
    ("group", "flat", "allowed"),
    [
        (Sampling, {"temperature": "hot"}, "float"),
        (Sampling, {"temperature": True}, "float"),
        (Sampling, {"top_k": 1.5}, "int"),
        (Sampling, {"top_k": None}, "int"),
        (Sampling, {"suppress_mask": 1}, "true or false"),
        (Blocks, {"stopping_criteria_idx": [1]}, "tuple"),
        (Blocks, {"stopping_criteria_idx": (1.5,)}, "tuple"),
        (Blocks, {"mask_id": "7"}, "int"),
    ],
)
def test_a_group_built_directly_checks_types(group, flat, allowed):
    (name,) = flat
    with pytest.raises(UserError, match=rf"{name} is .*\. Allowed: {allowed}"):
        group(**flat)


def test_an_integer_too_big_for_a_float():
    assert Blocks(max_new_tokens=10**400).max_new_tokens == 10**400
    with pytest.raises(UserError, match=r"temperature is 1000.*Allowed: float"):
        Every.from_flat(temperature=10**400)


def test_numbers_of_other_libraries_are_numbers():
    assert Sampling(temperature=1, top_k=np.int64(3), top_p=np.float32(0.5)).top_k == 3


@pytest.mark.parametrize(("name", "near"), [("do_verify_policy", "always"), ("acceptance", "exact")])
def test_choices(name, near):
    with pytest.raises(UserError, match=rf"unknown {name} '{near}x'; did you mean {near}\? Allowed: .*{near}"):
        Every.from_flat({name: near + "x"})


def test_choices_name_what_the_code_implements():
    from shared.policy.acceptance import ESTIMATORS

    assert set(get_args(groups.Estimator)) == set(ESTIMATORS)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"verify_temperature": 0.5, "temperature": 0.7}, "only with greedy drafts"),
        ({"hysteresis_threshold_on": 0.0, "hysteresis_threshold_off": 0.0}, "above hysteresis_threshold_off"),
        ({"hysteresis_threshold_on": -2.0}, "hysteresis_threshold_on is -2"),
        (
            {"acceptance": "exact", "allow_resample": False},
            "allow_resample is False. Allowed with acceptance exact: True",
        ),
        ({"acceptance": "exact", "ssd_ratio_tempering_factor": 2.0}, "ssd_ratio_tempering_factor is 2.0"),
    ],
)
def test_cross_checks(flat, message):
    with pytest.raises(UserError, match=message):
        Every.from_flat(flat)


def test_target_temperature():
    assert Sampling(temperature=0.7).target_temperature == 0.7
    assert Sampling(verify_temperature=0.7).target_temperature == 0.7
    assert Sampling().target_temperature == 0
    assert Sampling(verify_temperature=0.0).target_temperature == 0


def test_unknown_option_suggests():
    with pytest.raises(UserError, match="unknown option 'cache_verr'; did you mean cache_ver"):
        Every.from_flat({"cache_verr": True})
    with pytest.raises(UserError, match=r"Allowed: .*top_k.*gen_length"):
        Every.from_flat({"zzz": 1})


def test_suggestions():
    with pytest.raises(UserError) as caught:
        Every.from_flat({"block_lenght": 4})
    text = str(caught.value)
    assert "did you mean block_length or block_size?" in text
    assert text.count("confidence_threshold") == 1, "no name is told twice"
    with pytest.raises(UserError, match="did you mean do_sample"):
        Every.from_flat({"do_smaple": True})
    with pytest.raises(UserError, match="unknown option 'do_sample'"):
        Few.from_flat(do_sample=True)


def test_integers_do_not_pass_through_floats():
    for given_value in (2**53 + 1, str(2**53 + 1), np.int64(2**53 + 1)):
        assert coerce("seed", given_value, int) == 2**53 + 1
    assert coerce("seed", "1e3", int) == 1000


def test_none_is_a_text_where_a_text_is_wanted():
    assert coerce("prompt", "None", str | None) == "None"
    assert coerce("prompt", None, str | None) is None
    assert coerce("mask_id", "None", int | None) is None


def test_options_are_frozen():
    options = Every()
    for target, name in ((options, "cache"), (options.cache, "cache_ver")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, None)
    with pytest.raises((AttributeError, TypeError)):
        options.cache.cache_verr = True


def test_replace():
    base = Every.from_flat(block_length=4, stopping_criteria_idx=(3,))
    changed = base.replace(cache_ver="true", block_length=8)
    assert (changed.cache.cache_ver, changed.blocks.block_length) == (True, 8)
    assert changed.blocks.stopping_criteria_idx == (3,)
    assert (base.cache.cache_ver, base.blocks.block_length) == (False, 4)
    assert type(changed) is Every
    with pytest.raises(UserError, match="block_lengthh"):
        base.replace(block_lengthh=8)


@pytest.mark.parametrize("nothing", [None, "None", "none"])
def test_no_filter_may_be_said_by_none(nothing):
    """As the published decoders do; it overrides a preset's."""
    sampling = Every.from_flat({"top_k": 3, "top_p": 0.5}, top_k=nothing, top_p=nothing).sampling
    assert (sampling.top_k, sampling.top_p) == (0, 1.0)


@dataclass(frozen=True)
class Middle:
    __slots__ = ()
    middle: int = groups.option(2, "between", low=1)


@dataclass(frozen=True, slots=True)
class Mine(groups.Ending, Middle, groups.BlockLength, groups.Group):
    trim_stop_tokens: bool = groups.option(False, "mine")


def test_a_group_of_parts_has_their_fields_from_right_to_left_and_its_own_defaults():
    names = [f.name for f in dataclasses.fields(Mine)]
    assert names == ["block_length", "middle", *(f.name for f in dataclasses.fields(groups.Ending))]
    mine = Mine(block_length=4)
    assert (mine.middle, mine.trim_stop_tokens, mine.max_new_tokens) == (2, False, 512)
    assert not hasattr(mine, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.middle = 3
    with pytest.raises(UserError, match="middle is 0"):
        Mine(middle=0)
