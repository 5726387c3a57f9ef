"""The kernels of a mixture of experts against `shared.network.experts`, for any routing.

Kernels run on a GPU, or in triton's interpreter with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import pytest
import torch

from shared.gpu import experts as moe
from shared.network.experts import group_limited_top_k, mix_chosen
from tests.fast_checks import DEVICE, ON_GPU, error, needs_gpu, needs_kernels

pytestmark = pytest.mark.gpu
PLANS = [None, moe.GroupedPlan(32, 32, 16), moe.GroupedPlan(16, 64, 32, stages=2)]


def _random(*shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


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
        order, starts = moe.bucket(experts.int(), 12)
        flat = experts.flatten()
        assert torch.equal(order.long(), flat.sort(stable=True).indices), name
        counts = torch.zeros(12, dtype=torch.long, device=DEVICE).scatter_add_(0, flat, torch.ones_like(flat))
        assert torch.equal(starts.diff().long(), counts), name
        assert int(starts[0]) == 0


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32])
def test_combine_adds_and_norms(dtype):
    tokens, top_k, hidden = 5, 3, 72
    parts, shared, x = (_random(n, hidden, dtype=dtype) for n in (tokens * top_k, tokens, tokens))
    weights, norm, squares = torch.rand(tokens, top_k, device=DEVICE), _random(hidden, dtype=dtype), _random(2, 32)
    routed = (parts.view(tokens, top_k, hidden).float() * weights[..., None]).sum(1).to(dtype)
    total = x + (routed + shared)
    kept = x.clone()
    finished = moe.combine(parts, weights, shared, kept, norm, eps=1e-6)
    tolerance = 2e-6 if dtype == torch.float32 else 6e-3
    assert error(kept, total) < tolerance
    wide = kept.double()
    assert error(finished, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.double()) < tolerance
    left = moe.combine(parts, weights, shared, x, norm, squares=squares)
    assert torch.equal(x, kept)
    assert error(left, wide * norm.double()) < tolerance
    assert error(squares[0, :tokens], wide.square().sum(-1)) < 1e-6
