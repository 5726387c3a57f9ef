"""Verifying only what drafted spans need: which rows, how much of their blocks, and the tokens of that forward.

For verifiers that see [drafted block | mask queries] (S2D2, the 2L layout): a token at position ``p`` is judged by a mask query that sees the drafted
tokens before ``p``. What stands behind the last span, and queries outside the spans, decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared import masks
from shared.draft import Draft
from shared.engine import Engine
from shared.routing import Policy


@dataclass(frozen=True)
class Picked:
    """Rows of a draft to verify (indices into it), and how far: ``tokens`` of the block and ``queries`` mask tokens of the span."""

    index: list[int]
    tokens: int
    queries: int


def pick(policy: Policy, draft: Draft, engine: Engine, candidates: Sequence[int], *, whole: bool) -> Picked:
    """Ask the policy, and measure the spans of the rows it picks out of ``candidates``, which have some. ``whole``: verify whole blocks.

    At most one packed read; none where the answer does not depend on the draft.
    """
    decision, length = policy.decide(draft), draft.block.shape[1]
    if policy.constant is False or (policy.constant and whole) or not candidates:
        return Picked(list(candidates) if policy.constant else [], length, length)
    span = draft.span.sum(-1)
    read = torch.stack([decision.long(), draft.first_masked + span, span], 1).tolist()
    index = [k for k in candidates if read[k][0]]
    if whole or not index:
        return Picked(index, length, length)
    tokens, queries = max(read[k][1] for k in index), max(read[k][2] for k in index)
    return Picked(index, engine.verify_tokens(tokens), engine.queries(queries))


@dataclass(frozen=True)
class SpanInputs:
    """A verify forward of ``b`` rows over ``T = E + M`` tokens: E of the drafted block, M mask queries.

    ``ids, positions [b, T]``, ``mask [b, T, T]``; ``queries [b, M]``: in-block positions the queries stand at, ascending (L: padding).
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    queries: Tensor


def span_inputs(part: Draft, picked: Picked, start: Tensor, mask_id: int) -> SpanInputs:
    """Inputs for verifying the drafts ``part``, already those of the picked rows, whose blocks begin at positions ``start [b]``."""
    length, device = part.block.shape[1], part.block.device
    filled = torch.where(part.masked, part.tokens, part.block)[:, : picked.tokens]
    queries = torch.arange(picked.queries, device=device).expand(len(filled), -1)
    if picked.queries < length:
        queries = queries + part.first_masked[:, None]
        queries = torch.where(queries < (part.first_masked + part.span.sum(-1))[:, None], queries, length)
    ids = torch.cat([filled, torch.full_like(queries, mask_id)], 1)
    place = torch.cat([torch.arange(picked.tokens, device=device).expand_as(filled), queries], 1)
    positions = start[:, None] + place.clamp(max=length - 1)
    return SpanInputs(ids, positions, masks.span_verify(queries, picked.tokens), queries)
