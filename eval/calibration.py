"""Calibration: drafter confidence against verifier acceptance."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shared.options import Estimation
from shared.policy.accept import Verdict, accept_span
from shared.policy.acceptance import ESTIMATORS
from shared.policy.draft import Draft
from shared.trace import How

BINS = 10


def bins_of(pairs: Iterable[tuple[float, bool]]) -> list[list[float]]:
    """``[count, sum of the predictions, how many were observed]`` of each tenth of [0, 1]."""
    bins = [[0, 0.0, 0] for _ in range(BINS)]
    for predicted, true in pairs:
        cell = bins[min(BINS - 1, int(predicted * BINS))]
        cell[0] += 1
        cell[1] += predicted
        cell[2] += bool(true)
    return bins


def merged(first: list[list[float]] | None, second: list[list[float]]) -> list[list[float]]:
    """The bins of both."""
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)] if first else second


def of_verified(record: dict) -> list[tuple[float, bool]]:
    """``(drafter's confidence, was the draft accepted)`` at the positions of a text that a verifier judged."""
    judged = {int(How.ACCEPTED): True, int(How.RESAMPLED): False, int(How.KEPT): False}
    return [(c, judged[h]) for c, h in zip(record["confidence"], record["how"], strict=True) if h in judged]


def of_unverified(record: dict, baseline: list[int]) -> list[tuple[float, bool]]:
    """``(confidence, is it block size one's token)`` where no verifier filled a position, up to the first that is
    not."""
    found = []
    for confidence, how, token, truth in zip(
        record["confidence"], record["how"], record["ids"], baseline, strict=False
    ):
        if how == How.UNMASKED:
            found.append((confidence, token == truth))
        if token != truth:
            break
    return found


class Recorder:
    """A `shared.policy.accept.accept_span` that also asks every acceptance estimator about the drafts it judges;
    ``bins`` by estimator."""

    def __init__(self):
        self.options = Estimation()
        self.bins: dict[str, list[list[float]]] = {}

    def __call__(self, draft: Draft, logits, queries, options, sampling, uniforms) -> Verdict:
        verdict = accept_span(draft, logits, queries, options, sampling, uniforms)
        judged = verdict.accepted | verdict.rejected
        weights, confidence = draft.log_weights[judged], draft.confidence[judged]
        true = verdict.accepted[judged].tolist()
        alphas = {name: estimate(weights, confidence, self.options) for name, estimate in ESTIMATORS.items()}
        for name, alpha in {"confidence": confidence, **alphas}.items():
            pairs = zip(torch.as_tensor(alpha).clamp(0, 1).tolist(), true, strict=True)
            self.bins[name] = merged(self.bins.get(name), bins_of(pairs))
        return verdict
