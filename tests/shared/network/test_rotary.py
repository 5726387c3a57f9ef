from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.network.rotary import rotary_tables, rotate

position = st.integers(0, 4000)


def turned(x: torch.Tensor, position: int, theta: float = 10_000.0) -> torch.Tensor:
    """``x [D]`` rotated to ``position``."""
    tables = rotary_tables(torch.tensor([[position]]), len(x), theta, torch.float32)
    return rotate(x[None, None, None], *tables)[0, 0, 0]


def vectors(seed: int, dim: int) -> torch.Tensor:
    return torch.randn(2, dim, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), position, st.sampled_from([2, 8, 16]))
def test_norm_is_preserved(seed, place, dim):
    x = vectors(seed, dim)[0]
    assert torch.allclose(turned(x, place).norm(), x.norm(), rtol=1e-5)


@given(st.integers(0, 99), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_scores_depend_on_the_distance_alone(seed, a, b, shift):
    q, k = vectors(seed, 8)
    assert torch.allclose(turned(q, a) @ turned(k, b), turned(q, a + shift) @ turned(k, b + shift), atol=2e-3)


def test_position_zero_is_the_identity():
    x = vectors(0, 8)[0]
    assert torch.equal(turned(x, 0), x)


def test_pairs_are_half_a_head_apart():
    # D = 4, theta 100: pairs (0, 2) and (1, 3) turn by 1 and by 100 ** -0.5 = 0.1 a position
    got = turned(torch.tensor([1.0, 1.0, 0.0, 0.0]), 3, theta=100.0)
    want = [math.cos(3.0), math.cos(0.3), math.sin(3.0), math.sin(0.3)]
    assert torch.allclose(got, torch.tensor(want), atol=1e-6)


def test_shapes_and_dtype():
    places = torch.tensor([[0, 1, 1], [7, 5, 6]])  # rows of a batch stand at different positions; positions may repeat
    cos, sin = rotary_tables(places, 8, 1e6, torch.bfloat16)
    assert cos.shape == sin.shape == (2, 1, 3, 8)
    assert cos.dtype == torch.bfloat16
    assert torch.equal(cos[0, 0, 1], cos[0, 0, 2])
    assert rotate(torch.zeros(2, 5, 3, 8, dtype=torch.bfloat16), cos, sin).shape == (2, 5, 3, 8)


def test_angles_are_computed_in_float32():
    """bfloat16 positions would round 4097 to 4096."""
    far = [rotary_tables(torch.tensor([[p]]), 8, 1e4, torch.bfloat16)[0] for p in (4096, 4097)]
    assert not torch.equal(*far)


def test_channels_past_the_tables_pass_through():
    x = vectors(0, 12)[0]
    tables = rotary_tables(torch.tensor([[5]]), 8, 1e4, torch.float32)
    got = rotate(x.view(1, 1, 1, 12), *tables)[0, 0, 0]
    assert torch.equal(got[8:], x[8:])
    assert torch.equal(got[:8], rotate(x[:8].view(1, 1, 1, 8), *tables)[0, 0, 0])
