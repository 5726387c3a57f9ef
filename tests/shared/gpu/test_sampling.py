"""The one-pass greedy choice against its naive twin, and that against torch's softmax."""

from __future__ import annotations

import pytest
import torch

from shared.gpu.sampling import greedy, greedy_naive
from tests.shared.gpu.kernels import DEVICE, needs_kernels

pytestmark = pytest.mark.gpu


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3000), (1, 7001), (0, 40), (40, 2049), (16, 20_000)])
def test_the_likeliest_and_its_probability(shape):
    logits = torch.randn(*shape, device=DEVICE)
    ids, probs = greedy(logits)
    want_ids, want = greedy_naive(logits)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(probs, want, atol=1e-6, rtol=1e-5)


def test_the_naive_twin_is_the_best_of_a_softmax():
    logits = torch.randn(4, 30, device=DEVICE)
    best = logits.softmax(-1).max(-1)
    ids, probs = greedy_naive(logits.bfloat16().float())
    assert torch.equal(greedy_naive(logits)[0], best.indices)
    torch.testing.assert_close(greedy_naive(logits)[1], best.values, atol=1e-6, rtol=1e-5)
    for got, want in zip(greedy_naive(logits.bfloat16()), (ids, probs), strict=True):
        assert torch.equal(got, want), "in float32, whatever the logits are"


@needs_kernels
def test_ties_go_to_the_smallest_id():
    logits = torch.zeros(2, 9000, device=DEVICE)
    logits[0, 5000] = logits[0, 8000] = 3
    assert greedy(logits)[0].tolist() == [5000, 0]


@needs_kernels
def test_a_token_ruled_out_is_never_chosen():
    logits = torch.randn(2, 6000, device=DEVICE)
    logits[0, :4000] = float("-inf")
    ids, probs = greedy(logits)
    assert int(ids[0]) >= 4000
    torch.testing.assert_close(probs, logits.softmax(-1).amax(-1), atol=1e-6, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows(bad):
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, 4999] = bad
    assert torch.isfinite(greedy(logits)[1]).tolist() == [True, False, True]
