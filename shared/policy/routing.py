"""Routing policies: whether a drafted span is worth a verify forward (S2D2, routing).

A policy decides for all rows at once and keeps its state per row: ``decide(draft) -> [b] bool``, ``observe(draft, decision, count)`` after
the step, ``reset(rows)`` when a row takes a new request. ``constant`` is True or False when the decision never depends on the draft, so
that the loop need not read it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from shared.options import Bandit, Estimation, Routing, Unmask
from shared.policy.acceptance import estimate, expected_accepted_length, normalized_entropy
from shared.policy.draft import Draft


class Policy:
    """Base: no state, nothing to learn. ``STATE`` names the tensors a policy keeps between steps."""

    STATE: ClassVar[tuple[str, ...]] = ()

    constant: bool | None = None

    def decide(self, draft: Draft) -> Tensor:
        """``[b]`` bool: verify this row's span?"""
        return torch.full_like(draft.rows, bool(self.constant), dtype=torch.bool)

    def observe(self, draft: Draft, decision: Tensor, count: Tensor) -> None:
        """Learn from a finished step: ``decision [b]`` was taken and ``count [b]`` tokens were decoded."""

    def reset(self, rows: Sequence[int]) -> None:
        """Forget what was learned for these rows."""


class Always(Policy):
    constant = True


class Never(Policy):
    constant = False


class MaskSpanLength(Policy):
    """Verify spans of at least ``min_ssd_span_length`` tokens; with the legacy rule also shorter ones while few positions are confident."""

    def __init__(self, routing: Routing, unmask: Unmask):
        self.options, self.unmask = routing, unmask
        self.constant = True if routing.min_ssd_span_length == 1 else None

    def decide(self, draft: Draft) -> Tensor:
        shortest = self.options.min_ssd_span_length
        verify = draft.span_length >= shortest
        if self.options.legacy_ssd_span_strategy:
            verify |= confident(draft, self.unmask) < draft.masked.sum(-1).clamp(max=shortest)
        return verify


def confident(draft: Draft, options: Unmask) -> Tensor:
    """``[b]``: positions that may be filled now and whose draft is above ``confidence_threshold``."""
    return (draft.fillable & (draft.confidence > options.confidence_threshold)).sum(-1)


class _Scored(Policy):
    """Score = expected accepted length less a price (S2D2, routing score)."""

    def __init__(self, routing: Routing, estimation: Estimation, unmask: Unmask):
        self.options, self.estimation, self.unmask = routing, estimation, unmask

    def score(self, draft: Draft) -> Tensor:
        """``[b]``: ``E[K] - c`` (static) or ``E[K] - c x confident positions`` (dynamic); minus infinity where nothing is masked."""
        alpha = estimate(draft.log_weights, draft.confidence, self.estimation)
        gain = expected_accepted_length(alpha, draft.span)
        dynamic = self.options.do_verify_score_type == "difference_dynamic"
        score = gain - self.options.score_penalty_coef * (confident(draft, self.unmask) if dynamic else 1)
        return score.masked_fill(~draft.masked.any(-1), -torch.inf)


class ScoreThreshold(_Scored):
    """Verify from ``do_verify_score_threshold`` on."""

    def decide(self, draft: Draft) -> Tensor:
        return self.score(draft) >= self.options.do_verify_score_threshold


class ScoreHysteresis(_Scored):
    """A switch per row: on above ``hysteresis_threshold_on``, off below ``hysteresis_threshold_off``, kept across blocks."""

    STATE = ("on",)

    def __init__(self, routing: Routing, estimation: Estimation, unmask: Unmask, rows: int, device):
        super().__init__(routing, estimation, unmask)
        self.on = torch.zeros(rows, dtype=torch.bool, device=device)

    def decide(self, draft: Draft) -> Tensor:
        score = self.score(draft)
        stay = score >= self.options.hysteresis_threshold_off
        verify = torch.where(self.on[draft.rows], stay, score > self.options.hysteresis_threshold_on)
        self.on[draft.rows] = verify
        return verify

    def reset(self, rows: Sequence[int]) -> None:
        if rows:
            self.on[list(rows)] = False


class ContextualBanditUCB(Policy):
    """Two arms (skip, verify) per context bucket, upper confidence bound, reward = tokens per forward of the step.

    A bucket is (span length, block progress, draft entropy), each binned. An arm never tried scores infinity; ties verify. A step with nothing masked
    is no trial.
    """

    STATE = ("tries", "reward", "time", "current")

    def __init__(self, bandit: Bandit, rows: int, device):
        self.options = bandit
        self.bins = (bandit.ucb_span_length_bins, bandit.ucb_block_progress_bins, bandit.ucb_entropy_bins)
        buckets = self.bins[0] * self.bins[1] * self.bins[2]
        self.tries = torch.zeros(rows, 2, buckets, dtype=torch.float64, device=device)
        self.reward = torch.zeros_like(self.tries)
        self.time = torch.zeros(rows, dtype=torch.float64, device=device)
        # Buckets of the last decision, for the observation that follows it.
        self.current = torch.zeros(rows, dtype=torch.long, device=device)

    def bucket(self, draft: Draft) -> Tensor:
        """``[b]`` index of each row's context."""
        length = draft.masked.shape[1]
        where = draft.span if self.options.ucb_entropy_source == "span" else draft.masked
        mean_entropy = (normalized_entropy(draft.log_weights) * where).sum(-1) / where.sum(-1).clamp(min=1)
        values = (draft.span_length, draft.progress, mean_entropy)
        ranges = ((1, length if draft.in_flight is None else draft.in_flight), (0, 1), (0, 1))
        index = torch.zeros_like(draft.rows)
        for value, (low, high), bins in zip(values, ranges, self.bins, strict=True):
            index = index * bins + bin_of(value.double(), low, high, bins)
        return index

    def decide(self, draft: Draft) -> Tensor:
        self.time[draft.rows] += draft.masked.any(-1)
        self.current[draft.rows] = bucket = self.bucket(draft)
        tries, reward = self.tries[draft.rows, :, bucket], self.reward[draft.rows, :, bucket]
        width = (self.time[draft.rows, None].log() / tries).sqrt() * self.options.ucb_beta
        bound = torch.where(tries > 0, reward / tries + width, torch.inf)
        return bound[:, 1] >= bound[:, 0]

    def observe(self, draft: Draft, decision: Tensor, count: Tensor) -> None:
        arm, bucket = decision.long(), self.current[draft.rows]
        self.tries[draft.rows, arm, bucket] += draft.masked.any(-1)
        self.reward[draft.rows, arm, bucket] += count / (1.0 + arm)

    def reset(self, rows: Sequence[int]) -> None:
        if rows:
            rows = list(rows)
            self.tries[rows], self.reward[rows], self.time[rows] = 0, 0, 0


def bin_of(value: Tensor, low: float, high: float | Tensor, bins: int) -> Tensor:
    """Which of ``bins`` equal parts of [low, high] holds ``value [b]`` (clipped into it); ``high`` may differ by row."""
    if bins <= 1:
        return torch.zeros_like(value, dtype=torch.long)
    high = high.to(value.dtype) if isinstance(high, Tensor) else torch.full_like(value, high)
    inside = torch.minimum(value.clamp(min=low), high)
    part = (bins * (inside - low) / (high - low)).floor().long().clamp(max=bins - 1)
    return torch.where(high > low, part, 0)


def make_policy(
    routing: Routing, bandit: Bandit, estimation: Estimation, unmask: Unmask, *, rows: int, device
) -> Policy:
    """The policy that ``routing`` names, with state for ``rows`` rows."""
    match routing.do_verify_policy:
        case "always":
            return Always()
        case "never":
            return Never()
        case "mask_span_length":
            return MaskSpanLength(routing, unmask)
        case "score_threshold":
            return ScoreThreshold(routing, estimation, unmask)
        case "score_hysteresis":
            return ScoreHysteresis(routing, estimation, unmask, rows, device)
        case "contextual_bandit_ucb":
            return ContextualBanditUCB(bandit, rows, device)
