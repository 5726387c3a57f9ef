"""Outputs of chosen decoder layers of one forward, for drafters that are conditioned on their target (D2SD, DFlash)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.errors import UserError


class Features:
    """A sink for the outputs of ``layers``, numbered from 0: ``model(ids, positions, features=sink)`` fills it, ``sink.hidden`` reads it.

    The output of a layer is the residual stream behind its MLP; the last layer's is taken before the final norm. A layer may be listed twice. Every
    forward replaces what the one before it left.
    """

    def __init__(self, layers: Sequence[int]):
        self.layers = tuple(layers)
        for layer in self.layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
                raise UserError(f"features of layer {layer!r}: no such layer. Allowed: whole numbers, at least 0")
        if not self.layers:
            raise UserError("features of no layer at all. Allowed: one or more layers")
        self._taken: dict[int, Tensor] = {}

    def start(self, layer_count: int) -> None:
        """A forward through ``layer_count`` layers begins: forget the last one. `UserError` if it lacks a layer."""
        if beyond := [layer for layer in self.layers if layer >= layer_count]:
            raise UserError(f"features of layer {beyond[0]}: no such layer. Allowed: 0 to {layer_count - 1}")
        self._taken = {}

    def take(self, layer: int, x: Tensor) -> None:
        """Called behind every layer with its output ``x [B, T, H]``. It is copied: a forward may go on in place, and a graph be replayed."""
        if layer in self.layers:
            self._taken[layer] = x.clone()

    def of(self, layer: int) -> Tensor:
        """``[B, T, H]``: the output of one of ``layers``, where it was taken to."""
        if layer not in self._taken:
            raise RuntimeError(f"features of layer {layer} are read before a forward filled them")
        return self._taken[layer]

    @property
    def hidden(self) -> Tensor:
        """``[K, B, T, H]`` in the order of ``layers``, a new tensor; every entry of the batch, whatever gets logits."""
        return torch.stack([self.of(layer) for layer in self.layers])
