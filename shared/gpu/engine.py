"""How the forwards of one model are run: the model as it is, or its fast forward, in CUDA graphs where shapes were captured.

A decoder asks an `Engine` for every forward of a lane. What it computes is the same in all three ways up to rounding; what differs is time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.errors import UserError
from shared.gpu.fast import fast_forward_of
from shared.gpu.graphs import GraphRunner, Shape, inputs_of, sizes
from shared.gpu.phases import Phases, Stateful, call
from shared.network.features import Features
from shared.network.kv_cache import BlockCache, Where, Window
from shared.options import Runtime


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one forward reads besides its `Window`: ``ids, positions [b, T]``, the local mask, where logits are wanted (see `Engine.forward`), and
    the layers whose ``features`` are."""

    ids: Tensor
    positions: Tensor
    mask: Tensor | None = None
    logits_at: slice | Tensor | None = None
    logit_rows: int | None = None
    features: tuple[int, ...] = ()

    @property
    def logits(self) -> int:
        """How many positions of an entry get logits."""
        if isinstance(self.logits_at, slice):
            return len(range(*self.logits_at.indices(self.ids.shape[1])))
        return self.ids.shape[1] if self.logits_at is None else self.logits_at.shape[1]


@dataclass(frozen=True, slots=True)
class Staged:
    """Inputs that lie where a graph will read them."""

    shape: Shape
    logit_rows: int

    @property
    def logits(self) -> int:
        return self.shape.picks or self.shape.tokens

    @property
    def features(self) -> tuple[int, ...]:
        return self.shape.features


class Engine:
    """A model, its cache of ``rows`` times ``slots``, and the way its forwards run.

    ``kinds``: the forwards of one row that its decoder will ask for and that are worth a graph; ``commit_rows=1`` in a kind says that any number
    of commits may go along. The engine knows no layout: what these forwards mean is the decoder's.
    """

    def __init__(self, model, rows: int, slots: int, kinds: Sequence[Shape], runtime: Runtime):
        self.model, self.runtime, self.kinds = model, runtime, tuple(kinds)
        self.cache: BlockCache = model.new_cache(rows, slots)
        self.fast = None if runtime.fast is False else fast_forward_of(model, required=bool(runtime.fast))
        if runtime.graphs and not self.can_capture:
            raise UserError("graphs is True. Allowed: false or none here; CUDA graphs are of the fast forward on a GPU")
        self.runner: GraphRunner | None = None
        self.phases: Phases | None = None  # of the last decode whose first lane this is
        if self.can_capture and runtime.graphs is not False:
            self.runner = GraphRunner(self._fast_forward, model.device)
            self.runner.capture(self.shapes(rows))

    @classmethod
    def of(cls, model, rows: int, slots: int, kinds: Sequence[Shape], runtime: Runtime) -> Engine:
        """An engine that holds at least this much: the one its model keeps if that still serves (its graphs are worth keeping), else a new one."""
        last: Engine | None = model.engine
        if last is not None and last.serves(rows, slots, kinds, runtime):
            last.cache.reset(range(len(last.cache.lengths)))
            return last
        if last is not None:
            last.close()  # before the new one takes memory
        model.engine = None
        engine = cls(model, rows, slots, kinds, runtime)
        if engine.runner is not None:
            model.engine = engine
        return engine

    def serves(self, rows: int, slots: int, kinds: Sequence[Shape], runtime: Runtime) -> bool:
        """Can this engine do the work of one made with these arguments, on the weights where they are now?"""
        return (
            len(self.cache.lengths) >= rows
            and self.cache.slots >= slots
            and self.runtime == runtime
            and set(kinds) <= set(self.kinds)
            and self.cache.keys.dtype == self.model.dtype
            and self.cache.keys.device == self.model.device
            and (self.fast is None or self.fast.current())
        )

    def close(self) -> None:
        """Give the memory of the cache and of all graphs back; nothing can be run afterwards."""
        for part in (self.runner, self.phases):
            if part is not None:
                part.close()
        self.cache = self.runner = self.phases = None

    @property
    def can_capture(self) -> bool:
        """Could the forwards of this model be graphs?"""
        return self.fast is not None and self.model.device.type == "cuda"

    @property
    def capture_seconds(self) -> float:
        return self.runner.seconds if self.runner else 0.0

    def shapes(self, rows: int) -> list[Shape]:
        """Every kind at every batch size worth a graph, with every number of commits that may go along."""
        return [
            replace(kind, logit_rows=b, commit_rows=r)
            for kind in self.kinds
            for b in sizes(rows)
            for r in ([0, *sizes(b)] if kind.commit_rows else [0])
        ]

    def _fast_forward(self, **given) -> Tensor:
        return self.fast(cache=self.cache, **given)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        window: Window,
        local_mask: Tensor | None,
        *,
        logit_rows: int | None = None,
        logits_at: slice | Tensor | None = None,
        features: Features | None = None,
    ) -> Tensor:
        """Logits ``[logit_rows, T, V]``, or of the positions ``logits_at``; only the ``logit_rows`` first entries get any (default: all).

        They may live in a graph's memory: what must outlast the next forward has to be copied. A ``local_mask`` that is not bool is added to the scores,
        which the plain network alone can do. ``features`` is filled with the outputs of its layers.
        """
        logit_rows = len(input_ids) if logit_rows is None else logit_rows
        added = local_mask is not None and local_mask.dtype != torch.bool
        if self.fast is None or added:
            how = {"logit_rows": logit_rows, "logits_at": logits_at} | ({"features": features} if features else {})
            return self.model(input_ids, position_ids, window, local_mask, **how)
        picked = logits_at
        if isinstance(logits_at, slice):
            picked = torch.arange(input_ids.shape[1], device=input_ids.device)[logits_at].expand(logit_rows, -1)
        inputs = inputs_of(input_ids, position_ids, window.where, self.cache.length, local_mask, picked)
        how = {"logit_rows": logit_rows, "width": window.where.width, "features": features}
        return self._fast_forward(**inputs, **how) if self.runner is None else self.runner(inputs, **how)

    def stage(self, inputs: Inputs, where: Where) -> Inputs | Staged:
        """Put the inputs of a forward where its graph reads them; ``where`` is that of its window. No host read: a phase may end with this."""
        if self.runner is None or (inputs.mask is not None and inputs.mask.dtype != torch.bool):
            return inputs
        logit_rows = len(inputs.ids) if inputs.logit_rows is None else inputs.logit_rows
        given = inputs_of(inputs.ids, inputs.positions, where, self.cache.length, inputs.mask, inputs.logits_at)
        shape = self.runner.stage(given, logit_rows, where.width, inputs.features)
        return inputs if shape is None else Staged(shape, logit_rows)

    def run(self, staged: Inputs | Staged, window: Window, features: Features | None = None) -> Tensor:
        """The logits of `forward` for inputs that have been through `stage`, in the ``window`` they were staged for."""
        if isinstance(staged, Staged):
            return self.runner.replay(staged.shape, staged.logit_rows, features)
        how = {"logit_rows": staged.logit_rows, "logits_at": staged.logits_at, "features": features}
        return self.forward(staged.ids, staged.positions, window, staged.mask, **how)


def phases_for(engines: Sequence[Engine], signature: Hashable, owners: Sequence[Stateful]) -> Callable:
    """How the phases of a decode over these lanes are run: in graphs where forwards are; else they are called. See `shared.gpu.phases.Phases`.

    The first engine keeps them for the next decode over the same engines.
    """
    runners = [engine.runner for engine in engines if engine.runner is not None]
    if not runners:
        return call
    first, signature = engines[0], (signature, tuple(runners))
    if first.phases is None or not first.phases.adopt(signature, owners):
        if first.phases is not None:
            first.phases.close()  # before the new ones take memory
        first.phases = Phases(signature, owners, lambda tensor: any(runner.owns(tensor) for runner in runners))
    return first.phases
