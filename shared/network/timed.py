"""Forwards that a benchmark times: what a decoder asks a network for, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.network import masks


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward of rows of ``tokens`` each under ``mask [tokens, width]``, with logits at the positions ``picks`` (None: all).

    ``positions``: of each token, behind the prefix and the offset (None: one after the other). ``commit_rows``: the forward also commits the last block of
    every row. ``offset`` and ``width`` place it in a window that is not plain.
    """

    name: str
    tokens: int
    mask: Tensor | None = None
    picks: Sequence[int] | None = None
    commit_rows: bool = False
    offset: int = 0
    width: int | None = None
    positions: Sequence[int] | None = None

    def place(self, device: torch.device) -> Tensor:
        """``[tokens]``: the positions."""
        return torch.tensor(list(range(self.tokens) if self.positions is None else self.positions), device=device)

    @property
    def logits(self) -> int:
        """Positions of a row that get logits."""
        return self.tokens if self.picks is None else len(self.picks)


def two_copy_forwards(length: int, device: torch.device) -> list[Forward]:
    """Drafts of a block, verifies of the block with a mask query for each token, and drafts with the last block's commit."""
    return [
        Forward("draft", length),
        Forward(
            "verify",
            2 * length,
            masks.two_copy_verify(length, device),
            range(length, 2 * length),
            positions=[*range(length), *range(length)],
        ),
        Forward("draft and commit", length, commit_rows=True),
    ]
