from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from d2f.options import Sampling
from shared.policy.sampling import greedy, inverse_cdf, log_weights, sample, transform

logits = st.lists(st.integers(-24, 24).map(lambda k: k / 8), min_size=1, max_size=9)  # ties are frequent


def filtered(values: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The filtered distribution by its definition, in plain Python."""
    scaled = [v / temperature for v in values]
    if top_k:
        kth = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        scaled = [v if v >= kth else -math.inf for v in scaled]
    weights = [math.exp(v - max(scaled)) for v in scaled]
    probs = [w / sum(weights) for w in weights]
    if top_p < 1:
        before, kept = 0.0, set()
        for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if not kept or before <= top_p:
                kept.add(i)
            before += probs[i]
        probs = [p if i in kept else 0.0 for i, p in enumerate(probs)]
    return [p / sum(probs) for p in probs]


@given(
    logits, st.sampled_from([0.3, 0.7, 1.0, 2.5]), st.integers(0, 10), st.sampled_from([0.013, 0.31, 0.77, 0.93, 1.0])
)
def test_transform_by_its_definition(values, temperature, top_k, top_p):
    got = transform(torch.tensor(values), temperature, top_k, top_p).softmax(-1)
    assert got.tolist() == pytest.approx(filtered(values, temperature, top_k, top_p), abs=1e-6)


def test_top_k_keeps_ties_with_the_kth():
    got = transform(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), top_k=2)
    assert got.tolist() == [-math.inf, 3.0, 2.0, 2.0, -math.inf]
    assert transform(torch.tensor([1.0, 2.0]), top_k=5).tolist() == [1.0, 2.0]


def test_top_p_boundary():
    # probabilities 0.5, 0.25, 0.125, 0.125; mass before each: 0, 0.5, 0.75, 0.875
    values = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()
    kept = lambda p: transform(values, top_p=p).isfinite().tolist()  # noqa: E731
    assert kept(0.49) == [False, True, False, False], "0.5 before the second exceeds 0.49"
    assert kept(0.6) == [False, True, False, True]
    assert kept(0.8) == [True, True, False, True], "the lower id comes first among equals"
    assert kept(1e-9) == [False, True, False, False], "the first always stays"
    assert kept(1.0) == [True] * 4


def test_top_p_keeps_a_token_whose_mass_before_it_is_p_to_the_bit():
    for seed in range(200):
        values = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        mass = values.sort(descending=True).values.softmax(-1).cumsum(-1)
        want = int((torch.cat([torch.zeros(1), mass[:-1]]) <= mass[2]).sum())
        assert int(transform(values, top_p=float(mass[2])).isfinite().sum()) == want


def test_top_p_looks_at_what_top_k_left():
    # 0.4, 0.3, 0.2, 0.1 after top-k 2 is 4/7, 3/7: the mass before the second, 0.571, is over 0.5
    values = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert transform(values, top_k=2, top_p=0.5).isfinite().tolist() == [True, False, False, False]
    assert transform(values, top_p=0.5).isfinite().tolist() == [True, True, False, False]


def test_transform_at_temperature_zero_filters_nothing():
    values = torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16)
    got = transform(values, 0.0, 1, 0.1)
    assert got.dtype == torch.float32
    assert got.tolist() == [1.0, 3.0, 2.0]


@given(logits, st.sampled_from([0.5, 1.0]), st.integers(0, 4), st.sampled_from([0.4, 1.0]))
def test_transform_handles_rows_alone(values, temperature, top_k, top_p):
    row = torch.tensor(values)
    batch = torch.stack([row, row.flip(0), row * 2])
    got = transform(batch, temperature, top_k, top_p)
    for k, one in enumerate(batch):
        assert torch.equal(got[k], transform(one, temperature, top_k, top_p))


weights = st.lists(st.sampled_from([0, 0, 1, 2, 5, 1000]), min_size=1, max_size=8).filter(any)


def scan(probs: torch.Tensor, u: float) -> int:
    """The smallest id whose cumulative probability exceeds ``u``; the last of non-zero probability if none does."""
    total = 0.0
    for token, p in enumerate(probs.tolist()):
        total += p
        if total > u:
            return token
    return max(t for t, p in enumerate(probs.tolist()) if p > 0)


@given(weights, st.integers(0, (1 << 24) - 1))
def test_inverse_cdf_is_the_scan(raw, bits):
    probs = torch.tensor(raw, dtype=torch.float32) / sum(raw)
    u = bits / (1 << 24)
    got = int(inverse_cdf(probs, torch.tensor(u, dtype=torch.float32)))
    assert got == scan(probs, u)
    assert probs[got] > 0


@given(weights)
def test_inverse_cdf_at_the_boundaries(raw):
    """A uniform equal to a cumulative probability belongs to the next token that can be drawn."""
    probs = torch.tensor(raw, dtype=torch.float64) / 1024  # exact; the total may be under or over 1
    bounds = probs.cumsum(-1)
    for u in [0.0, *bounds.tolist()]:
        got = int(inverse_cdf(probs, torch.tensor(u, dtype=torch.float64)))
        assert got == scan(probs, u)
        assert probs[got] > 0


def test_inverse_cdf_worked():
    # cumulative 0, 0.25, 0.25, 0.75, 1.0, 1.0
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999999])
    assert inverse_cdf(probs.expand(6, 6), u).tolist() == [1, 1, 3, 3, 4, 4]


def test_inverse_cdf_falls_back_to_the_last_possible_id():
    # rounding left a total of 0.9: nothing exceeds 0.95
    assert int(inverse_cdf(torch.tensor([0.4, 0.5, 0.0]), torch.tensor(0.95))) == 1


def test_draws_at_even_uniforms_have_the_distribution():
    probs = torch.tensor([0.05, 0.0, 0.45, 0.3, 0.2])
    n = 1000
    u = (torch.arange(n) + 0.5) / n
    drawn = inverse_cdf(probs.expand(n, -1), u).bincount(minlength=5)
    assert drawn.tolist() == [50, 0, 450, 300, 200]


def test_sampled_frequencies_have_the_filtered_distribution():
    """False alarm odds 1e-4; the seed is fixed."""
    values = [0.3, -1.0, 1.2, 0.9, 0.0]
    u = torch.from_numpy(np.random.default_rng(0).random(20_000))
    ids, confidence = sample(torch.tensor(values).expand(20_000, -1), u, 0.8, 4, 0.95)
    distribution = filtered(values, 0.8, 4, 0.95)
    possible = [i for i, p in enumerate(distribution) if p]
    seen = ids.bincount(minlength=5)
    assert seen.sum() == seen[possible].sum()
    assert chisquare(seen[possible].numpy(), [distribution[i] * 20_000 for i in possible]).pvalue > 1e-4
    assert confidence.tolist() == pytest.approx([distribution[i] for i in ids.tolist()], abs=1e-6)


@given(logits)
def test_greedy_confidence_is_the_softmax_probability(values):
    ids, confidence = greedy(torch.tensor(values))
    assert int(ids) == values.index(max(values)), "the lowest id among equals"
    assert float(confidence) == pytest.approx(max(filtered(values, 1.0, 0, 1.0)), rel=1e-5)


def test_greedy_ignores_temperature_and_filters():
    values = torch.tensor([[0.2, 1.5, -2.0]])
    for temperature in (0.0, 9e-7):
        ids, confidence = sample(values, None, temperature, 1, 0.1)
        assert ids.tolist() == [1]
        assert confidence.item() == pytest.approx(filtered(values[0].tolist(), 1.0, 0, 1.0)[1])


def test_greedy_with_a_token_ruled_out():
    ids, confidence = greedy(torch.tensor([math.log(3.0), 0.0, -math.inf]))
    assert int(ids) == 0
    assert float(confidence) == pytest.approx(0.75)  # 3 / (3 + 1 + 0)


def test_filters_in_the_published_order_of_d2f():
    """top_p before top_k, and at temperature 0 as well: the mass before a token is counted of all tokens, not of the k that are left."""
    values = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    weights = lambda first, **how: log_weights(values, Sampling(top_p_first=first, **how)).isfinite().tolist()  # noqa: E731
    how = {"temperature": 1.0, "top_k": 3, "top_p": 0.75}
    assert weights(True, **how) == [True, True, True, False], "mass before the third is .7"
    assert weights(False, **how) == [True, True, False, False], "it is .78 of the three that top_k left"
    assert weights(True, top_k=1) == [True, False, False, False]
    assert weights(False, top_k=1) == [True] * 4
