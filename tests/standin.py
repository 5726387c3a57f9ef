"""A device that sees only what was staged: forwards of the plain network from the tensors that a graph would read, on a CPU.

A CPU's forwards read their `Window`; a GPU's replays read the copies that `Engine.stage` made. Decodes through this stand-in show that both say the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.gpu import engine as engine_module
from shared.gpu.engine import Engine
from shared.gpu.graphs import GraphRunner
from shared.gpu.phases import Phases
from shared.network.kv_cache import BlockCache
from tests.recorder import recorder


class Reach:
    """The window interface of a network, from device tensors alone: those of `shared.gpu.graphs.inputs_of`."""

    def __init__(self, cache: BlockCache, rows, prefixes, offsets, width: int, write_rows, tokens: int):
        self.cache, self.prefixes, self.width = cache, prefixes, width or tokens
        self.real = (rows >= 0).nonzero()[:, 0]  # the others are padding: nothing is written
        self.rows, into = rows.clamp(min=0), rows if write_rows is None else write_rows
        self.into = into.clamp(min=0)
        first = prefixes if offsets is None else prefixes + offsets
        self.slots = (first[:, None] + torch.arange(tokens))[self.real]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for store, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            store[self.into[self.real][:, None], :, self.slots] = new[self.real].transpose(1, 2)
            before = torch.arange(store.shape[2]) < self.prefixes[:, None]
            found.append(torch.where(before[:, None, :, None], store[self.rows], store[self.into]))
        return found[0], found[1]

    def mask(self, local_mask: Tensor) -> Tensor:
        """``local_mask [b, T, width]`` -> ``[b, 1, T, slots]``."""
        column = torch.arange(self.cache.slots) - self.prefixes[:, None]
        inside = (column >= 0) & (column < self.width)
        at = column.clamp(0, self.width - 1)[:, None, :].expand(-1, local_mask.shape[1], -1)
        return ((column < 0)[:, None, :] | (inside[:, None, :] & local_mask.gather(2, at)))[:, None]


class PlainForward:
    """The call of `shared.gpu.fast.FastForward`, through the plain network."""

    def __init__(self, model):
        self.model = model

    def current(self) -> bool:
        return True

    def __call__(self, input_ids, position_ids, cache, rows, prefixes, local_mask=None, *, logit_rows=None, logits_at=None,
                 offsets=None, width=0, write_rows=None, features=None) -> Tensor:  # fmt: skip
        tokens = input_ids.shape[1]
        reach = Reach(cache, rows, prefixes, offsets, width, write_rows, tokens)
        local = torch.ones(tokens, reach.width, dtype=torch.bool) if local_mask is None else local_mask
        local = local.expand(len(input_ids), -1, -1)
        how = {"logit_rows": logit_rows, "logits_at": logits_at, "features": features}
        return self.model(input_ids, position_ids, reach, local, **how)


class StagedRunner(GraphRunner):
    """Replays by running the forward on the staged buffers."""

    def _capture(self, shape, inputs):
        logits, features = self._run(shape, inputs)
        self._reserve(shape, logits)
        kept = self._keep(shape, logits)

        def replay() -> None:
            logits, now = self._run(shape, inputs)
            kept.copy_(logits)
            for layer in set(shape.features):
                features.take(layer, now.of(layer))

        return replay, kept, features


def see_only_what_was_staged(monkeypatch) -> list[Phases]:
    """From here on every engine captures, into this stand-in, and so do phases; returns the list these are put into."""
    made = []
    monkeypatch.setattr(engine_module, "fast_forward_of", lambda model, required: PlainForward(model))
    monkeypatch.setattr(engine_module, "GraphRunner", StagedRunner)
    monkeypatch.setattr(Engine, "can_capture", True)

    def phases(signature, owners, is_fixed):
        for owner in owners:
            unnamed = {name for name, value in vars(owner).items() if isinstance(value, Tensor)} - set(owner.STATE)
            assert not unnamed, f"phases are not told of {unnamed} of {type(owner).__name__}"
        made.append(Phases(signature, owners, is_fixed, recorder(owners)))
        return made[-1]

    monkeypatch.setattr(engine_module, "Phases", phases)
    return made
