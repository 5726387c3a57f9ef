"""The configuration of a decoder network, and what is wrong with one, said in a line that names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from transformers import PretrainedConfig

from shared.network.rotary import scaling_kind

# rope_type: the values it needs, and those it may have besides.
_SCALINGS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}


class DecoderConfig(PretrainedConfig):
    """Fields of a decoder. A family adds its own to the tables; unknown keys of released configs are kept and ignored.

    ``defaults``: field -> what the released code takes where config.json has none. ``num_key_value_heads`` null is as many as heads, ``head_dim`` null is
    ``usual_head_dim``, or ``hidden_size / heads`` where the family has none. ``attribute_map`` (transformers) maps these names to a checkpoint's own.
    """

    family: str = "this repository's"
    usual_head_dim: int | None = None
    defaults: ClassVar[dict[str, object]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "mask_token_id": None,
        "tie_word_embeddings": False,
    }

    # What `problem` checks: the only value served, the least of a whole number (or null), numbers above 0, and true or false.
    fixed: ClassVar[dict[str, object]] = {"hidden_act": "silu", "use_sliding_window": False}
    least: ClassVar[dict[str, int]] = {
        "vocab_size": 1,
        "hidden_size": 1,
        "intermediate_size": 1,
        "num_hidden_layers": 0,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 1,
        "max_position_embeddings": 1,
    }
    least_or_null: ClassVar[dict[str, int]] = {"mask_token_id": 0}
    positive: Iterable[str] = ("initializer_range", "rms_norm_eps", "rope_theta")
    booleans: Iterable[str] = ("tie_word_embeddings",)

    def __init__(self, **given):
        for name, value in self.defaults.items():
            setattr(self, name, given.pop(name, value))
        super().__init__(tie_word_embeddings=given.pop("tie_word_embeddings", self.tie_word_embeddings), **given)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.usual_head_dim
        if self.head_dim is None and _is_count(self.hidden_size, 1) and _is_count(self.num_attention_heads, 1):
            self.head_dim = self.hidden_size // self.num_attention_heads

    def problem(self) -> str | None:
        """Why a network cannot be built from these values (None: it can)."""
        return (
            self._unlike_released()
            or self.too_small(self.least)
            or self._wrong_kind()
            or self._heads_problem()
            or self._rotary_problem()
            or self._scaling_problem()
        )

    def name_of(self, field: str) -> str:
        """What config.json calls ``field``."""
        return self.attribute_map.get(field, field)

    def too_small(self, least: Mapping[str, int]) -> str | None:
        """The first of these fields that is no whole number of at least that size."""
        for name, low in least.items():
            if not _is_count(getattr(self, name), low):
                return f"{self.name_of(name)} is {getattr(self, name)!r}. Allowed: a whole number, at least {low}"
        return None

    def _unlike_released(self) -> str | None:
        for name, value in self.fixed.items():
            if getattr(self, name) != value:
                found = f"{self.name_of(name)} {getattr(self, name)!r}"
                return f"{found} is not supported; released {self.family} checkpoints have {value!r}"
        return None

    def _wrong_kind(self) -> str | None:
        for name, low in self.least_or_null.items():
            value = getattr(self, name)
            if value is not None and not _is_count(value, low):
                return f"{self.name_of(name)} is {value!r}. Allowed: null, or a whole number, at least {low}"
        for name in self.positive:
            if not _is_positive(getattr(self, name)):
                return f"{self.name_of(name)} is {getattr(self, name)!r}. Allowed: a number above 0"
        for name in self.booleans:
            if not isinstance(getattr(self, name), bool):
                return f"{self.name_of(name)} is {getattr(self, name)!r}. Allowed: true, false"
        return None

    def _heads_problem(self) -> str | None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            names = self.name_of("num_attention_heads"), self.name_of("num_key_value_heads")
            return f"{names[0]} {heads} is not a multiple of {names[1]} {kv_heads}"
        return None

    def _rotary_problem(self) -> str | None:
        factor = getattr(self, "partial_rotary_factor", 1.0)
        if not _is_positive(factor) or factor > 1:
            return f"partial_rotary_factor is {factor!r}. Allowed: above 0, at most 1"
        width = int(self.head_dim * factor)
        if width < 2 or width % 2:
            return (
                f"partial_rotary_factor {factor} of head_dim {self.head_dim} rotates {width} channels. "
                "Allowed: an even number, at least 2"
            )
        return None

    def _scaling_problem(self) -> str | None:
        scaling = self.rope_scaling
        if scaling is None or scaling == {}:
            return None
        if not isinstance(scaling, dict):
            return f"rope_scaling is {scaling!r}. Allowed: null, or an object with rope_type"
        kind = scaling_kind(scaling)
        if kind not in list(_SCALINGS):
            return f"rope_scaling has rope_type {kind!r}. Allowed: {', '.join(_SCALINGS)}"
        needed, possible = _SCALINGS[kind]
        for name in needed:
            if not _is_positive(scaling.get(name)):
                return f"rope_scaling has {name} {scaling.get(name)!r}. Allowed: a number above 0"
        for name in set(scaling) - {"rope_type", "type", *needed}:
            if name not in possible:
                return f"rope_scaling has {name}, which {kind} does not use. Allowed: {', '.join((*needed, *possible))}"
            if scaling[name] is not None and not _is_positive(scaling[name]):
                return f"rope_scaling has {name} {scaling[name]!r}. Allowed: null, or a number above 0"
        return self._yarn_problem(scaling) if kind == "yarn" else None

    def _yarn_problem(self, scaling: dict) -> str | None:
        """transformers takes the ratio of the two lengths where the original one is given, and never looks at ``factor``."""
        if "original_max_position_embeddings" not in scaling:
            return None
        original, longest = scaling["original_max_position_embeddings"], self.max_position_embeddings
        if original is not None and original * scaling["factor"] == longest:
            return None
        return (
            f"rope_scaling has factor {scaling['factor']} and original_max_position_embeddings {original}, but "
            f"{self.name_of('max_position_embeddings')} is {longest}. Allowed: the product of the two"
        )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
