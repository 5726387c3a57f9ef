"""CUDA graphs of a forward: captured once per shape, replayed with new inputs.

The runner wraps a forward and never a loop. It knows no family: a forward is any
``forward(input_ids, position_ids, rows, prefixes, local_mask, logits_at, logit_rows) -> logits`` that reads nothing back to the host and writes
nothing for a row index of -1; for windows that are not plain it is given ``offsets`` and ``width`` too. Shapes that were not captured run
eagerly, in the same line.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

Forward = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One graph: ``logit_rows`` entries that get logits and ``commit_rows`` that only write, of ``tokens`` tokens each; ``picks`` logits an entry (0: all).

    ``width``: local slots of a window that is not plain (0: plain). ``lasting``: its logits outlast replays of shapes that are not lasting.
    """

    logit_rows: int
    tokens: int
    picks: int = 0
    commit_rows: int = 0
    width: int = 0
    lasting: bool = field(default=False, compare=False)

    @property
    def logits(self) -> int:
        """Positions that get logits."""
        return self.logit_rows * (self.picks or self.tokens)


def best_fit(shapes: Iterable[Shape], wanted: Shape) -> Shape | None:
    """The smallest captured shape that can serve ``wanted``: same tokens, picks and width, no fewer entries of either kind."""
    able = [
        s
        for s in shapes
        if (s.tokens, s.picks, s.width) == (wanted.tokens, wanted.picks, wanted.width)
        and s.logit_rows >= wanted.logit_rows
        and s.commit_rows >= wanted.commit_rows
    ]
    return min(able, key=lambda s: (s.logit_rows + s.commit_rows, s.commit_rows), default=None)


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``: the batch sizes worth a graph."""
    return sorted({min(1 << k, most) for k in range(most.bit_length() + 1)})


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes ``device`` the current one: Triton's launches and the capture of a graph go there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _stream(device: int, purpose: str) -> torch.cuda.Stream:
    """One for each GPU and purpose: torch's own stream for captures lies on the GPU of the first, and cuBLAS keeps 32 MB for every stream it has worked on."""
    return torch.cuda.Stream(device)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: tuple[int, int] | None) -> Iterator[None]:
    """A capture into ``graph`` that no garbage collection falls into: freeing an older graph in the middle of it would end it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_stream(torch.cuda.current_device(), "capture")):
            yield
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor | None]
    logits: Tensor


class GraphRunner:
    """Replays ``forward`` where a captured shape serves, calls it where none does.

    All graphs share one memory pool. Their logits go to one buffer for ``lasting`` shapes and one for the others, so the logits of a replay last
    until the next replay of their kind: a draft's survive the verify that follows it.
    """

    def __init__(self, forward: Forward, device: torch.device | str):
        self.forward = forward
        self.device = torch.device(device)
        self.captured: dict[Shape, _Captured] = {}
        self.seconds = 0.0  # spent capturing
        self.replays: Counter[Shape] = Counter()
        self._pool: tuple[int, int] | None = None
        self._logits: dict[bool, Tensor] = {}  # lasting, not lasting

    @torch.inference_mode()
    def capture(self, shapes: Iterable[Shape]) -> None:
        """Capture ``shapes``, those with most logits first, so that the smaller ones fit in memory that the larger ones have reserved."""
        began = time.perf_counter()
        missing = set(shapes) - set(self.captured)
        with on_device(self.device):
            for shape in sorted(missing, key=lambda s: (s.logits, s.commit_rows, s.tokens), reverse=True):
                self.captured[shape] = self._capture(shape)
        self.seconds += time.perf_counter() - began

    def _capture(self, shape: Shape) -> _Captured:
        inputs, fixed = self._buffers(shape), {"logit_rows": shape.logit_rows}
        if shape.width:
            fixed["width"] = shape.width
        stream = _stream(torch.cuda.current_device(), "warm up")
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            # Compiles kernels; its rows are all -1, so it writes nothing.
            logits = self.forward(**inputs, **fixed)
            buffer = self._logits.get(shape.lasting)
            if buffer is None or buffer.numel() < logits.numel():
                self._logits[shape.lasting] = torch.empty_like(logits).flatten()
            del logits
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool):
            kept = self._keep(shape, self.forward(**inputs, **fixed))
        self._pool = graph.pool()
        return _Captured(graph, inputs, kept)

    def _keep(self, shape: Shape, logits: Tensor) -> Tensor:
        """``logits`` copied to the buffer of their kind, so that the graphs can share what they came in."""
        buffer = self._logits[shape.lasting][: logits.numel()].view_as(logits)
        return buffer.copy_(logits)

    def _buffers(self, shape: Shape) -> dict[str, Tensor | None]:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.long, device=self.device)

        b, t = shape.logit_rows + shape.commit_rows, shape.tokens
        buffers = {
            "input_ids": zeros(b, t),
            "position_ids": zeros(b, t),
            "rows": zeros(b) - 1,
            "prefixes": zeros(b),
            "local_mask": torch.ones(b, t, shape.width or t, dtype=torch.bool, device=self.device),
            "logits_at": zeros(shape.logit_rows, shape.picks) if shape.picks else None,
        }
        return buffers | {"offsets": zeros(b)} if shape.width else buffers

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        prefixes: Tensor,
        local_mask: Tensor | None = None,
        logits_at: Tensor | None = None,
        logit_rows: int | None = None,
        **moved,
    ) -> Tensor:
        """Logits ``[logit_rows, T or picks, V]``. ``rows [b]`` index the cache (-1: padding); ``logit_rows`` first entries get logits (default: all).

        ``moved``: nothing, or the ``offsets [b]`` and ``width`` of a window that is not plain.
        """
        logit_rows = len(input_ids) if logit_rows is None else logit_rows
        inputs = (input_ids, position_ids, rows, prefixes, local_mask, logits_at, logit_rows)
        shape = self.stage(*inputs, **moved)
        return self.forward(*inputs, **moved) if shape is None else self.replay(shape, logit_rows)

    def stage(
        self, input_ids, position_ids, rows, prefixes, local_mask, logits_at, logit_rows: int, **moved
    ) -> Shape | None:
        """Copy the inputs of a forward to the smallest graph that can run it; None, and nothing copied, where none can. No host read."""
        batch, tokens = input_ids.shape
        picks = 0 if logits_at is None else logits_at.shape[1]
        shape = best_fit(self.captured, Shape(logit_rows, tokens, picks, batch - logit_rows, moved.get("width", 0)))
        if shape is None:
            return None
        buffers = self.captured[shape].inputs
        given = {"input_ids": input_ids, "position_ids": position_ids, "rows": rows, "prefixes": prefixes}
        given["local_mask"] = True if local_mask is None else local_mask
        if moved:
            given["offsets"] = moved["offsets"]
        for name, value in given.items():
            _put(buffers[name], value, batch, logit_rows, shape)
        if shape.picks:
            buffers["logits_at"][:logit_rows] = logits_at
        for padding in (
            buffers["rows"][logit_rows : shape.logit_rows],
            buffers["rows"][shape.logit_rows + batch - logit_rows :],
        ):
            if len(padding):
                padding.fill_(-1)
        return shape

    def replay(self, shape: Shape, logit_rows: int) -> Tensor:
        """Run the graph whose inputs have been staged; logits of its ``logit_rows`` first entries."""
        captured = self.captured[shape]
        self.replays[shape] += 1
        captured.graph.replay()
        return captured.logits[:logit_rows]

    def close(self) -> None:
        """Give the memory of all graphs back."""
        self.captured.clear()
        self._logits.clear()

    def owns(self, tensor: Tensor) -> bool:
        """Is this what a replay returns?"""
        return any(tensor.data_ptr() == logits.data_ptr() for logits in self._logits.values())


def _put(buffer: Tensor, value: Tensor | bool, batch: int, logit_rows: int, shape: Shape) -> None:
    """Copy the ``batch`` entries of ``value`` to where ``shape`` has its logit_rows entries and its commit_rows."""
    if logit_rows == shape.logit_rows or isinstance(value, bool):
        buffer[:batch] = value
        return
    per_entry = value.expand(batch, *value.shape) if buffer.dim() > value.dim() else value
    buffer[:logit_rows] = per_entry[:logit_rows]
    buffer[shape.logit_rows : shape.logit_rows + batch - logit_rows] = per_entry[logit_rows:]
