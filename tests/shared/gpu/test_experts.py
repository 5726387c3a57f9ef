"""The kernels of a mixture of experts against `shared.network.experts` and their naive twins, for any routing."""

from __future__ import annotations

import pytest
import torch

from shared.gpu import experts as moe
from shared.network.experts import group_limited_top_k, mix_chosen
from tests.fast_checks import needs_gpu
from tests.shared.gpu.kernels import DEVICE, DTYPES, TOLERANCE, error, needs_kernels
from tests.shared.gpu.kernels import random_tensor as _random

pytestmark = pytest.mark.gpu
PLANS = [None, moe.GroupedPlan(32, 32, 16), moe.GroupedPlan(16, 64, 32, stages=2)]


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "groups", "top_groups"),
    [(1, 16, 4, 4, 2), (7, 24, 3, 3, 2), (40, 16, 1, 8, 4), (5, 10, 10, 1, 1), (3, 256, 8, 8, 4)],
)
def test_route_is_the_group_limited_choice(tokens, experts, top_k, groups, top_groups):
    logits, bias = _random(tokens, experts), _random(experts, scale=0.3)
    got, weights, row_scale = moe.route(logits, moe.Router(bias, top_k, groups, top_groups, 2.5))
    want, want_weights = group_limited_top_k(logits.sigmoid(), bias, top_k, groups, top_groups, 2.5)
    assert torch.equal(got.long(), want)
    assert error(weights, want_weights) < 1e-6
    assert row_scale is None


@needs_kernels
def test_route_divides_the_norm_that_was_left():
    logits, squares = _random(5, 8), _random(3, 32).square()
    *_, row_scale = moe.route(logits, moe.Router(_random(8), 2, 2, 1, 1.0), moe.Unscaled(squares, 3, 64, 1e-6))
    assert error(row_scale, torch.rsqrt(squares[:, :5].sum(0) / 64 + 1e-6)) < 1e-6


@needs_kernels
def test_scores_that_are_no_numbers_choose_experts_that_exist():
    logits = torch.full((3, 8), float("nan"), device=DEVICE)
    experts, *_ = moe.route(logits, moe.Router(_random(8), 2, 2, 1, 1.0))
    assert ((experts >= 0) & (experts < 8)).all()


def _routings(tokens: int, count: int, top_k: int) -> dict[str, torch.Tensor]:
    spread = torch.rand(tokens, count, device=DEVICE).argsort(-1)[:, :top_k]
    return {"random": spread, "few": spread % top_k, "one takes all": torch.full_like(spread, count - 1)}


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 6, 300])
def test_bucket_sorts_pairs_by_expert(tokens):
    for name, experts in _routings(tokens, 12, 3).items():
        for got, want in zip(moe.bucket(experts.int(), 12), moe.bucket_naive(experts.int(), 12), strict=True):
            assert torch.equal(got, want), name


def _mixed(x, experts, weights, gate, up, down, plan=None, row_scale=None) -> torch.Tensor:
    """All of it but the shared experts, onto an empty residual stream."""
    tokens, top_k = experts.shape
    buckets = moe.Buckets(*moe.bucket(experts.int(), len(up)), top_k)
    plans = [plan or moe.grouped_plan(tokens, top_k, w, gated) for w, gated in ((up, True), (down, False))]
    inner = moe.grouped_matmul(x, up, buckets, plans[0], gate=gate, row_scale=row_scale)
    parts = moe.grouped_matmul(inner, down, buckets, plans[1])
    out = torch.zeros_like(x)
    moe.combine(parts, weights, None, out, torch.ones_like(x[0]), eps=1e-6)
    return out


def _layer(tokens, count, top_k, hidden, width, dtype=torch.float32):
    x, weights = _random(tokens, hidden, dtype=dtype), torch.rand(tokens, top_k, device=DEVICE)
    gate, up = (_random(count, width, hidden, dtype=dtype, scale=0.1) for _ in range(2))
    return x, weights, gate, up, _random(count, hidden, width, dtype=dtype, scale=0.1)


@needs_kernels
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_equal_their_plain_twin(tokens, plan):
    """Sizes that no tile divides; experts with no token, one with all of them."""
    x, weights, gate, up, down = _layer(tokens, 12, 3, 72, 40)
    for name, experts in _routings(tokens, 12, 3).items():
        want = mix_chosen(x, experts, weights, gate, up, down)
        assert error(_mixed(x, experts, weights, gate, up, down, plan), want) < 2e-6, name


@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("tokens", [1, 32, 64, 256, 1024, 4096])
def test_experts_of_a_real_shape(tokens, dtype, tolerance):
    x, weights, gate, up, down = _layer(tokens, 256, 8, 512, 256, dtype)
    for name, experts in _routings(tokens, 256, 8).items():
        want = mix_chosen(x.double(), experts, weights.double(), gate.double(), up.double(), down.double())
        assert error(_mixed(x, experts, weights, gate, up, down), want) < tolerance, name


@needs_kernels
def test_a_row_scale_is_applied_before_the_gate():
    x, weights, gate, up, down = _layer(5, 6, 2, 64, 32)
    experts, scale = _routings(5, 6, 2)["random"], torch.rand(5, device=DEVICE) + 0.5
    want = mix_chosen(x * scale[:, None], experts, weights, gate, up, down)
    assert error(_mixed(x, experts, weights, gate, up, down, row_scale=scale), want) < 2e-6


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("finished", [True, False])
def test_combine_adds_and_norms(finished, shared, dtype):
    tokens, top_k, hidden = 5, 3, 72
    parts, x = (_random(n, hidden, dtype=dtype) for n in (tokens * top_k, tokens))
    shared = _random(tokens, hidden, dtype=dtype) if shared else None
    weights, norm = torch.rand(tokens, top_k, device=DEVICE), _random(hidden, dtype=dtype)
    streams, squares, normed = [x.clone(), x.clone()], [_random(2, 32), _random(2, 32)], []
    for function, stream, sums in zip((moe.combine, moe.combine_naive), streams, squares, strict=True):
        how = {"eps": 1e-6} if finished else {"squares": sums}
        normed.append(function(parts, weights, shared, stream, norm, **how))
    assert error(*streams) < TOLERANCE[dtype]
    assert error(*normed) < TOLERANCE[dtype]
    if not finished:
        assert error(squares[0][0, :tokens], squares[1][0, :tokens]) < TOLERANCE[dtype]


def test_the_naive_twins_by_hand():
    """Pairs of two tokens with experts (2, 0) and (2, 3) of four; one token of two parts, weighed 1/2 and 2."""
    order, starts = moe.bucket_naive(torch.tensor([[2, 0], [2, 3]]), 4)
    assert (order.tolist(), starts.tolist()) == ([1, 0, 2, 3], [0, 1, 1, 3, 4])
    x, weights = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 2.0]])
    parts, shared = torch.tensor([[2.0, 4.0], [0.5, 0.0]]), torch.tensor([[0.0, 2.0]])
    # 1 + (1 + 1) + 0 = 3 and 0 + (2 + 0) + 2 = 4; the rms of (3, 4) is sqrt(12.5).
    normed = moe.combine_naive(parts, weights, shared, x, torch.tensor([1.0, 2.0]), eps=0.0)
    assert x.tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(normed, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
