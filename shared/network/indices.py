"""Small lists of integers on the device, uploaded once: the same rows step through a decode many times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Indices:
    """``indices([0, 2]) -> tensor [2]`` (long) on the device. The tensors are shared: nobody may write to them, and ``never_written`` says so."""

    KEPT = 512  # lists remembered

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, values: Sequence[int]) -> Tensor:
        key = tuple(values)
        if key not in self._kept:
            if len(self._kept) >= self.KEPT:
                self._kept.clear()
            self._kept[key] = torch.tensor(key, dtype=torch.long).to(self.device)
            self._kept[key].never_written = True
        return self._kept[key]
