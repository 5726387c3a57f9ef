"""LoRA adapters in the layout of PEFT, merged into the weights of the network they were trained on: ``W + (alpha / r) B A``.

An adapter belongs to one base: laid on another of the same shape it loads without complaint and the texts get worse. So names are compared.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import UserError
from shared.network.loading import CheckpointModel, checkpoint_folder, naming_damage, read_json

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)")
# What is not merged as described above, and the values that say it is not there.
_UNSERVED = {
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
}


@dataclass(frozen=True, slots=True)
class LoRA:
    """What adapter_config.json says. ``scale`` is alpha / r, ``targets`` end the names of the modules that have an adapter, ``base`` is the network it
    was trained on (None: not told)."""

    folder: Path
    scale: float
    rank: int
    targets: tuple[str, ...]
    base: str | None

    @classmethod
    def read(cls, source: str | Path) -> LoRA:
        """From a folder or hub id; `UserError` where it is none, or of a kind that is not served."""
        folder = checkpoint_folder(source, holds=_CONFIG)
        config = read_json(folder / _CONFIG)
        if config.get("peft_type") != "LORA":
            raise UserError(f"{folder}: peft_type is {config.get('peft_type')!r}. Allowed: 'LORA'")
        for name, absent in _UNSERVED.items():
            if config.get(name) not in absent:
                raise UserError(f"{folder}: {name} is {config[name]!r}. Allowed: {absent[-1]!r}, a plain LoRA adapter")
        rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
            raise UserError(f"{folder}: r is {rank!r} and lora_alpha {alpha!r}. Allowed: two numbers, r at least 1")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise UserError(f"{folder}: target_modules is {targets!r}. Allowed: a list of module names")
        return cls(folder, alpha / rank, rank, tuple(targets), config.get("base_model_name_or_path") or None)

    def covers(self, module: str) -> bool:
        """Has a module of this name an adapter?"""
        return any(module == target or module.endswith(f".{target}") for target in self.targets)

    def tensors(self) -> dict[str, Tensor]:
        """The weights, by name without PEFT's prefix."""
        if not (self.folder / _WEIGHTS).is_file():
            raise UserError(f"{self.folder}: no {_WEIGHTS} (other weight formats are not loaded)")
        with naming_damage(self.folder), safe_open(self.folder / _WEIGHTS, framework="pt") as file:
            return {key.removeprefix(_PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def base_names(source: str | Path, model: CheckpointModel) -> set[str]:
    """What the base is known as: the hub id it was asked for by, the name in its config, the name of its folder in the hub's cache."""
    names = {
        getattr(model.config, "_name_or_path", "") or "",
        *("/".join(m) for m in _HUB_CACHE.findall(str(model.folder))),
    }
    if not Path(source).is_dir():
        names.add(str(source))
    return {
        name for name in names if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).is_dir()
    }


def check_base(lora: LoRA, source: str | Path, model: CheckpointModel) -> None:
    """Raise `UserError` where the adapter was trained on another network than ``model``, loaded from ``source``; warn where that cannot be told."""
    beside = (lora.folder / lora.base).resolve() if lora.base else None
    if beside is not None and beside.is_dir():
        same, known = beside == model.folder.resolve(), True
    else:
        names = base_names(source, model)
        same, known = lora.base in names, bool(names) and lora.base is not None
    if known and not same:
        raise UserError(
            f"adapter {lora.folder} was trained on {lora.base!r}, not on {str(source)!r}. "
            "Allowed: its own base, or --force_adapter"
        )
    if not known:
        warnings.warn(f"adapter {lora.folder}: whether {source} is its base ({lora.base}) cannot be told", stacklevel=3)


@torch.no_grad()
def merge(model: CheckpointModel, lora: LoRA) -> None:
    """Add the adapter to the weights of ``model``, in float32, rounded once. `UserError` unless it has exactly the modules it says."""
    left = lora.tensors()
    for name, weight in model.named_parameters():
        module, _, kind = model.checkpoint_key(name).rpartition(".")
        if kind != "weight" or not lora.covers(module):
            continue
        parts = [left.pop(f"{module}.lora_{half}.weight", None) for half in "AB"]
        shapes = [(lora.rank, weight.shape[1]), (weight.shape[0], lora.rank)]
        for half, part, shape in zip("AB", parts, shapes, strict=True):
            if part is None or tuple(part.shape) != shape:
                found = "missing" if part is None else list(part.shape)
                raise UserError(f"{lora.folder}: {module}.lora_{half}.weight is {found}, {list(shape)} is needed")
        a, b = (part.to(weight.device, torch.promote_types(weight.dtype, torch.float32)) for part in parts)
        weight.copy_(weight.to(a.dtype) + lora.scale * (b @ a))
    if left:
        raise UserError(f"{lora.folder}: the adapter has tensors this model has no place for: {min(left)}")


class Adaptable:
    """For a `CheckpointModel` that takes an adapter: ``from_pretrained(base, adapter=...)``. ``adapter`` is then its folder."""

    adapter: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        adapter: str | Path | None = None,
        force_adapter: bool = False,
        **how: object,
    ):
        """The network with ``adapter`` merged, a folder or hub id (None: the base alone). ``force_adapter``: on whatever base. The rest as in
        `CheckpointModel.from_pretrained`."""
        lora = None if adapter is None else LoRA.read(adapter)
        model = super().from_pretrained(path_or_id, **how)
        if lora is not None:
            if not force_adapter:
                check_base(lora, path_or_id, model)
            merge(model, lora)
            model.adapter = lora.folder
        return model

    @classmethod
    def check_pretrained(cls, path_or_id: str | Path, *, adapter: str | Path | None = None, **how: object):
        """Raise the `UserError` that `from_pretrained` would, without reading a weight; the network on meta."""
        lora = None if adapter is None else LoRA.read(adapter)
        model = super().check_pretrained(path_or_id, **how)
        if lora is not None:
            check_base(lora, path_or_id, model)
        return model


def save_adapter(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Write an adapter: ``state`` by the checkpoint's names of its modules, ``config`` as adapter_config.json has it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {_PREFIX + k: t.contiguous().cpu() for k, t in state.items()}, folder / _WEIGHTS, metadata={"format": "pt"}
    )
    (folder / _CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}, indent=2) + "\n")
