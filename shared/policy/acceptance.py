"""Estimates of how likely the verifier is to accept a drafted token, from the draft alone (S2D2, acceptance estimators).

Each is ``estimator(log_weights [..., V], confidence [...], options) -> alpha [...]`` in [0, 1]. ``log_weights`` are transformed
draft logits (`shared.policy.sampling.transform`), ``confidence`` is what the drafter gave its own token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared.options import Estimation


def normalized_entropy(log_weights: Tensor) -> Tensor:
    """``-sum P ln max(P, 1e-12) / ln V``: 0 for certainty, 1 for the uniform distribution."""
    return entropy(log_weights) / math.log(log_weights.shape[-1])


def entropy(log_weights: Tensor) -> Tensor:
    """Entropy ``[...]`` in nats of the softmax of ``log_weights [..., V]``."""
    probs = log_weights.softmax(-1)
    return -(probs * probs.clamp_min(1e-12).log()).sum(-1)


def margin(log_weights: Tensor) -> Tensor:
    """Probability of the most likely token less that of the second."""
    top = log_weights.softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def hard_margin_threshold(log_weights: Tensor, confidence: Tensor, options: Estimation) -> Tensor:
    """1 where the margin exceeds t, else 0."""
    return (margin(log_weights) > options.ssd_confidence_margin_threshold).float()


def hard_entropy_threshold(log_weights: Tensor, confidence: Tensor, options: Estimation) -> Tensor:
    """1 where the normalized entropy is below t, else 0."""
    return (normalized_entropy(log_weights) < options.ssd_entropy_threshold).float()


def soft_confidence_power(log_weights: Tensor, confidence: Tensor, options: Estimation) -> Tensor:
    """confidence ** e."""
    return confidence.clamp(0, 1) ** options.ssd_confidence_power


def soft_clipped_linear_margin(log_weights: Tensor, confidence: Tensor, options: Estimation) -> Tensor:
    """coefficient x margin, clipped to [0, 1]."""
    return (options.ssd_confidence_margin_coef * margin(log_weights)).clamp(0, 1)


def soft_entropy_negexp(log_weights: Tensor, confidence: Tensor, options: Estimation) -> Tensor:
    """exp(-T x normalized entropy)."""
    return (-options.ssd_entropy_temperature * normalized_entropy(log_weights)).exp()


def soft_renyi_2_entropy(log_weights: Tensor, confidence: Tensor, options: Estimation) -> Tensor:
    """Collision probability: sum P ** 2."""
    return log_weights.softmax(-1).square().sum(-1)


ESTIMATORS = {
    "hard_margin_threshold": hard_margin_threshold,
    "hard_entropy_threshold": hard_entropy_threshold,
    "soft_confidence_power": soft_confidence_power,
    "soft_clipped_linear_margin": soft_clipped_linear_margin,
    "soft_entropy_negexp": soft_entropy_negexp,
    "soft_renyi_2_entropy": soft_renyi_2_entropy,
}


def estimate(log_weights: Tensor, confidence: Tensor, options: Estimation) -> Tensor:
    """The estimator that ``options`` names, clamped to [0, 1]."""
    return ESTIMATORS[options.token_acceptance_estimator](log_weights, confidence, options).clamp(0, 1)


def expected_accepted_length(alpha: Tensor, span: Tensor) -> Tensor:
    """``E[K] = sum_k prod_{i <= k} alpha_i`` over the span (S2D2, routing score): ``alpha [B, L]``, ``span [B, L]`` -> ``[B]``."""
    alive = torch.where(span, alpha, torch.ones_like(alpha)).cumprod(-1)
    return (alive * span).sum(-1)
