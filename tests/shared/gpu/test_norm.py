"""RMSNorm and the elementwise kernels against their naive twins."""

from __future__ import annotations

import pytest
import torch

from shared.gpu.launch import Workspace
from shared.gpu.norm import (
    Norm,
    add_rms_norm,
    add_rms_norm_naive,
    embed,
    embed_naive,
    silu_mul,
    silu_mul_naive,
)
from tests.shared.gpu.kernels import DEVICE, DTYPES, TOLERANCE, error, needs_kernels, random_tensor

pytestmark = [pytest.mark.gpu, needs_kernels]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (17, 96), (33, 320)])
def test_add_rms_norm(rows, hidden, added, dtype):
    x, delta = (random_tensor(rows, hidden, dtype=dtype) for _ in range(2))
    weight, delta = random_tensor(hidden, dtype=dtype), delta if added else None
    stream, twin = x.clone(), x.clone()
    got, want = add_rms_norm(stream, delta, weight, 1e-6), add_rms_norm_naive(twin, delta, weight, 1e-6)
    assert error(got, want) < TOLERANCE[dtype]
    assert torch.equal(stream, x if delta is None else (x.float() + delta.float()).to(dtype))
    assert error(twin, stream) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    gate_up = random_tensor(5, 2 * 96, dtype=dtype)
    assert error(silu_mul(gate_up), silu_mul_naive(gate_up)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_prepares_the_norm(dtype):
    table, weight, ids = random_tensor(50, 96, dtype=dtype), random_tensor(96, dtype=dtype), torch.randint(50, (7,))
    ids = ids.to(DEVICE)
    norms, works = [], []
    for function in (embed, embed_naive):
        norms.append(Norm(weight, random_tensor(7, 96, dtype=dtype)))
        works.append(Workspace(DEVICE))
        assert torch.equal(function(ids, table, norms[-1], works[-1]), table[ids])
        assert works[-1].square_parts == 1
    assert error(norms[0].normed, norms[1].normed) < TOLERANCE[dtype]
    assert error(works[0].squares[0, :7], works[1].squares[0, :7]) < TOLERANCE[torch.float32]
