"""A stand-in for CUDA graphs that runs anywhere: a "replay" computes into the memory that the "capture" returned."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from shared.phases import _leaves


def recorder(owners: list) -> Callable:
    """A capture for the CPU. What a capture does to the state of ``owners`` is undone, as a CUDA capture runs nothing."""

    def tensors():
        return [t for owner in owners for t in vars(owner).values() if isinstance(t, Tensor)]

    def capture(function: Callable, pool):
        before = [t.clone() for t in tensors()]
        result = function()
        for tensor, value in zip(tensors(), before, strict=True):
            tensor.copy_(value)
        memory = [t for t in _leaves(result) if isinstance(t, Tensor)]

        def replay() -> None:
            for kept, new in zip(memory, [t for t in _leaves(function()) if isinstance(t, Tensor)], strict=True):
                once = tuple(
                    slice(0, 1) if stride == 0 else slice(None) for stride in kept.stride()
                )  # of an expanded one
                kept[once].copy_(new[once])

        return replay, result, (0, 0)

    return capture
