"""Unmasking rules: which masked positions of a block a step fills from its draft.

Every rule returns ``(take [b, L] bool, key [b, L])``; positions are recorded in ascending key. ``eligible [b, L]`` are the positions
that may be taken and ``count [b]`` is the step's quota.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.options import Unmask
from shared.policy.acceptance import entropy
from shared.policy.draft import Draft, rank_by


def step_quota(block_length: int, steps: int) -> list[int]:
    """Tokens due at each step: ``L // S``, one more in the first ``L mod S`` steps, at least one."""
    return [max(1, block_length // steps + (s < block_length % steps)) for s in range(steps)]


def most_confident(confidence: Tensor, eligible: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The ``count`` most confident (``low_confidence_static``)."""
    return eligible & (rank_by(-confidence, eligible) < count[:, None]), -confidence


def above_threshold(confidence: Tensor, eligible: Tensor, count: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """All strictly above ``threshold`` where at least ``count`` are, else the ``count`` most confident (``low_confidence_dynamic``)."""
    high = eligible & (confidence > threshold)
    top, key = most_confident(confidence, eligible, count)
    return torch.where((high.sum(-1) >= count)[:, None], high, top), key


def leftmost(eligible: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The first ``count`` (``sequential``)."""
    index = torch.arange(eligible.shape[-1], device=eligible.device).expand(eligible.shape)
    return eligible & (rank_by(index, eligible) < count[:, None]), index


def within_budget(
    cost: Tensor, eligible: Tensor, budget: float, at_least: Tensor, at_most: Tensor
) -> tuple[Tensor, Tensor]:
    """The cheapest positions while their running total stays below ``budget``; between ``at_least`` and ``at_most`` of them."""
    rank = rank_by(cost, eligible)
    ordered = torch.where(eligible, cost, 0.0).gather(-1, rank.argsort(-1))
    fits = (ordered.cumsum(-1) < budget) & (
        torch.arange(cost.shape[-1], device=cost.device) < eligible.sum(-1)[:, None]
    )
    count = torch.minimum(torch.maximum(fits.sum(-1), at_least), at_most)
    return eligible & (rank < count[:, None]), cost


def block_sum_entropy(confidence: Tensor) -> Tensor:
    """``-sum c ln c`` over the whole block, the same number at every position (the published ``entropy_bounded``)."""
    c = confidence.clamp_min(1e-12)
    return (-(c * c.log()).sum(-1, keepdim=True)).expand_as(confidence)


def unmask(
    draft: Draft, eligible: Tensor, quota: Tensor, options: Unmask, *, overtime: Tensor, cap: bool
) -> tuple[Tensor, Tensor]:
    """Apply the rule ``options`` names.

    ``quota [b]``: tokens due now; rows with none due take nothing. The entropy rules have a budget instead of a quota: they take
    at least one token, at least the quota in ``overtime [b]`` (all steps used up, masks left), and at most the quota when ``cap``.
    """
    quota = torch.minimum(quota, eligible.sum(-1))
    match options.remasking_strategy:
        case "low_confidence_static":
            take, key = most_confident(draft.confidence, eligible, quota)
        case "low_confidence_dynamic":
            take, key = above_threshold(draft.confidence, eligible, quota, options.confidence_threshold)
        case "sequential":
            take, key = leftmost(eligible, quota)
        case "entropy_bounded" | "entropy_bounded_blocksum" as rule:
            cost = (
                entropy(draft.logits[draft.entry].float())
                if rule == "entropy_bounded"
                else block_sum_entropy(draft.confidence)
            )
            at_least = torch.where(overtime, quota, quota.clamp(max=1))
            at_most = quota if cap else eligible.sum(-1)
            take, key = within_budget(cost, eligible, options.eb_threshold, at_least, at_most)
    return take & (quota > 0)[:, None], key
