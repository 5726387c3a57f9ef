"""Data parallel runs under ``torchrun``: every process decodes its share of the prompts, the first one reports for all.

Rank and world size come from the environment torchrun sets, so one GPU a process, several processes on one GPU, and CPU processes are all the same
to it. Nothing here is needed, or imported from torch.distributed, when there is one process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch

from shared.output import Output


class World(NamedTuple):
    """This process among all: ``rank`` of ``size``, the ``local`` one on this machine."""

    rank: int
    size: int
    local: int

    @classmethod
    def from_environment(cls) -> World:
        number = lambda name, default: int(os.environ.get(name, default))  # noqa: E731
        return cls(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0))

    def share(self, items: Sequence[int]) -> list[int]:
        """The items this process works on: every ``size``-th, so that all get early and late ones."""
        return [k for k in items if k % self.size == self.rank]

    def device(self, name: str) -> str:
        """``auto`` and ``cuda`` are spread over the GPUs of the machine."""
        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return name

    def gather(self, output: Output | None) -> Output | None:
        """On rank 0 the outputs of all processes as one (None on the others, or when nobody decoded anything).

        Seconds are those of the slowest process; batch forwards add up.
        """
        if self.size == 1:
            return output
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        parts: list[Output | None] = [None] * self.size
        dist.all_gather_object(parts, output)
        parts = [p for p in parts if p is not None]
        if self.rank or not parts:
            return None
        completions = sorted((c for p in parts for c in p.completions), key=lambda c: c.request)
        batch_forwards = sum((Counter(p.batch_forwards) for p in parts), Counter())
        seconds = max(p.seconds for p in parts)
        return Output(completions, seconds, dict(batch_forwards), parts[0].lossless, parts[0].lossless_reason)
