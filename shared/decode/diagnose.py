"""Finding where a forward goes wrong, after it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


def first_broken_layer(layers: Iterable[nn.Module], forward: Callable[[], object]) -> str:
    """Run ``forward`` again and name the first of ``layers`` whose output is not finite (``"the head"`` when all are)."""
    broken: list[int] = []

    def watch(number: int):
        return lambda module, args, out: None if torch.isfinite(out).all() else broken.append(number)

    handles = [layer.register_forward_hook(watch(k)) for k, layer in enumerate(layers)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return f"layer {min(broken)}" if broken else "the head"
