"""A stand-in for CUDA graphs that runs anywhere: a "replay" computes into the memory that the "capture" returned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.gpu.phases import _leaves, _state

ATEN = torch.ops.aten
# On a GPU each of these waits for the device or copies from the host, which no capture allows: a value read back, positions of a mask, a tensor
# made of a list, a number assigned through index tensors.
UNCAPTURABLE = {ATEN._local_scalar_dense, ATEN.nonzero}


class Capturing(TorchDispatchMode):
    """Raises where a capture on a GPU would."""

    def __init__(self):
        super().__init__()
        self.numbers: list[Tensor] = []  # that stand for Python numbers: on a GPU they lie on the host

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = function.overloadpacket
        refused = kind in UNCAPTURABLE
        if kind in (ATEN.index, ATEN.index_put, ATEN.index_put_):
            refused |= any(i is not None and i.dtype == torch.bool for i in args[1])
            refused |= len(args) > 2 and any(args[2] is number for number in self.numbers)
        refused |= kind == ATEN.lift_fresh and args[0].dim() > 0
        refused |= kind in (ATEN._to_copy, ATEN.to) and any(args[0] is number for number in self.numbers)
        if refused:
            raise RuntimeError(f"{function} cannot be captured")
        result = function(*args, **(kwargs or {}))
        if kind in (ATEN.scalar_tensor, ATEN.lift_fresh):
            self.numbers.append(result)
        return result


def recorder(owners: list) -> Callable:
    """A capture for the CPU. What a capture does to the state of ``owners`` is undone, as a CUDA capture runs nothing."""

    def tensors():
        return [t for _, t in _state(owners)]

    def capture(function: Callable, pool):
        before = [t.clone() for t in tensors()]
        with Capturing():
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
