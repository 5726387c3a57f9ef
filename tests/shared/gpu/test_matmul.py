"""Small-batch matrix products against their naive twin, and the twin against what it stands for."""

from __future__ import annotations

import copy

import pytest
import torch

from shared.gpu.launch import Workspace
from shared.gpu.matmul import Plan, small_batch_matmul, small_batch_matmul_naive, small_batch_plan
from shared.gpu.norm import Norm, embed_naive, rms_norm_naive, silu_mul_naive
from tests.shared.gpu.kernels import DEVICE, DTYPES, TOLERANCE, error, needs_kernels, overlaps, random_tensor

PLANS = [Plan(32, 32), Plan(16, 64, stages=2), Plan(64, 32, split=2), Plan(32, 32, split=3, prefetch=64)]


def _nan(*shape: int, dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def _check(x, weight, out, plan, work, residual=None, tolerance=1.0, **how) -> torch.Tensor:
    """Run the kernel, and its twin on copies: the same product, the same norm prepared, and counters left at zero."""
    twin_out, twin_work = out.clone(), copy.deepcopy(work)
    twin = None if residual is None else Norm(residual.weight, torch.empty_like(residual.normed))
    want = small_batch_matmul_naive(x, weight, twin_out, plan, twin_work, residual=twin, **how)
    got = small_batch_matmul(x, weight, out, plan, work, residual=residual, **how)
    assert got is out
    assert error(got, want) < tolerance * TOLERANCE[x.dtype]
    if residual is not None:
        assert error(residual.normed, twin.normed) < TOLERANCE[x.dtype]
        sums, twin_sums = (w.squares[: w.square_parts, : len(out)].sum(0) for w in (work, twin_work))
        assert error(sums, twin_sums) < TOLERANCE[x.dtype]
    assert not work.counters.any(), "every kernel leaves the counters at zero"
    return out


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [None, *PLANS], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 32])
def test_a_chain_of_products(tokens, plan, dtype):
    """A product that adds to the residual stream, then the gated product and the picked product that read its norm."""
    hidden, inner, eps, work = 160, 208, 1e-6, Workspace(DEVICE)
    x, w_in = random_tensor(tokens, inner, dtype=dtype), random_tensor(hidden, inner, dtype=dtype, scale=0.1)
    before, weight = random_tensor(tokens, hidden, dtype=dtype), random_tensor(hidden, dtype=dtype)
    w_gated, w_head = (random_tensor(n, hidden, dtype=dtype, scale=0.1) for n in (2 * inner, 144))
    plans = [plan or small_batch_plan(tokens, w, gated=w is w_gated) for w in (w_in, w_gated, w_head)]
    for overlap in overlaps():
        norm = Norm(weight, _nan(tokens, hidden, dtype=dtype))
        _check(x, w_in, before.clone(), plans[0], work, norm, overlap=overlap)
        scaled = {"scale_eps": eps, "overlap": overlap}
        gated = _nan(tokens, inner, dtype=dtype)
        _check(norm.normed, w_gated, gated, plans[1], work, gated=True, tolerance=2.0, **scaled)
        picked, head = torch.randint(tokens, (1, 3), device=DEVICE), _nan(3, 144, dtype=dtype)
        _check(norm.normed, w_head, head, plans[2], work, picked=picked, tokens_per_row=tokens, **scaled)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_bias(plan, dtype):
    """Added once, after the norm's division and before the residual stream."""
    x, weight, bias = (random_tensor(*shape, dtype=dtype) for shape in ((5, 96), (80, 96), (80,)))
    work = Workspace(DEVICE)
    _check(x, weight, _nan(5, 80, dtype=dtype), plan, work, bias=bias)
    norm = Norm(random_tensor(80, dtype=dtype), _nan(5, 80, dtype=dtype))
    _check(x, weight, random_tensor(5, 80, dtype=dtype), plan, work, norm, bias=bias)
    table, norm = random_tensor(9, 96, dtype=dtype), Norm(random_tensor(96, dtype=dtype), torch.empty_like(x))
    embed_naive(torch.arange(5, device=DEVICE), table, norm, work)
    _check(norm.normed, weight, _nan(5, 80, dtype=dtype), plan, work, bias=bias, scale_eps=1e-6)


@pytest.mark.gpu
@needs_kernels
def test_picks_of_several_rows():
    x, weight, work = random_tensor(12, 64), random_tensor(48, 64), Workspace(DEVICE)
    norm = Norm(random_tensor(64), torch.empty_like(x))
    embed_naive(torch.arange(12, device=DEVICE), x, norm, work)
    picked = torch.tensor([[3, 0], [1, 1], [2, 3]], device=DEVICE)
    how = {"picked": picked, "tokens_per_row": 4, "scale_eps": 1e-6}
    out = _check(norm.normed, weight, _nan(6, 48, dtype=torch.float32), Plan(32, 32), work, **how)
    want = rms_norm_naive(x, norm.weight, 1e-6)[[3, 0, 5, 5, 10, 11]].double() @ weight.double().T
    assert error(out, want) < TOLERANCE[torch.float32]


def test_a_norm_that_is_divided_later_is_a_norm():
    """The naive chain: a norm that is divided by the product that reads it."""
    work, eps = Workspace(DEVICE), 1e-6
    x, before, w_in = random_tensor(5, 48), random_tensor(5, 32), random_tensor(32, 48)
    w_out, bias = random_tensor(40, 32), random_tensor(40)
    norm = Norm(random_tensor(32), random_tensor(5, 32))
    stream = small_batch_matmul_naive(x, w_in, before.clone(), PLANS[0], work, residual=norm)
    assert error(stream, before + x @ w_in.T) < TOLERANCE[torch.float32]
    normed = rms_norm_naive(stream, norm.weight, eps).double()
    got = small_batch_matmul_naive(
        norm.normed, w_out, stream.new_empty(5, 40), PLANS[0], work, scale_eps=eps, bias=bias
    )
    assert error(got, normed @ w_out.double().T + bias) < TOLERANCE[torch.float32]
    gated = small_batch_matmul_naive(
        norm.normed, w_out, stream.new_empty(5, 20), PLANS[0], work, scale_eps=eps, gated=True
    )
    assert error(gated, silu_mul_naive(normed @ w_out.double().T)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [1, 16, 32])
@pytest.mark.parametrize("shape", [(96, 64), (4096, 4096), (4096, 12288), (151_936, 4096)])
def test_a_plan_cuts_what_there_is(shape, tokens):
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    plan = small_batch_plan(tokens, weight)
    assert plan.split == 1 or shape[1] // plan.split >= 512, "a part is worth a program"
    assert -(-shape[0] // plan.block_n) <= Workspace.COUNTERS
    assert small_batch_plan(tokens, weight.float()).block_k <= 32, "float32 tiles are twice as large"
