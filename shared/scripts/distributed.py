"""Parallel runs under ``torchrun``: every process decodes its share of the prompts, the first one reports for all.

Rank and world size come from the environment torchrun sets, so one GPU a process, several processes on one GPU, and CPU processes are all the same
to it. Processes that hold one model together (`shared.scripts.tensor_parallel`) are consecutive ranks and decode the same prompts; the first of them
leads, which means that it alone prints and writes. Nothing here is needed, or imported from torch.distributed, when there is one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from shared.errors import ToldElsewhere, UserError
from shared.output import Output
from shared.trace import add_lanes


class World(NamedTuple):
    """This process among all: ``rank`` of ``size``, the ``local`` one on this machine; ``tensor`` processes hold one model together."""

    rank: int
    size: int
    local: int
    tensor: int = 1

    @classmethod
    def from_environment(cls, tensor: int = 1) -> World:
        number = lambda name, default: int(os.environ.get(name, default))  # noqa: E731
        world = cls(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), tensor)
        if tensor < 1 or world.size % tensor:
            raise UserError(
                f"tensor_parallel {tensor} does not divide the number of processes, {world.size}. Allowed: a divisor of it "
                f"(torchrun --nproc_per_node={tensor} starts {tensor} processes)"
            )
        return world

    @property
    def replica(self) -> int:
        """Which of the models this process holds, or holds a part of."""
        return self.rank // self.tensor

    @property
    def replicas(self) -> int:
        """How many models there are."""
        return self.size // self.tensor

    @property
    def leads(self) -> bool:
        """Does this process speak for its model?"""
        return self.rank % self.tensor == 0

    def share(self, items: Sequence[int]) -> list[int]:
        """The items this process works on: every ``replicas``-th, so that all get early and late ones."""
        return [k for k in items if k % self.replicas == self.replica]

    def device(self, name: str) -> str:
        """``auto`` and ``cuda`` are spread over the GPUs of the machine."""
        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return name

    def decided(self, decide: Callable[[], Any]) -> Any:
        """What ``decide()`` gives on rank 0, the only one that calls it; the others wait for it. A `UserError` is raised on all, and told by rank 0."""
        if self.size == 1:
            return decide()
        told = [None, None]
        if self.rank == 0:
            try:
                told[0] = decide()
            except UserError as error:
                told[1] = str(error)
        _met().broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise (UserError if self.rank == 0 else ToldElsewhere)(told[1])
        return told[0]

    def gather(self, output: Output | None) -> Output | None:
        """On rank 0 the outputs of all models as one (None on the others, or when nobody decoded anything).

        Seconds are those of the slowest process; batch forwards add up. Processes of one model must have decoded the same.
        """
        if self.size == 1:
            return output
        dist = _met()
        parts: list[Output | None] = [None] * self.size
        dist.all_gather_object(parts, output)
        check_agreement(parts, self.tensor)
        parts = [p for p in parts[:: self.tensor] if p is not None]
        if self.rank or not parts:
            return None
        completions = sorted((c for p in parts for c in p.completions), key=lambda c: c.request)
        return replace(
            parts[0],
            completions=completions,
            seconds=max(p.seconds for p in parts),
            batch=add_lanes([p.batch for p in parts]),
            prefill_seconds=max(p.prefill_seconds for p in parts),
        )

    def leave(self) -> None:
        """Say goodbye to the other processes: after the last forward and `gather`. NCCL wants it."""
        if self.tensor > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def _met():
    """`torch.distributed`, where the processes have met."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return dist


def check_agreement(outputs: Sequence[Output | None], tensor: int) -> None:
    """Raise unless every ``tensor`` consecutive ranks, which hold one model together, decoded the same tokens."""
    for rank, output in enumerate(outputs):
        leader = outputs[rank - rank % tensor]
        if (output and output.tokens) != (leader and leader.tokens):
            raise RuntimeError(f"ranks {rank - rank % tensor} and {rank} hold one model and decoded different tokens")
