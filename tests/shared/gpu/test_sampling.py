"""The one-pass greedy choice against torch's."""

from __future__ import annotations

import pytest
import torch

from shared.gpu import sampling as triton_sampling
from shared.gpu import triton_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not triton_ops.available(DEVICE), reason="no CUDA device, and triton does not interpret"),
]


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3000), (1, 7001), (0, 40), (40, 2049), (16, 20_000)])
def test_the_likeliest_and_its_probability(shape):
    logits = torch.randn(*shape, device=DEVICE)
    ids, probs = triton_sampling.greedy(logits)
    best = logits.softmax(-1).max(-1)
    assert torch.equal(ids, best.indices)
    torch.testing.assert_close(probs, best.values, atol=1e-6, rtol=1e-5)


def test_ties_go_to_the_smallest_id():
    logits = torch.zeros(2, 9000, device=DEVICE)
    logits[0, 5000] = logits[0, 8000] = 3
    assert triton_sampling.greedy(logits)[0].tolist() == [5000, 0]


def test_a_token_ruled_out_is_never_chosen():
    logits = torch.randn(2, 6000, device=DEVICE)
    logits[0, :4000] = float("-inf")
    ids, probs = triton_sampling.greedy(logits)
    assert int(ids[0]) >= 4000
    torch.testing.assert_close(probs, logits.softmax(-1).amax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows(bad):
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, 4999] = bad
    assert torch.isfinite(triton_sampling.greedy(logits)[1]).tolist() == [True, False, True]
