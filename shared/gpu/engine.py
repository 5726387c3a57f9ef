"""How the forwards of a decode are run: the model as it is, or its family's fast forward, in CUDA graphs where shapes were captured.

A decoder asks an `Engine` for every forward. What it computes is the same in all three ways up to rounding; what differs is time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.errors import UserError
from shared.gpu.fast import fast_forward_of
from shared.gpu.graphs import GraphRunner, Shape, sizes
from shared.gpu.phases import Phases, call
from shared.network.kv_cache import BlockCache, Window
from shared.options import Runtime


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one forward reads: ``ids, positions [b, T]``, the local mask, and where logits are wanted (see `Engine.forward`).

    ``rows [b]`` are cache rows. Entry ``i`` sees ``ahead[i]`` more tokens than are committed for its row (None: no entry does). ``offset [b]`` and ``width``
    are those of a window that is not plain.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    mask: Tensor | None = None
    ahead: Tensor | None = None
    logits_at: Tensor | None = None
    logit_rows: int | None = None
    offset: Tensor | None = None
    width: int = 0


@dataclass(frozen=True, slots=True)
class Staged:
    """Inputs that lie where a graph will read them."""

    shape: Shape
    logit_rows: int


class Engine:
    """A model, its cache of ``rows`` times ``slots``, and the way its forwards run.

    The model offers ``new_cache(rows, slots)`` and names its ``fast_class``. ``kinds``: the forwards of one row that are worth a graph; without
    them the shapes follow from ``block_length``.
    """

    def __init__(
        self, model, rows: int, slots: int, block_length: int, runtime: Runtime, kinds: Sequence[Shape] | None = None
    ):
        self.model, self.block_length, self.runtime, self.kinds = model, block_length, runtime, kinds
        self.cache: BlockCache = model.new_cache(rows, slots)
        self.fast = None if runtime.fast is False else fast_forward_of(model, required=bool(runtime.fast))
        if runtime.graphs and (self.fast is None or model.device.type != "cuda"):
            raise UserError("graphs is True. Allowed: false or none here; CUDA graphs are of the fast forward on a GPU")
        self.runner = None
        self.phases: Phases | None = None  # of the last decode
        if self.fast is not None and runtime.graphs is not False and model.device.type == "cuda":
            self.runner = GraphRunner(self._fast_forward, model.device)
            self.runner.capture(self.shapes(rows))

    @classmethod
    def of(
        cls, model, rows: int, slots: int, block_length: int, runtime: Runtime, kinds: Sequence[Shape] | None = None
    ) -> Engine:
        """An engine that holds at least this much: the model's last one if it still serves (its graphs are worth keeping), else a new one."""
        last: Engine | None = getattr(model, "last_engine", None)
        if last is not None and last.serves(rows, slots, block_length, runtime, kinds):
            last.cache.reset(range(len(last.cache.lengths)))
            return last
        if last is not None:
            last.close()  # before the new one takes memory
        model.last_engine = None
        engine = cls(model, rows, slots, block_length, runtime, kinds)
        if engine.runner is not None:
            model.last_engine = engine
        return engine

    def serves(
        self, rows: int, slots: int, block_length: int, runtime: Runtime, kinds: Sequence[Shape] | None = None
    ) -> bool:
        """Can this engine do the work of one made with these arguments, on the weights where they are now?"""
        return (
            len(self.cache.lengths) >= rows
            and self.cache.slots >= slots
            and (self.block_length, self.runtime, self.kinds is None) == (block_length, runtime, kinds is None)
            and set(kinds or ()) <= set(self.kinds or ())
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

    def phases_for(self, signature: Hashable, owners: Sequence[object]) -> Callable:
        """How the phases of a decode are run: in graphs where forwards are; else they are called. See `shared.gpu.phases.Phases`."""
        if self.runner is None:
            return call
        if self.phases is None or not self.phases.adopt(signature, owners):
            if self.phases is not None:
                self.phases.close()  # before the new ones take memory
            self.phases = Phases(signature, owners, self.runner.owns)
        return self.phases

    @property
    def capture_seconds(self) -> float:
        return self.runner.seconds if self.runner else 0.0

    def queries(self, count: int) -> int:
        """How many mask queries a verify of ``count`` should carry: a captured number, or just ``count``."""
        return next(q for q in self._query_sizes() if q >= count) if self.runner else count

    def verify_tokens(self, count: int) -> int:
        """How many drafted tokens a verify of ``count`` should carry."""
        return self.block_length if self.runner else count

    def _query_sizes(self) -> list[int]:
        length = self.block_length
        return sorted({max(1, length // 4), max(1, length // 2), length})

    def shapes(self, rows: int) -> list[Shape]:
        """The engine's kinds, or drafts, drafts with commits riding along, and verifies, at every batch size worth a graph."""
        if self.kinds is not None:
            return [replace(kind, logit_rows=b) for kind in self.kinds for b in sizes(rows)]
        length = self.block_length
        drafts = [Shape(b, length, commit_rows=r, lasting=True) for b in sizes(rows) for r in [0, *sizes(b)]]
        verifies = [Shape(b, length + q, picks=q) for b in sizes(rows) for q in self._query_sizes()]
        return drafts + verifies

    def _fast_forward(
        self, input_ids, position_ids, rows, prefixes, local_mask, logits_at, logit_rows, **moved
    ) -> Tensor:
        how = {"logit_rows": logit_rows, "logits_at": logits_at, **moved}
        return self.fast(input_ids, position_ids, self.cache, rows, prefixes, local_mask, **how)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        window: Window,
        local_mask: Tensor | None,
        *,
        logit_rows: int | None = None,
        logits_at: slice | Tensor | None = None,
    ) -> Tensor:
        """Logits ``[logit_rows, T, V]``, or of the positions ``logits_at``; only the ``logit_rows`` first entries get any (default: all).

        They may live in a graph's memory: what must outlast the next forward has to be copied. A ``local_mask`` that is not bool is added to the scores,
        which the plain network alone can do.
        """
        logit_rows = len(input_ids) if logit_rows is None else logit_rows
        added = local_mask is not None and local_mask.dtype != torch.bool
        if self.fast is None or added:
            return self.model(input_ids, position_ids, window, local_mask, logit_rows=logit_rows, logits_at=logits_at)
        call = self._fast_forward if self.runner is None else self.runner
        picked = logits_at
        if isinstance(logits_at, slice):
            picked = torch.arange(input_ids.shape[1], device=input_ids.device)[logits_at].expand(logit_rows, -1)
        moved = {} if window.plain else {"offsets": window.offset, "width": window.width}
        return call(input_ids, position_ids, window.row_index, window.prefix, local_mask, picked, logit_rows, **moved)

    def stage(self, inputs: Inputs) -> Inputs | Staged:
        """Put the inputs of a forward where its graph reads them. No host read: a phase may end with this."""
        if self.runner is None or (inputs.mask is not None and inputs.mask.dtype != torch.bool):
            return inputs
        logit_rows = len(inputs.ids) if inputs.logit_rows is None else inputs.logit_rows
        prefix = self.cache.length[inputs.rows]
        prefix = prefix if inputs.ahead is None else prefix + inputs.ahead
        moved = {} if inputs.offset is None else {"offsets": inputs.offset, "width": inputs.width}
        place = (inputs.ids, inputs.positions, inputs.rows, prefix)
        shape = self.runner.stage(*place, inputs.mask, inputs.logits_at, logit_rows, **moved)
        return inputs if shape is None else Staged(shape, logit_rows)

    def run(self, staged: Inputs | Staged, window: Window) -> Tensor:
        """The logits of `forward` for inputs that have been through `stage`; ``window`` is their place in the cache."""
        if isinstance(staged, Staged):
            return self.runner.replay(staged.shape, staged.logit_rows)
        how = {"logit_rows": staged.logit_rows, "logits_at": staged.logits_at}
        return self.forward(staged.ids, staged.positions, window, staged.mask, **how)
