"""Verifying only what drafted spans need: which rows, how much of their blocks, and the tokens of that forward.

For verifiers that see [drafted block | mask queries] (S2D2, the 2L layout): a token at position ``p`` is verified by a mask query that sees the drafted
tokens before ``p``. What stands behind the last span, and queries outside the spans, decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.gpu.graphs import Shape
from shared.network import masks
from shared.policy.draft import Draft
from shared.policy.routing import Policy


def query_sizes(block_length: int) -> list[int]:
    """Numbers of mask queries that verifies are captured with."""
    return sorted({max(1, block_length // 4), max(1, block_length // 2), block_length})


def two_copy_kinds(block_length: int) -> list[Shape]:
    """The forwards of one row that S2D2 asks for with this layout: drafts, commits going along, and verifies."""
    drafts = Shape(1, block_length, commit_rows=1, lasting=True)
    return [drafts, *(Shape(1, block_length + q, picks=q) for q in query_sizes(block_length))]


def wanted_spans(policy: Policy, draft: Draft, *, whole: bool) -> Tensor | None:
    """``[b, 3]``: does the policy want the first masked span verified, where does that end, and how long is it?

    None if the decision is constant and no host read is needed: nothing is verified, or ``whole`` blocks are. No host read.
    """
    decision = policy.decide(draft)
    if policy.constant is False or (policy.constant and whole):
        return None
    span = draft.span_length
    return torch.stack([decision.long(), draft.first_masked + span, span], 1)


@dataclass(frozen=True)
class VerifyPlan:
    """Rows of a draft to verify (indices into it), and how far: ``tokens`` of the block and ``queries`` mask tokens of the span."""

    index: list[int]
    tokens: int
    queries: int


def plan_verify(
    always: bool | None,
    wanted: Tensor | None,
    candidates: Sequence[int],
    block_length: int,
    *,
    whole: bool,
    sizes: Sequence[int] | None,
) -> VerifyPlan:
    """Which of the ``candidates``, rows of a draft that have a span, are verified, and how much a verify of them all has to carry.

    One packed read of ``wanted`` (see `wanted_spans`); without it ``always`` says whether all are. ``sizes``: the numbers of queries there are graphs for,
    all with the whole block (None: any number will do).
    """
    if wanted is None or not candidates:
        return VerifyPlan(list(candidates) if always else [], block_length, block_length)
    read = wanted.tolist()
    index = [k for k in candidates if read[k][0]]
    if whole or not index:
        return VerifyPlan(index, block_length, block_length)
    tokens, queries = max(read[k][1] for k in index), max(read[k][2] for k in index)
    if sizes is None:
        return VerifyPlan(index, tokens, queries)
    return VerifyPlan(index, block_length, next(q for q in sizes if q >= queries))


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
    offset = torch.arange(tokens, device=device).expand_as(filled)
    asked = torch.arange(queries, device=device).expand(len(filled), -1)
    if queries < length:
        asked = asked + draft.first_masked[:, None]
        asked = torch.where(asked < (draft.first_masked + draft.span_length)[:, None], asked, length)
    ids = torch.cat([filled, torch.full_like(asked, mask_id)], 1)
    positions = start[:, None] + torch.cat([offset, asked.clamp(max=length - 1)], 1)
    wanted = torch.arange(tokens, tokens + queries, device=device).expand(len(filled), -1)
    return SpanInputs(ids, positions, masks.span_verify(asked, tokens), asked, wanted)
