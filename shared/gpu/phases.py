"""The work of a step between its forwards, as CUDA graphs.

A phase is a function of device tensors without host reads and without Python side effects: what a decoder computes before, between and after the
forwards of a step. That is a hundred small kernels, and launching them one by one takes longer than running them. `Phases` calls a phase as it is the
first time, and captures and replays it once the same shapes come again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from shared.gpu.graphs import capturing

Pool = tuple[int, int]
Capture = Callable[[Callable[[], Any], Pool | None], tuple[Callable[[], None], Any, Pool]]


class Stateful(Protocol):
    """Whatever holds state that phases read or write outside their arguments: ``STATE`` names its tensors, each an attribute (or None: not held)."""

    STATE: ClassVar[tuple[str, ...]]


def call(function: Callable, first, *arguments):
    """What `Phases` does where nothing can be captured."""
    return function(first, *arguments)


def cuda_graph(function: Callable[[], Any], pool: Pool | None) -> tuple[Callable[[], None], Any, Pool]:
    """``(replay, what function returned, pool)``: ``function`` captured in memory of ``pool`` (None: of a new one). It is not run."""
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool):
        result = function()
    return graph.replay, result, graph.pool()


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], None]
    inputs: list[Tensor | None]  # where to copy the arguments; None: read where it is
    result: Any
    copied: list  # of the arguments that were copied last those that nobody writes to


class Phases:
    """Runs the phases of one kind of decode: ``phases(function, first, *arguments)`` is ``function(first, *arguments)``.

    Arguments and results are tensors, dataclasses and tuples of them, and hashable constants; ``first`` is whatever holds the state. What a captured
    phase returns is valid until the same function runs again. Inside, no value is read, no mask selects, and no number is assigned through index
    tensors: torch would copy it from the host. State that phases read or write outside their arguments must stay where it is: it
    is what ``owners`` name in their ``STATE``.
    """

    CAPTURE_AT = 2  # the first call compiles kernels
    MOST = 512  # graphs

    def __init__(
        self,
        signature: Hashable,
        owners: Sequence[Stateful],
        is_fixed: Callable[[Tensor], bool],
        capture: Capture = cuda_graph,
    ):
        """``signature``: every constant that phases depend on. ``is_fixed(tensor)``: is this memory that graphs may read where it is?"""
        self.signature, self.is_fixed, self.capture = signature, is_fixed, capture
        self.state = dict(_state(owners))
        self.calls: Counter = Counter()
        self._captured: dict[tuple, _Captured] = {}
        self._pools: dict[Callable, Pool] = {}  # one a function: its results outlast the graphs of others
        self._results: dict[
            int, int
        ] = {}  # what captured phases return: id of the tensor (the graphs keep it alive) -> a number

    def adopt(self, signature: Hashable, owners: Sequence[Stateful]) -> bool:
        """Serve another decode: move its state to where the graphs expect it. False, and nothing done, where it does not fit."""
        coming = dict(_state(owners))
        if signature != self.signature or {k: _kind(t) for k, t in coming.items()} != {
            k: _kind(t) for k, t in self.state.items()
        }:
            return False
        for (number, name), tensor in coming.items():
            setattr(owners[number], name, self.state[number, name].copy_(tensor))
        return True

    def __call__(self, function: Callable, first, *arguments):
        leaves = _leaves(arguments)
        key = (function, *[self._describe(leaf) for leaf in leaves])
        found = self._captured.get(key)
        if found is None:
            self.calls[key] += 1
            if self.calls[key] < self.CAPTURE_AT or len(self._captured) >= self.MOST:
                return function(first, *arguments)
            found = self._captured[key] = self._capture(function, first, arguments, leaves)
        for k, (buffer, leaf) in enumerate(zip(found.inputs, leaves, strict=True)):
            if buffer is None or (leaf is not None and leaf is found.copied[k]):
                continue
            buffer.copy_(leaf)
            found.copied[k] = _if_never_written(leaf)
        found.replay()
        return _renewed(found.result)

    def close(self) -> None:
        """Give the memory of all graphs back."""
        self._captured.clear()
        self._results.clear()
        self.state.clear()

    def _describe(self, leaf) -> Hashable:
        if not isinstance(leaf, Tensor):
            return ("constant", leaf)
        if id(leaf) in self._results:
            return self._results[id(leaf)]
        if self.is_fixed(leaf):
            return ("at", leaf.data_ptr(), leaf.shape, leaf.dtype)
        return ("like", leaf.shape, leaf.dtype)

    def _in_place(self, tensor: Tensor) -> bool:
        return id(tensor) in self._results or self.is_fixed(tensor)

    def _capture(self, function: Callable, first, arguments: tuple, leaves: list) -> _Captured:
        buffers = [t.clone() if isinstance(t, Tensor) and not self._in_place(t) else None for t in leaves]
        given = [t if b is None else b for t, b in zip(leaves, buffers, strict=True)]
        replay, result, self._pools[function] = self.capture(
            lambda: function(first, *_rebuild(arguments, iter(given))), self._pools.get(function)
        )
        for tensor in _leaves(result):
            if isinstance(tensor, Tensor):
                self._results.setdefault(id(tensor), len(self._results))
        return _Captured(replay, buffers, result, [_if_never_written(leaf) for leaf in leaves])


def _if_never_written(leaf: Any) -> Tensor | None:
    """An argument that may be taken for unchanged when it comes again: see `shared.network.indices`."""
    return leaf if hasattr(leaf, "never_written") else None


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _state(owners: Sequence[Stateful]) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """The tensors that ``owners`` name, by owner and name."""
    for number, owner in enumerate(owners):
        for name in owner.STATE:
            if (tensor := getattr(owner, name)) is not None:
                yield (number, name), tensor


@cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """Of a dataclass; None for anything else."""
    return tuple(f.name for f in fields(kind)) if is_dataclass(kind) else None


def _leaves(value, found: list | None = None) -> list:
    """Tensors and constants of nested tuples and dataclasses, in order."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, tuple):
        for part in value:
            _leaves(part, found)
    elif names := _field_names(type(value)):
        for name in names:
            _leaves(getattr(value, name), found)
    else:
        found.append(value)
    return found


def _rebuild(like, leaves: Iterator):
    """``like`` with its leaves replaced by the next ``leaves``."""
    if isinstance(like, tuple):
        return tuple([_rebuild(part, leaves) for part in like])
    if names := _field_names(type(like)):
        return type(like)(*[_rebuild(getattr(like, name), leaves) for name in names])
    return next(leaves)


def _renewed(result):
    """``result`` without what may have been kept on its objects: what is derived from a result must not outlast the next replay."""
    if isinstance(result, tuple):
        return tuple([_renewed(part) for part in result])
    if hasattr(result, "__dict__") and (names := _field_names(type(result))):
        return type(result)(*[getattr(result, name) for name in names])
    return result
