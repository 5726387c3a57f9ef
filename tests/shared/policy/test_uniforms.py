from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from shared.policy.uniforms import Uniforms, request_uniforms

numbers = st.integers(0, 2**31)


@given(numbers, numbers, st.integers(0, 40), st.integers(0, 40))
def test_a_longer_table_begins_with_the_shorter(seed, request, a, b):
    short, long = sorted((a, b))
    assert request_uniforms(seed, request, long)[:short].tolist() == request_uniforms(seed, request, short).tolist()


@given(numbers, numbers, numbers)
def test_requests_and_seeds_differ(seed, one, two):
    if one != two:
        assert request_uniforms(seed, one, 8).tolist() != request_uniforms(seed, two, 8).tolist()
        assert request_uniforms(one, seed, 8).tolist() != request_uniforms(two, seed, 8).tolist()


def test_seed_and_request_do_not_mix():
    tables = [request_uniforms(seed, request, 4).tolist() for seed in range(4) for request in range(4)]
    assert len({tuple(table) for table in tables}) == 16


def test_numbers_are_float32_on_a_grid_in_the_half_open_interval():
    drawn = request_uniforms(1, 2, 50_000)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.array_equal(drawn.astype(np.float64) * 2**24 % 1, np.zeros(len(drawn)))


def test_numbers_are_uniform_within_and_across_requests():
    """Kolmogorov-Smirnov, false alarm odds 1e-4 each; the seed is fixed."""
    assert kstest(request_uniforms(0, 0, 20_000), "uniform").pvalue > 1e-4
    firsts = [float(request_uniforms(0, k, 1)[0]) for k in range(5_000)]
    assert kstest(firsts, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.06  # four standard errors of 1 / sqrt(5000)


@given(st.permutations(range(4)), st.integers(5, 9))
def test_a_request_has_its_numbers_in_any_row(rows, capacity):
    source = Uniforms(4, capacity, seed=9)
    for request, row in enumerate(rows):
        source.assign(row, request)
    got = source.take(torch.tensor(rows), 5, 5)
    for request in range(4):
        assert got[request].tolist() == request_uniforms(9, request, 5).tolist()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12))
def test_cursors_are_independent(moves):
    source, used = Uniforms(3, 64, seed=4), [0, 0, 0]
    for row in range(3):
        source.assign(row, row)
    want = [request_uniforms(4, row, 64) for row in range(3)]
    for row, count in moves:
        got = source.take(torch.tensor([row]), 3, torch.tensor([count]))
        assert got[0].tolist() == want[row][used[row] : used[row] + 3].tolist()
        used[row] += count
    assert source.cursor.tolist() == used


def test_rows_move_by_their_own_counts():
    source = Uniforms(3, 16, seed=0)
    for row in range(3):
        source.assign(row, row)
    source.take(torch.tensor([2, 0]), 4, torch.tensor([1, 3]))
    assert source.cursor.tolist() == [3, 0, 1]
    source.assign(0, 7)
    assert source.cursor.tolist() == [0, 0, 1]
    assert source.take(torch.tensor([0]), 2, 2)[0].tolist() == request_uniforms(0, 7, 2).tolist()


def test_recorded_numbers_come_through_the_same_door():
    source = Uniforms(2, 3, recorded=[[0.5, 0.25, 0.125], [0.75]])
    source.assign(1, 0)
    source.assign(0, 1)
    assert source.take(torch.tensor([1]), 2, 2).tolist() == [[0.5, 0.25]]
    assert source.take(torch.tensor([0]), 1, 1).tolist() == [[0.75]]
    assert source.take(torch.tensor([1]), 1, 1).tolist() == [[0.125]]
    assert [source.available(k) for k in (0, 1)] == [3, 1]


def test_too_many_recorded_numbers():
    with pytest.raises(ValueError, match="request 0 brings 3 uniforms"):
        Uniforms(1, 2, recorded=[[0.1, 0.2, 0.3]]).assign(0, 0)


def test_reading_past_the_end_is_counted():
    """The table does not run out; the cursor tells that it should have."""
    source = Uniforms(1, 2, seed=0)
    source.assign(0, 0)
    assert source.take(torch.tensor([0]), 4, 4).shape == (1, 4)
    assert source.cursor.tolist() == [4]
    assert source.available(0) == 2


def test_by_number():
    source = Uniforms(2, 6, seed=4)
    source.assign(0, 3)
    source.assign(1, 5)
    numbers = torch.tensor([[0, 4, 4], [5, 1, 0]])
    got = source.at(torch.tensor([0, 1]), numbers)
    want = [
        [request_uniforms(4, request, 6)[n] for n in row] for request, row in zip((3, 5), numbers.tolist(), strict=True)
    ]
    assert torch.equal(got, torch.tensor(want))
    assert source.cursor.tolist() == [0, 0]
