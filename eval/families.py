"""The families the evaluation knows: one entry each, imported when it is first asked for."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shared.errors import UserError, unknown_name
from shared.network import scoring
from shared.network.loading import checkpoint_folder


@dataclass(frozen=True, slots=True)
class Decoder:
    """``module:function`` decodes, ``options`` is its options class and ``presets`` a table of settings, both in ``options_module``."""

    module: str
    function: str
    options_module: str
    options: str
    presets: str

    @property
    def generate(self):
        return getattr(importlib.import_module(self.module), self.function)

    @property
    def options_class(self):
        return getattr(importlib.import_module(self.options_module), self.options)

    def preset(self, name: str) -> dict:
        presets = getattr(importlib.import_module(self.options_module), self.presets)
        if name not in presets:
            raise unknown_name("preset", name, presets)
        return presets[name]


@dataclass(frozen=True, slots=True)
class Family:
    """``model_type`` is that of its checkpoints' config.json. The first decoder is the default one. ``scoring`` names the function of `shared.network.scoring`
    that fits the network; ``folder`` is where the shipped checkpoint stands."""

    model_module: str
    model: str
    model_type: str
    folder: str
    scoring: str
    decoders: dict[str, Decoder]

    @property
    def model_class(self):
        return getattr(importlib.import_module(self.model_module), self.model)

    @property
    def scores(self):
        return getattr(scoring, self.scoring)

    @property
    def shipped(self) -> str:
        return str(Path(importlib.import_module(self.folder).__file__).parent / "tiny")


FAMILIES = {
    "SDAR": Family(
        "sdar.modeling_sdar",
        "SDARForCausalLM",
        "sdar",
        "sdar",
        "block_size_one_scores",
        {
            "ssd_policy": Decoder("sdar.generate_ssd_policy", "block_diffusion_generate", "sdar.options", "Options", "PRESETS"),
            "standard": Decoder("sdar.generate", "block_diffusion_generate", "sdar.options", "StandardOptions", "PLAIN_PRESETS"),
        },
    ),
    "Fast-dLLM-v2": Family(
        "fast_dllm_v2.modeling_fast",
        "Fast_dLLM_QwenForCausalLM",
        "Fast_dLLM_Qwen",
        "fast_dllm_v2",
        "next_token_scores",
        {
            "ssd_policy": Decoder("fast_dllm_v2.generate_policy_utils", "generate_ssd_policy", "fast_dllm_v2.options", "Options", "PRESETS"),
            "ssd": Decoder("fast_dllm_v2.generate_utils", "generate_ssd", "fast_dllm_v2.options", "Options", "SSD_PRESETS"),
            "fast": Decoder("fast_dllm_v2.generate_utils", "generate_fast", "fast_dllm_v2.options", "StandardOptions", "PLAIN_PRESETS"),
        },
    ),
    "LLaDA2": Family(
        "llada2.modeling_llada2_moe",
        "LLaDA2MoeModelLM",
        "llada2_moe",
        "llada2",
        "block_size_one_scores",
        {
            "ssd_policy": Decoder("llada2.generate_policy_utils", "generate_ssd_policy", "llada2.options", "Options", "PRESETS"),
            "cached": Decoder("llada2.generate_utils", "generate_cached", "llada2.options", "StandardOptions", "PLAIN_PRESETS"),
            "nocache": Decoder("llada2.generate_utils", "generate_nocache", "llada2.options", "NoCacheOptions", "NOCACHE_PRESETS"),
        },
    ),
}  # fmt: skip


def family_named(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown_name("family", name, FAMILIES)
    return FAMILIES[name]


@cache
def fingerprint(pretrained: str) -> tuple:
    """What tells the weights under a path from those that stood there before: name, size and time of each file."""
    folder = checkpoint_folder(pretrained)
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())


def family_of_checkpoint(pretrained: str) -> str:
    """The family whose ``model_type`` the checkpoint's config.json names."""
    found = json.loads((checkpoint_folder(pretrained) / "config.json").read_text()).get("model_type")
    for name, family in FAMILIES.items():
        if family.model_type == found:
            return name
    known = ", ".join(f"{f.model_type} ({n})" for n, f in FAMILIES.items())
    raise UserError(f"pretrained {pretrained!r} is of model_type {found!r}. Allowed: {known}; or give family=")


def split_target(key: str, target: str) -> tuple[Path, str]:
    """``path.py:name`` -> the file, which must be there, and the name."""
    path, _, name = str(target).rpartition(":")
    if not name or not Path(path).is_file():
        raise UserError(f"{key} {target!r}: no such file or no name after it. Allowed: PATH.py:NAME")
    return Path(path).resolve(), name


def decoder_in_file(target: str) -> tuple[str, str] | None:
    """``(family, decoder)`` if ``path.py:function`` is one of ours, None for a user's own file."""
    path, function = split_target("custom_generate", target)
    own: dict[str, tuple[str, str]] = {}
    for name, family in FAMILIES.items():
        for decoder, entry in family.decoders.items():
            if path == _file(entry.module):
                own[entry.function] = name, decoder
    if own and function not in own:
        raise unknown_name(f"function of {path.name}", function, own)
    return own.get(function)


def family_of_class(target: str) -> str:
    """The family whose network ``path.py:Class`` is."""
    path, wanted = split_target("custom_model_class", target)
    for name, family in FAMILIES.items():
        if (path, wanted) == (_file(family.model_module), family.model):
            return name
    known = ", ".join(f"{_file(f.model_module)}:{f.model}" for f in FAMILIES.values())
    raise UserError(f"custom_model_class {target!r} is none of this repository's networks. Allowed: {known}")


def _file(module: str) -> Path:
    return Path(importlib.import_module(module).__file__).resolve()
