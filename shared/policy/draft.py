"""What one step proposes and what it decides: `Draft` and `Choice`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from shared.options import Sampling
from shared.policy.sampling import log_weights
from shared.trace import How


@dataclass(frozen=True)
class Draft:
    """One denoising pass over the current block of ``b`` rows, ``L`` positions each.

    ``rows [b]``: their row in the batch. ``block [b, L]``: ids before the step. ``masked [b, L]``: still to be decided.
    ``tokens, confidence [b, L]``: proposal and the probability the drafter gave it. ``decoded [b]``: tokens this block has gained in earlier
    steps. ``logits``: those of the whole step; ``entry [b]`` says which of them is whose, so that a selection of rows copies none.

    Where several blocks are in flight, L covers them all: ``open [b, L]`` are the positions a threshold may fill now, ``in_flight [b]`` is how many there are
    of a row, and ``first_total [b]`` how many of its first block, which ``decoded`` is about (None: L, one block).
    """

    rows: Tensor
    block: Tensor
    masked: Tensor
    tokens: Tensor
    confidence: Tensor
    logits: Tensor
    entry: Tensor
    decoded: Tensor
    sampling: Sampling
    open: Tensor | None = None
    in_flight: Tensor | None = None
    first_total: Tensor | None = None

    @property
    def fillable(self) -> Tensor:
        """``[b, L]``: masked positions that a threshold may fill now."""
        return self.masked if self.open is None else self.masked & self.open

    @property
    def progress(self) -> Tensor:
        """``[b]``: the share of the (first) block that is decided."""
        return self.decoded / (self.masked.shape[1] if self.first_total is None else self.first_total)

    @cached_property
    def first_masked(self) -> Tensor:
        """``[b]``: in-block index of the first masked position."""
        return self.masked.int().argmax(-1)

    @cached_property
    def offset_in_span(self) -> Tensor:
        """``[b, L]``: distance of each position from the first masked one."""
        return torch.arange(self.masked.shape[1], device=self.masked.device) - self.first_masked[:, None]

    @cached_property
    def span(self) -> Tensor:
        """``[b, L]``: the first maximal run of masked positions."""
        return self.masked & (self.masked.cumsum(-1) == self.offset_in_span + 1)

    @cached_property
    def span_length(self) -> Tensor:
        """``[b]``."""
        return self.span.sum(-1)

    @cached_property
    def log_weights(self) -> Tensor:
        """``[b, L, V]``: draft logits under the transform that verification and estimators use."""
        return self._transformed(self.logits[self.entry])

    def log_weights_at(self, position: Tensor) -> Tensor:
        """``[b, V]``: the same at one in-block ``position [b]`` of each row."""
        return self._transformed(self.logits[self.entry, position])

    def _transformed(self, logits: Tensor) -> Tensor:
        return log_weights(logits, self.sampling)

    def select(self, index: Tensor) -> Draft:
        """The draft of some of the rows; ``index`` into the rows of this draft."""
        whole = ("logits", "sampling")
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in whole}
        return replace(self, **{name: part[index] for name, part in parts.items() if part is not None})


def rank_by(key: Tensor, take: Tensor) -> Tensor:
    """``[b, L]``: rank of each taken position when those are sorted by ``key`` ascending, the lower position first on ties."""
    key = torch.where(take, key.double(), torch.inf)
    mine, theirs = key[..., :, None], key[..., None, :]
    index = torch.arange(key.shape[-1], device=key.device)
    return ((theirs < mine) | ((theirs == mine) & (index < index[:, None]))).sum(-1)


@dataclass
class Choice:
    """What a step writes: ``tokens [b, L]``, ``how [b, L]`` (0: nothing), ``rank [b, L]`` (order inside the step), ``count [b]``."""

    tokens: Tensor
    how: Tensor
    rank: Tensor
    count: Tensor

    @classmethod
    def none(cls, draft: Draft) -> Choice:
        zero = torch.zeros_like(draft.tokens)
        return cls(draft.tokens.clone(), zero, zero.clone(), zero.sum(-1))

    @property
    def take(self) -> Tensor:
        return self.how != How.NONE

    def add(self, take: Tensor, tokens: Tensor, how: How, key: Tensor | None = None) -> None:
        """Also write ``tokens`` at ``take [b, L]`` (positions already chosen are left alone), in ascending ``key`` (default: from left to right)."""
        take = take & ~self.take
        self.tokens = torch.where(take, tokens, self.tokens)
        rank = take.cumsum(-1) - 1 if key is None else rank_by(key, take)
        self.rank = torch.where(take, self.count[:, None] + rank, self.rank)
        self.how = torch.where(take, int(how), self.how)
        self.count = self.count + take.sum(-1)

    def put(self, index: Tensor, other: Choice) -> None:
        """Replace rows ``index`` by the rows of ``other``."""
        for name in ("tokens", "how", "rank", "count"):
            getattr(self, name)[index] = getattr(other, name)
