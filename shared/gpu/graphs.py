"""CUDA graphs of a forward: captured once per shape, replayed with new inputs.

The runner wraps a forward and never a loop. It knows no family: a forward is any function of the keywords in `inputs_of` (tensors), ``logit_rows``,
``width`` and ``features`` (constants of a shape) that returns logits, reads nothing back to the host and writes nothing for a row index of -1. Shapes
that were not captured run eagerly, in the same line.
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

from shared.network.features import Features
from shared.network.kv_cache import Where

Forward = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One graph: ``logit_rows`` entries that return logits and ``commit_rows`` that only write keys and values, of ``tokens`` tokens each.

    ``picks``: logits an entry (0: all). ``width``: local slots of a window that is not plain (0: plain). ``branches``: entries write to other rows
    than they read. ``features``: layers whose outputs are wanted too. ``lasting``: its logits outlast replays of shapes that are not lasting.
    """

    logit_rows: int
    tokens: int
    picks: int = 0
    commit_rows: int = 0
    width: int = 0
    branches: bool = False
    features: tuple[int, ...] = ()
    lasting: bool = field(default=False, compare=False)

    @property
    def logits(self) -> int:
        """Positions that get logits."""
        return self.logit_rows * (self.picks or self.tokens)

    @property
    def kind(self) -> tuple:
        """What a shape that stands in for this one must have in common with it."""
        return self.tokens, self.picks, self.width, self.branches, self.features


def best_fit(shapes: Iterable[Shape], wanted: Shape) -> Shape | None:
    """The smallest captured shape that can serve ``wanted``: of its kind, and with no fewer entries of either sort."""
    able = [
        s
        for s in shapes
        if s.kind == wanted.kind and s.logit_rows >= wanted.logit_rows and s.commit_rows >= wanted.commit_rows
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


Inputs = dict[str, Tensor | None]


def inputs_of(
    input_ids: Tensor,
    position_ids: Tensor,
    where: Where,
    lengths: Tensor,
    local_mask: Tensor | None,
    logits_at: Tensor | None,
) -> Inputs:
    """The tensors that a forward in a `Window` reads, by name; ``lengths``: what is committed of every row."""
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "rows": where.rows,
        "prefixes": where.prefix(lengths),
        "local_mask": local_mask,
        "logits_at": logits_at,
        "offsets": where.offset,
        "write_rows": where.write_rows,
    }


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], None]
    inputs: Inputs
    logits: Tensor
    features: Features | None


class GraphRunner:
    """Replays ``forward`` where a captured shape serves, calls it where none does.

    All graphs share one memory pool. Their logits go to one buffer for ``lasting`` shapes and one for the others, so the logits of a replay last
    until the next replay of their kind: a draft's survive the verify that follows it. Features last until the next replay of their shape.
    """

    def __init__(self, forward: Forward, device: torch.device | str):
        self.forward = forward
        self.device = torch.device(device)
        self.captured: dict[Shape, _Captured] = {}
        self.seconds = 0.0  # spent capturing
        self.replays: Counter[Shape] = Counter()
        self._pool: tuple[int, int] | None = None
        self._logits: dict[bool, Tensor] = {}  # lasting, not lasting
        self._returned: set[int] = set()  # addresses of what replays return

    @torch.inference_mode()
    def capture(self, shapes: Iterable[Shape]) -> None:
        """Capture ``shapes``, those with most logits first, so that the smaller ones fit in memory that the larger ones have reserved."""
        began = time.perf_counter()
        missing = set(shapes) - set(self.captured)
        with on_device(self.device):
            for shape in sorted(missing, key=lambda s: (s.logits, s.commit_rows, s.tokens), reverse=True):
                inputs = self._buffers(shape)
                replay, logits, features = self._capture(shape, inputs)
                self.captured[shape] = _Captured(replay, inputs, logits, features)
                self._returned |= {t.data_ptr() for t in (logits, features and features.hidden) if t is not None}
        self.seconds += time.perf_counter() - began

    def _run(self, shape: Shape, inputs: Inputs) -> tuple[Tensor, Features | None]:
        features = Features(shape.features) if shape.features else None
        logits = self.forward(**inputs, logit_rows=shape.logit_rows, width=shape.width, features=features)
        return logits, features

    def _capture(self, shape: Shape, inputs: Inputs) -> tuple[Callable[[], None], Tensor, Features | None]:
        """``(replay, logits, features)`` of a graph that reads ``inputs`` where they are."""
        stream = _stream(torch.cuda.current_device(), "warm up")
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._reserve(
                shape, self._run(shape, inputs)[0]
            )  # compiles kernels; its rows are all -1, so it writes nothing
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool):
            logits, features = self._run(shape, inputs)
            kept = self._keep(shape, logits)
            del logits
        self._pool = graph.pool()
        return graph.replay, kept, features

    def _reserve(self, shape: Shape, logits: Tensor) -> None:
        """Make room for logits like these."""
        buffer = self._logits.get(shape.lasting)
        if buffer is None or buffer.numel() < logits.numel():
            self._logits[shape.lasting] = torch.empty_like(logits).flatten()

    def _keep(self, shape: Shape, logits: Tensor) -> Tensor:
        """``logits`` copied to the buffer of their kind, so that the graphs can share what they came in."""
        buffer = self._logits[shape.lasting][: logits.numel()].view_as(logits)
        return buffer.copy_(logits)

    def _buffers(self, shape: Shape) -> Inputs:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.long, device=self.device)

        b, t = shape.logit_rows + shape.commit_rows, shape.tokens
        return {
            "input_ids": zeros(b, t),
            "position_ids": zeros(b, t),
            "rows": zeros(b) - 1,
            "prefixes": zeros(b),
            "local_mask": torch.ones(b, t, shape.width or t, dtype=torch.bool, device=self.device),
            "logits_at": zeros(shape.logit_rows, shape.picks) if shape.picks else None,
            "offsets": zeros(b) if shape.width else None,
            "write_rows": zeros(b) - 1 if shape.branches else None,
        }

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, *, logit_rows: int, width: int = 0, features: Features | None = None) -> Tensor:
        """Logits ``[logit_rows, T or picks, V]`` of `inputs_of`; ``features`` is filled."""
        shape = self.stage(inputs, logit_rows, width, features.layers if features else ())
        if shape is None:
            return self.forward(**inputs, logit_rows=logit_rows, width=width, features=features)
        return self.replay(shape, logit_rows, features)

    def stage(self, inputs: Inputs, logit_rows: int, width: int = 0, features: tuple[int, ...] = ()) -> Shape | None:
        """Copy the inputs of a forward to the smallest graph that can run it; None, and nothing copied, where none can. No host read."""
        (batch, tokens), at = inputs["input_ids"].shape, inputs["logits_at"]
        picks, branches = 0 if at is None else at.shape[1], inputs["write_rows"] is not None
        wanted = Shape(logit_rows, tokens, picks, batch - logit_rows, width, branches, features)
        shape = best_fit(self.captured, wanted)
        if shape is None:
            return None
        buffers = self.captured[shape].inputs
        for name, value in inputs.items():
            if name == "logits_at":
                continue
            if name == "local_mask" and value is None:
                value = True
            if value is not None:
                _put(buffers[name], value, batch, logit_rows, shape)
        if shape.picks:
            buffers["logits_at"][:logit_rows] = at
        rows = buffers["rows"]
        for padding in (rows[logit_rows : shape.logit_rows], rows[shape.logit_rows + batch - logit_rows :]):
            if len(padding):
                padding.fill_(-1)
        return shape

    def replay(self, shape: Shape, logit_rows: int, features: Features | None = None) -> Tensor:
        """Run the graph whose inputs have been staged; logits of its ``logit_rows`` first entries, and the ``features`` of these."""
        captured = self.captured[shape]
        self.replays[shape] += 1
        captured.replay()
        if features is not None:
            for layer in set(shape.features):
                features.take(layer, captured.features.of(layer)[:logit_rows])
        return captured.logits[:logit_rows]

    def close(self) -> None:
        """Give the memory of all graphs back."""
        self.captured.clear()
        self._logits.clear()
        self._returned.clear()

    def owns(self, tensor: Tensor) -> bool:
        """Is this what a replay returns?"""
        return tensor.data_ptr() in self._returned


def _put(buffer: Tensor, value: Tensor | bool, batch: int, logit_rows: int, shape: Shape) -> None:
    """Copy the ``batch`` entries of ``value`` to where ``shape`` has those that return logits and those that only write."""
    if logit_rows == shape.logit_rows or isinstance(value, bool):
        buffer[:batch] = value
        return
    per_entry = value.expand(batch, *value.shape) if buffer.dim() > value.dim() else value
    buffer[:logit_rows] = per_entry[:logit_rows]
    buffer[shape.logit_rows : shape.logit_rows + batch - logit_rows] = per_entry[logit_rows:]
