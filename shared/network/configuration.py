"""The configuration of a decoder network, and what is wrong with one, said in a line that names the field.

Both generations of config.json are read, here alone: ``torch_dtype``, ``rope_theta`` and ``rope_scaling``, and since transformers 5 ``dtype`` and
``rope_parameters``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from transformers import PretrainedConfig

from shared.network.rotary import scaling_kind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_DTYPE_FIELDS = ("torch_dtype", "dtype")
_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")  # beside the scaling, in ``rope_parameters``

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
        given["rope_scaling"] = _scaling(given.get("rope_scaling"))
        given |= {k: v for k, v in _rope_fields(given.get("rope_parameters")).items() if given.get(k) is None}
        quantized = given.pop("quantization_config", None)
        if quantized is not None:  # transformers cannot show a config where it is no object
            given["quantization_config"] = quantized if isinstance(quantized, dict) else {"quant_method": quantized}
        dtypes = {name: given.pop(name) for name in _DTYPE_FIELDS if given.get(name) is not None}
        for name, value in self.defaults.items():
            setattr(self, name, given.pop(name, value))
        super().__init__(tie_word_embeddings=given.pop("tie_word_embeddings", self.tie_word_embeddings), **given)
        self._set_dtype(dtypes)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.usual_head_dim
        if self.head_dim is None and _is_count(self.hidden_size, 1) and _is_count(self.num_attention_heads, 1):
            self.head_dim = self.hidden_size // self.num_attention_heads

    def problem(self) -> str | None:
        """Why a network cannot be built from these values (None: it can)."""
        return (
            self._dtype_problem()
            or self._layers_problem()
            or self._rope_parameters_problem()
            or self._unlike_released()
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

    def _set_dtype(self, given: Mapping[str, object]) -> None:
        """``torch_dtype`` from either of its names; values that are no dtype of ours stay as they are, and `problem` names them."""
        read = {name: named_dtype(value) for name, value in given.items()}
        if len(set(read.values())) == 1 and None not in read.values():
            self.torch_dtype = next(iter(read.values()))
            return
        for name, value in given.items():
            setattr(self, name, str(value))  # transformers writes what is no text wrongly

    def _dtype_problem(self) -> str | None:
        found = {name: getattr(self, name, None) for name in _DTYPE_FIELDS}
        found = {name: value for name, value in found.items() if value is not None}
        for name, value in found.items():
            if named_dtype(value) is None:
                return f"{name} is {value!r}. Allowed: null, {', '.join(DTYPES)}"
        if len({named_dtype(value) for value in found.values()}) > 1:
            both = f"torch_dtype is {found['torch_dtype']!r} and dtype {found['dtype']!r}"
            return f"{both}. Allowed: one of them, or the same"
        return None

    def _layers_problem(self) -> str | None:
        """Weights and layers of a kind that no network here has."""
        if (quantized := getattr(self, "quantization_config", None)) is not None:
            kind = quantized.get("quant_method")
            return f"quantization_config is there ({kind!r}). Allowed: none, quantized weights are not served"
        kinds = getattr(self, "layer_types", None)
        if kinds is not None and not (isinstance(kinds, list) and all(k == "full_attention" for k in kinds)):
            other = next((k for k in kinds if k != "full_attention"), kinds) if isinstance(kinds, list) else kinds
            return f"layer_types has {other!r}. Allowed: full_attention in every layer"
        return None

    def _rope_parameters_problem(self) -> str | None:
        parameters = getattr(self, "rope_parameters", None)
        if parameters is None:
            return None
        if not isinstance(parameters, dict):
            return f"rope_parameters is {parameters!r}. Allowed: null, or an object with rope_type and rope_theta"
        for name, value in parameters.items():
            if isinstance(value, dict):
                return f"rope_parameters has {name}, an object. Allowed: one rotary embedding for all layers"
        for name, value in _rope_fields(parameters).items():
            if (found := getattr(self, name, None)) != value:
                return f"{name} is {found!r}, rope_parameters has {value!r}. Allowed: one of them, or the same"
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
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if self.eos_token_id is not None and not all(_is_count(i, 0) for i in ends):
            return (
                f"eos_token_id is {self.eos_token_id!r}. Allowed: null, a whole number, at least 0, or a list of them"
            )
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


def named_dtype(value: object) -> torch.dtype | None:
    """The dtype that ``"float16"``, ``"torch.float16"`` or ``torch.float16`` names; None for any other value."""
    return DTYPES.get(str(value).removeprefix("torch."))


def _rope_fields(parameters: object) -> dict[str, object]:
    """What ``rope_parameters`` says, in the fields of before transformers 5."""
    if not isinstance(parameters, dict):
        return {}
    fields = {name: parameters[name] for name in _ROPE_FIELDS if parameters.get(name) is not None}
    return fields | {"rope_scaling": _scaling({k: v for k, v in parameters.items() if k not in _ROPE_FIELDS})}


def _scaling(given: object) -> object:
    """A ``rope_scaling``, which is None where its kind is the default and it says nothing else."""
    plain = isinstance(given, dict) and scaling_kind(given) == "default" and not set(given) - {"rope_type", "type"}
    return None if plain else given


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
