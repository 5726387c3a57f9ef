from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import UserError
from shared.network.attention import BACKENDS, attend


@st.composite
def problems(draw):
    """Random ``q, k, v`` of grouped heads, and a bool mask in which every query sees something."""
    size = lambda high: draw(st.integers(1, high))  # noqa: E731
    rows, kv, group, queries, keys, dim = size(3), size(3), size(3), size(5), size(7), 4 * size(2)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    new = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    q, k, v = new(rows, kv * group, queries, dim), new(rows, kv, keys, dim), new(rows, kv, keys, dim)
    mask = torch.rand(draw(st.sampled_from([1, rows])), 1, queries, keys, generator=rng) < 0.6
    mask[..., 0] |= ~mask.any(-1)
    return q, k, v, draw(st.sampled_from([mask, None]))


@given(problems())
def test_sdpa_is_the_reference(problem):
    got, want = (attend(*problem, backend=name) for name in ("sdpa", "reference"))
    assert torch.allclose(got, want, atol=1e-5)


@given(problems())
def test_reference_by_its_definition(problem):
    q, k, v, mask = problem
    got = attend(q, k, v, mask, backend="reference")
    row, head, query = q.shape[0] - 1, q.shape[1] - 1, q.shape[2] - 1
    shared_by = q.shape[1] // k.shape[1]
    keys, values = k[row, head // shared_by], v[row, head // shared_by]
    seen = [True] * len(keys) if mask is None else mask.expand(len(q), -1, -1, -1)[row, 0, query].tolist()
    weight = [
        math.exp(float(q[row, head, query] @ key) / math.sqrt(len(key))) * s for key, s in zip(keys, seen, strict=True)
    ]
    want = sum(w * value for w, value in zip(weight, values, strict=True)) / sum(weight)
    assert torch.allclose(got[row, head, query], want, atol=1e-5)


@given(problems())
def test_what_is_masked_has_no_effect(problem):
    q, k, v, mask = problem
    if mask is not None:
        hidden = ~mask.any(0)[0].any(0)
        changed = torch.where(hidden[:, None], 100.0, k), torch.where(hidden[:, None], -100.0, v)
        for name in BACKENDS:
            assert torch.allclose(
                attend(q, k, v, mask, backend=name), attend(q, *changed, mask, backend=name), atol=1e-5
            )


def test_an_additive_mask_adds():
    # equal scores plus ln 3 on the first key: weights 3/4 and 1/4
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2)
    v = torch.tensor([[[[4.0, 0.0], [0.0, 8.0]]]])
    bias = torch.tensor([[[[math.log(3.0), 0.0]]]])
    assert attend(q, k, v, bias, backend="reference").flatten().tolist() == pytest.approx([3.0, 2.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_fewer_dimensions(backend):
    """``[T, S]`` holds for every row, ``[B, T, S]`` has a mask a row."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 2, 8, generator=rng) for heads in (4, 2, 2))
    shared, own = torch.tensor([[True, False], [True, True]]), torch.tensor([[True, True], [False, True]])
    rows = torch.stack([shared, own])
    want = attend(q, k, v, rows[:, None], backend=backend)
    assert torch.equal(attend(q, k, v, rows, backend=backend), want)
    assert torch.allclose(attend(q, k, v, shared, backend=backend)[0], want[0], atol=1e-6)
    assert torch.allclose(attend(q, k, v, own, backend=backend)[1], want[1], atol=1e-6)


def test_sdpa_refuses_float_masks():
    q = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="bool masks"):
        attend(q, q, q, torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    q, k = torch.ones(1, 1, 1, 4), torch.tensor([[[[1.0] * 4, [0.0] * 4]]])
    v = torch.tensor([[[[1.0] * 4, [0.0] * 4]]])
    # scores 4 x scale and 0; the default scale is 4 ** -0.5
    for scale, score in ((None, 2.0), (1.0, 4.0), (0.0, 0.0)):
        got = attend(q, k, v, scale=scale, backend=backend)[0, 0, 0, 0]
        assert float(got) == pytest.approx(1 / (1 + math.exp(-score)))


def test_dtype_is_kept():
    q = torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)
    for name in BACKENDS:
        assert attend(q, q, q, backend=name).dtype == torch.bfloat16


def test_unknown_backend():
    q = torch.zeros(1, 1, 1, 2)
    with pytest.raises(UserError, match="did you mean sdpa"):
        attend(q, q, q, backend="spda")
