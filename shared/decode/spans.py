"""Verifying only what drafted spans need: which rows, how much of their blocks, and the tokens of that forward.

For verifiers that see [drafted block | mask queries] (S2D2, the 2L layout): a token at position ``p`` is judged by a mask query that sees the drafted
tokens before ``p``. What stands behind the last span, and queries outside the spans, decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.gpu.engine import Engine
from shared.network import masks
from shared.policy.draft import Draft
from shared.policy.routing import Policy


def wishes(policy: Policy, draft: Draft, *, whole: bool) -> Tensor | None:
    """``[b, 3]``: does the policy want the first masked span verified, where does that end, and how long is it?

    None where nobody needs to read that: the policy never changes its mind, and what it wants is nothing or ``whole`` blocks. No host read.
    """
    decision = policy.decide(draft)
    if policy.constant is False or (policy.constant and whole):
        return None
    span = draft.span_length
    return torch.stack([decision.long(), draft.first_masked + span, span], 1)


@dataclass(frozen=True)
class Picked:
    """Rows of a draft to verify (indices into it), and how far: ``tokens`` of the block and ``queries`` mask tokens of the span."""

    index: list[int]
    tokens: int
    queries: int


def pick(policy: Policy, wish: Tensor | None, engine: Engine, candidates: Sequence[int], *, whole: bool) -> Picked:
    """Which of the ``candidates``, rows of a draft that have a span, are verified, and how much a verify of them all has to carry.

    One packed read of ``wish`` (see `wishes`), or none.
    """
    length = engine.block_length
    if wish is None or not candidates:
        return Picked(list(candidates) if policy.constant else [], length, length)
    read = wish.tolist()
    index = [k for k in candidates if read[k][0]]
    if whole or not index:
        return Picked(index, length, length)
    tokens, queries = max(read[k][1] for k in index), max(read[k][2] for k in index)
    return Picked(index, engine.verify_tokens(tokens), engine.queries(queries))


@dataclass(frozen=True, slots=True)
class SpanInputs:
    """A verify forward of ``v`` rows over ``T = E + M`` tokens: E of the drafted block, M mask queries.

    ``ids, positions [v, T]``, ``mask [v, T, T]``; ``queries [v, M]``: in-block positions the queries stand at, ascending (L: padding); ``wanted [v, M]``:
    where in T they are.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    queries: Tensor
    wanted: Tensor


def span_inputs(draft: Draft, tokens: int, queries: int, start: Tensor, mask_id: int) -> SpanInputs:
    """A verify of the spans of ``draft``, whose blocks begin at positions ``start [v]``, over the first ``tokens`` of them. No host read."""
    length, device = draft.block.shape[1], draft.block.device
    filled = torch.where(draft.masked, draft.tokens, draft.block)[:, :tokens]
    place = torch.arange(tokens, device=device).expand_as(filled)
    asked = torch.arange(queries, device=device).expand(len(filled), -1)
    if queries < length:
        asked = asked + draft.first_masked[:, None]
        asked = torch.where(asked < (draft.first_masked + draft.span_length)[:, None], asked, length)
    ids = torch.cat([filled, torch.full_like(asked, mask_id)], 1)
    positions = start[:, None] + torch.cat([place, asked.clamp(max=length - 1)], 1)
    wanted = torch.arange(tokens, tokens + queries, device=device).expand(len(filled), -1)
    return SpanInputs(ids, positions, masks.span_verify(asked, tokens), asked, wanted)
