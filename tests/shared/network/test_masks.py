from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.network import masks

length = st.integers(1, 12)


@given(length)
def test_token_causal(n):
    assert masks.token_causal(n).tolist() == [[j <= i for j in range(n)] for i in range(n)]


@given(length, st.integers(1, 5))
def test_block_causal(n, block):
    assert masks.block_causal(n, block).tolist() == [[j // block <= i // block for j in range(n)] for i in range(n)]


@given(length)
def test_blocks_of_one_are_token_causal(n):
    assert torch.equal(masks.block_causal(n, 1), masks.token_causal(n))


@given(st.integers(1, 8))
def test_two_copy_verify_row_by_row(n):
    mask = masks.two_copy_verify(n)
    assert mask.shape == (2 * n, 2 * n)
    for i in range(n):
        drafted, query = mask[i].nonzero()[:, 0].tolist(), mask[n + i].nonzero()[:, 0].tolist()
        assert drafted == list(range(i + 1)), "a drafted token sees what precedes it and itself"
        assert query == [*range(i), n + i], "a mask query sees what precedes its position, and itself"


@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(0, 6))
def test_span_verify_row_by_row(queries, tokens):
    """Three queries a row at any positions (6 is padding) behind the first ``tokens`` of a block."""
    mask = masks.span_verify(torch.tensor(queries), tokens)
    assert mask.shape == (len(queries), tokens + 3, tokens + 3)
    for row, places in zip(mask, queries, strict=True):
        seen = [line.nonzero()[:, 0].tolist() for line in row]
        assert seen[:tokens] == [list(range(i + 1)) for i in range(tokens)]
        want = [[*range(min(place, tokens)), tokens + m] for m, place in enumerate(places)]
        assert seen[tokens:] == want, "a query sees the drafts before its position, and itself; no other query"


@given(st.integers(1, 8))
def test_span_verify_of_a_whole_block_is_two_copy_verify(n):
    assert torch.equal(masks.span_verify(torch.arange(n)[None], n)[0], masks.two_copy_verify(n))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_causal_until(first_masked):
    n = 6
    got = masks.causal_until(torch.tensor(first_masked), n).tolist()
    for row, first in zip(got, first_masked, strict=True):
        assert row == [[j <= i or i >= first for j in range(n)] for i in range(n)]


def test_causal_until_by_hand():
    # two known tokens, then two masks
    assert masks.causal_until(torch.tensor([2]), 4).int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    ]
