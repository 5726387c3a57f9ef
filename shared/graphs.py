"""CUDA graphs of a forward: captured once per shape, replayed with new inputs.

The runner wraps a forward and never a loop. It knows no family: a forward is any
``forward(input_ids, position_ids, rows, local_mask, logits_at, slots) -> logits`` that reads nothing back to the host
and writes nothing for a row index of -1. Shapes that were not captured run eagerly, in the same line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One graph: ``batch`` rows of ``tokens`` tokens, prefixes up to ``slots``, ``picks`` logits a row (0: all)."""

    batch: int
    tokens: int
    slots: int
    picks: int = 0


def best_fit(shapes: Iterable[Shape], wanted: Shape) -> Shape | None:
    """The smallest captured shape that can serve ``wanted``: same tokens and picks, no fewer rows and slots."""
    able = [
        s
        for s in shapes
        if (s.tokens, s.picks) == (wanted.tokens, wanted.picks) and s.batch >= wanted.batch and s.slots >= wanted.slots
    ]
    return min(able, key=lambda s: (s.batch, s.slots), default=None)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor | None]
    logits: Tensor


class GraphRunner:
    """Replays ``forward`` where a captured shape serves, calls it where none does.

    The logits of a replay are overwritten by the next replay of any shape: the graphs share one memory pool.
    """

    def __init__(self, forward: Forward, device: torch.device | str):
        self.forward = forward
        self.device = torch.device(device)
        self.captured: dict[Shape, _Captured] = {}
        self._pool = None

    @torch.inference_mode()
    def capture(self, shapes: Iterable[Shape]) -> None:
        """Capture ``shapes``, largest first, so that the smaller ones fit in memory the larger ones have reserved."""
        for shape in sorted(set(shapes), key=lambda s: (s.batch * s.tokens, s.slots, s.picks), reverse=True):
            self.captured[shape] = self._capture(shape)

    def _capture(self, shape: Shape) -> _Captured:
        inputs = self._buffers(shape)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.forward(**inputs, slots=shape.slots)  # compiles kernels; its rows are all -1, so it writes nothing
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self.forward(**inputs, slots=shape.slots)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, logits)

    def _buffers(self, shape: Shape) -> dict[str, Tensor | None]:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.long, device=self.device)

        b, t = shape.batch, shape.tokens
        return {
            "input_ids": zeros(b, t),
            "position_ids": zeros(b, t),
            "rows": zeros(b) - 1,
            "local_mask": torch.ones(b, t, t, dtype=torch.bool, device=self.device),
            "logits_at": zeros(b, shape.picks) if shape.picks else None,
        }

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        local_mask: Tensor | None = None,
        logits_at: Tensor | None = None,
        *,
        slots: int,
    ) -> Tensor:
        """Logits ``[b, T or picks, V]``. ``rows [b]`` index the cache (-1: padding); ``slots``: the longest prefix."""
        batch, tokens = input_ids.shape
        wanted = Shape(batch, tokens, slots, 0 if logits_at is None else logits_at.shape[1])
        shape = best_fit(self.captured, wanted)
        if shape is None:
            return self.forward(input_ids, position_ids, rows, local_mask, logits_at, slots)
        captured = self.captured[shape]
        given = (input_ids, position_ids, rows, True if local_mask is None else local_mask, logits_at)
        for buffer, value in zip(captured.inputs.values(), given, strict=True):
            if buffer is not None:
                buffer[:batch] = value
        captured.inputs["rows"][batch:] = -1
        captured.graph.replay()
        return captured.logits[:batch]
