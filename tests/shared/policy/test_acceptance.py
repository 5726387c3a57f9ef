from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.options import Estimation
from shared.policy.acceptance import ESTIMATORS, entropy, estimate, expected_accepted_length, margin, normalized_entropy
from shared.policy.sampling import transform

P = torch.tensor([0.5, 0.25, 0.25])
H = 1.5 * math.log(2)  # 0.5 ln 2 + 2 x 0.25 ln 4, in nats


def alpha(name: str, probs: torch.Tensor = P, confidence: float = 0.5, **flat) -> float:
    options = Estimation(token_acceptance_estimator=name, **flat)
    return float(estimate(probs.log(), torch.tensor(confidence), options))


def test_margin_by_hand():
    assert float(margin(P.log())) == pytest.approx(0.25)
    assert alpha("hard_margin_threshold", ssd_confidence_margin_threshold=0.24) == 1
    assert alpha("hard_margin_threshold", ssd_confidence_margin_threshold=0.26) == 0
    exact = torch.tensor([0.0, 0.0])  # two equal tokens: a margin of exactly 0, which does not exceed 0
    assert float(ESTIMATORS["hard_margin_threshold"](exact, P, Estimation(ssd_confidence_margin_threshold=0.0))) == 0
    assert alpha("soft_clipped_linear_margin", ssd_confidence_margin_coef=2.0) == pytest.approx(0.5)
    assert alpha("soft_clipped_linear_margin", ssd_confidence_margin_coef=5.0) == 1
    assert alpha("soft_clipped_linear_margin", ssd_confidence_margin_coef=-1.0) == 0


def test_entropy_by_hand():
    assert float(entropy(P.log())) == pytest.approx(H)
    assert float(normalized_entropy(P.log())) == pytest.approx(H / math.log(3))
    assert alpha("hard_entropy_threshold", ssd_entropy_threshold=H / math.log(3) + 0.01) == 1
    assert alpha("hard_entropy_threshold", ssd_entropy_threshold=H / math.log(3) - 0.01) == 0
    assert alpha("soft_entropy_negexp", ssd_entropy_temperature=2.0) == pytest.approx(math.exp(-2 * H / math.log(3)))


def test_confidence_power_and_collision_by_hand():
    assert alpha("soft_confidence_power", confidence=0.25, ssd_confidence_power=0.5) == pytest.approx(0.5)
    assert alpha("soft_confidence_power", confidence=1.0000001) == 1
    assert alpha("soft_renyi_2_entropy") == pytest.approx(0.375)  # 1/4 + 1/16 + 1/16


@pytest.mark.parametrize("width", [2, 3, 4, 9])
def test_extremes(width):
    flat = torch.zeros(width)
    sure = torch.full((width,), -math.inf).index_fill(0, torch.tensor([0]), 0.0)
    assert float(normalized_entropy(flat)) == pytest.approx(1.0)
    assert float(normalized_entropy(sure)) == 0
    assert float(margin(flat)) == 0
    assert float(margin(sure)) == 1
    assert float(ESTIMATORS["soft_renyi_2_entropy"](flat, flat, Estimation())) == pytest.approx(1 / width)


def test_entropy_is_in_units_of_the_full_vocabulary():
    """Top-k leaves two equal tokens of four: ln 2 / ln 4, not ln 2 / ln 2."""
    kept = transform(torch.tensor([1.0, 1.0, 0.0, -1.0]), top_k=2)
    assert float(normalized_entropy(kept)) == pytest.approx(0.5)
    assert alpha("soft_entropy_negexp", kept.exp()) == pytest.approx(math.exp(-0.5))


values = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=6)


@given(st.sampled_from(sorted(ESTIMATORS)), values, st.floats(0, 1, width=32), st.floats(-3, 3), st.integers(0, 3))
def test_estimates_are_probabilities(name, logits, confidence, parameter, top_k):
    options = Estimation(
        token_acceptance_estimator=name,
        ssd_confidence_margin_coef=parameter,
        ssd_entropy_temperature=parameter,
        ssd_confidence_power=abs(parameter),
    )
    got = estimate(transform(torch.tensor(logits), top_k=top_k), torch.tensor(confidence), options)
    assert 0 <= float(got) <= 1


@given(values)
def test_entropy_by_its_definition(logits):
    weights = [math.exp(v - max(logits)) for v in logits]
    probs = [w / sum(weights) for w in weights]
    want = -sum(p * math.log(max(p, 1e-12)) for p in probs)
    assert float(entropy(torch.tensor(logits))) == pytest.approx(want, abs=1e-5)


def test_estimators_work_on_blocks():
    logits, confidence = (
        torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)),
        torch.linspace(0, 1, 10).view(2, 5),
    )
    for name in ESTIMATORS:
        options = Estimation(token_acceptance_estimator=name)
        got = estimate(logits, confidence, options)
        assert got.shape == (2, 5)
        assert torch.allclose(got[1, 3], estimate(logits[1, 3], confidence[1, 3], options))


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=7), st.integers(0, 6), st.integers(0, 7))
def test_expected_accepted_length_by_enumeration(alphas, first, length):
    """E[K]: average length of the accepted prefix, over all outcomes of independent acceptances."""
    inside = list(range(first, min(first + length, len(alphas))))
    span = torch.tensor([[i in inside for i in range(len(alphas))]])
    want = 0.0
    for outcome in range(2 ** len(inside)):
        chance, prefix, alive = 1.0, 0, True
        for k, i in enumerate(inside):
            accepted = bool(outcome >> k & 1)
            chance *= alphas[i] if accepted else 1 - alphas[i]
            alive = alive and accepted
            prefix += alive
        want += chance * prefix
    got = expected_accepted_length(torch.tensor([alphas]), span)
    assert float(got) == pytest.approx(want, abs=1e-5)


def test_expected_accepted_length_by_hand():
    # the span is positions 1 and 2: 0.5 + 0.5 x 0.4 = 0.7; the 0.1 before it does not count
    alphas, span = torch.tensor([[0.1, 0.5, 0.4, 0.9]]), torch.tensor([[False, True, True, False]])
    assert float(expected_accepted_length(alphas, span)) == pytest.approx(0.7)
