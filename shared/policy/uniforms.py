"""Random numbers as data: a table of uniforms per row, filled on the CPU, with a cursor per row.

A row's numbers depend on (seed, request) alone, so a text does not change with batch order, batch size or device. Tests put
recorded numbers in through the same door.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shared.network.memory import check_room


def request_uniforms(seed: int, request: int, count: int) -> np.ndarray:
    """The first ``count`` uniforms of a request, float32 in [0, 1) on a grid of 2**-24 (Philox, keyed by seed and request)."""
    bits = np.random.Generator(np.random.Philox(key=[seed, request])).integers(0, 1 << 24, size=count, dtype=np.uint32)
    return (bits * np.float64(2.0**-24)).astype(np.float32)


class Uniforms:
    """``[rows, capacity]`` uniforms on ``device``; ``cursor [rows]`` is how many each row has used."""

    STATE: ClassVar[tuple[str, ...]] = ("table", "cursor")

    def __init__(
        self,
        rows: int,
        capacity: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        recorded: Sequence[Sequence[float]] | None = None,
        room: int = 0,
    ):
        """``room``: allocate for at least this many numbers a row."""
        self.seed, self.capacity, self.recorded = seed, capacity, recorded
        numbers = max(1, capacity, room)
        allowed = "fewer texts at a time (batch_size), shorter ones, fewer denoising_steps"
        check_room(f"{numbers} random numbers for each of {rows} texts", 4 * rows * numbers, device, allowed)
        self.table = torch.zeros(rows, numbers, device=device)
        self.cursor = torch.zeros(rows, dtype=torch.long, device=device)

    def assign(self, row: int, request: int) -> None:
        """Give ``row`` the numbers of ``request`` (the recorded ones where there are any), from the start."""
        if self.recorded is None:
            numbers = torch.from_numpy(request_uniforms(self.seed, request, self.capacity))
        else:
            numbers = torch.tensor(self.recorded[request], dtype=torch.float32)
            if len(numbers) > self.table.shape[1]:
                raise ValueError(
                    f"request {request} brings {len(numbers)} uniforms, the table holds {self.table.shape[1]}"
                )
        self.table[row, : len(numbers)] = numbers.to(self.table.device)
        self.cursor[row] = 0

    def available(self, request: int) -> int:
        """How many numbers ``request`` has; a decode that used more is a broken invariant, checked when it ends."""
        return self.capacity if self.recorded is None else len(self.recorded[request])

    def take(self, rows: Tensor, width: int, used: Tensor | int) -> Tensor:
        """The next ``width`` numbers of ``rows [b]`` -> ``[b, width]``; then move their cursors by ``used`` (``[b]`` or int)."""
        at = self.cursor[rows][:, None] + torch.arange(width, device=rows.device)
        numbers = self.table[rows[:, None], at.clamp(max=self.table.shape[1] - 1)]
        self.cursor[rows] += used
        return numbers

    def at(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """The uniforms of ``rows [b]`` by number, ``[b, n]`` for ``numbers [b, n]``; cursors stay. For decoders in which each emitted token uses one,
        numbered by its position in the text."""
        return self.table[rows[:, None], numbers]
