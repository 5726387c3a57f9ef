"""LoRA in training (Hu et al. 2022): a low-rank term beside frozen linear layers, saved in the layout of PEFT (`shared.network.adapters`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.family import shipped_folder
from shared.network.adapters import save_adapter
from shared.network.loading import CheckpointModel
from shared.options import Group, option

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # the layers' attention
BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Lora(Group):
    lora_r: int = option(28, "rank of the adapter, and its alpha (published: 32)", low=1)
    lora_dropout: float = option(0.0, "dropout before the adapter (published: 0.1)", low=0.0, high=0.9)
    lr: float = option(2e-3, "learning rate (published: 1e-5 for LLaDA-8B, 5e-6 for Dream-7B)", above=0.0)
    weight_decay: float = option(0.05, "of AdamW", low=0.0)
    clip: float = option(1.0, "largest norm of the gradient", above=0.0)


class Adapted(nn.Module):
    """``linear``, frozen, plus ``B A`` (alpha is the rank, so nothing scales it). With ``on`` false it is the linear layer alone."""

    def __init__(self, linear: nn.Linear, rank: int, dropout: float, generator: torch.Generator):
        super().__init__()
        self.linear, self.dropout, self.on = linear, nn.Dropout(dropout), True
        device, bound = linear.weight.device, linear.in_features**-0.5
        down = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(down.to(device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if not self.on:
            return out
        low = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)
        return out + F.linear(low, self.lora_B).to(out.dtype)


def adapt(model: CheckpointModel, options: Lora, seed: int) -> None:
    """Freeze ``model`` and lay an adapter on its attention: A random, B zero, so that nothing changes yet."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            model.set_submodule(name, Adapted(module, options.lora_r, options.lora_dropout, generator))


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within it the network is its base."""
    modules = adapted(model).values()
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True


def optimizers(model: nn.Module, options: Lora) -> list[torch.optim.Optimizer]:
    """AdamW over the adapter."""
    learned = [p for p in model.parameters() if p.requires_grad]
    fused = learned[0].is_cuda
    return [torch.optim.AdamW(learned, options.lr, betas=BETAS, weight_decay=options.weight_decay, fused=fused)]


def base_name(base: str, folder: Path) -> str:
    """What the adapter in ``folder`` calls its base: the way from there, or a hub id."""
    local = Path(base) if Path(base).is_dir() else shipped_folder(base)
    return base if local is None else os.path.relpath(local.resolve(), folder.resolve())


def save(model: CheckpointModel, base: str, folder: Path, options: Lora) -> None:
    """The adapter of ``model`` in bfloat16, under the checkpoint's names of its layers."""
    state, targets = {}, set()
    for name, module in adapted(model).items():
        key = model.checkpoint_key(f"{name}.weight").rpartition(".")[0]
        targets.add(key.rpartition(".")[2])
        for half in ("lora_A", "lora_B"):
            state[f"{key}.{half}.weight"] = getattr(module, half).detach().bfloat16()
    config = {
        "base_model_name_or_path": base_name(base, folder),
        "r": options.lora_r,
        "lora_alpha": options.lora_r,
        "lora_dropout": options.lora_dropout,
        "bias": "none",
        "target_modules": sorted(targets),
    }
    save_adapter(folder, state, config)
