"""A decode has one lane a model: the model, its engine, its cache, and what its forwards have cost.

A self-speculative decoder has one lane. Others have a target and a drafter, a verifier, a second drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shared.decode.canvas import Canvas
from shared.gpu.engine import Engine, Inputs, Staged
from shared.network.features import Features
from shared.network.kv_cache import BlockCache, Window
from shared.network.sizes import sizes_of
from shared.output import Sizes
from shared.trace import Spent


@dataclass
class Lane:
    """The lane ``name`` of a decode on ``canvas``: every forward of ``engine`` is counted, by kind, for the batch and for each text."""

    name: str
    engine: Engine
    canvas: Canvas
    batch: dict[str, Spent] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        return self.engine.model

    @property
    def cache(self) -> BlockCache:
        return self.engine.cache

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.model)

    def forward(
        self,
        kind: str,
        rows: Sequence[int],
        staged: Inputs | Staged,
        window: Window,
        features: Features | None = None,
    ) -> Tensor:
        """One pass in ``window`` for the texts of ``rows``, one an entry. The mask token is not suppressed yet."""
        logits = self.engine.run(staged, window, features)
        self._count(kind, rows, staged, window)  # while the device works
        return logits

    def _count(self, kind: str, rows: Sequence[int], staged: Inputs | Staged, window: Window) -> None:
        """A text pays for its entries as if they were alone: one forward, its cached tokens read once."""
        tokens, with_logits = window.tokens, len(rows) if staged.logit_rows is None else staged.logit_rows
        texts: dict[int, list[int]] = {}
        for k, (row, prefix) in enumerate(zip(rows, window.prefixes, strict=True)):
            spent = texts.setdefault(row, [1, 0, 0, prefix, 0])
            spent[1] += tokens
            spent[2] += staged.logits if k < with_logits else 0
            spent[3] = min(spent[3], prefix)  # what lies ahead of it is being written by this very forward
            spent[4] += tokens * (prefix + tokens)
        for row, spent in texts.items():
            self.canvas.rows[row].spend(self.name, kind, *spent)
        _, *sums = (sum(numbers) for numbers in zip(*texts.values(), strict=True))
        self.batch[kind] = self.batch.get(kind, Spent()).plus(Spent(1, *sums))
