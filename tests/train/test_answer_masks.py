"""Masks counted from the end of each row's prompt, against a plain definition for every pair of positions."""

from __future__ import annotations

import pytest
import torch

from train import answer_masks

FIRST = torch.tensor([1, 5, 13])
LENGTH = 40


def sees(first: int, block_length: int, row: int, column: int) -> bool:
    """D2F: the prompt sees the prompt, an answer's token the prompt and what is not in a later block."""
    if column < first:
        return True
    return row >= first and (row - first) // block_length >= (column - first) // block_length


def pairs(rule) -> torch.Tensor:
    """``[B, T, T]`` of ``rule(number, first, row, column)``."""
    at = range(LENGTH)
    return torch.tensor([[[rule(n, f, r, c) for c in at] for r in at] for n, f in enumerate(FIRST.tolist())])


def test_answers_are_spans():
    trained = torch.zeros(2, 9, dtype=torch.bool)
    trained[0, 3:7], trained[1, 1:] = True, True
    first, stop = answer_masks.answers(trained)
    assert (first.tolist(), stop.tolist()) == ([3, 1], [7, 9])


@pytest.mark.parametrize("block_length", [1, 4, 16])
def test_block_causal(block_length):
    want = pairs(lambda n, f, row, column: sees(f, block_length, row, column))
    assert torch.equal(answer_masks.block_causal(FIRST, LENGTH, block_length), want)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 8), (8, 1), (1, 1)])
def test_cut(before, after):
    at = FIRST + torch.tensor([0, 8, 16])
    want = pairs(lambda n, f, row, column: sees(f, before if row < at[n] else after, row, column))
    assert torch.equal(answer_masks.cut(FIRST, LENGTH, at, before, after), want)


def test_both_ways_ends_where_training_does():
    stop = torch.tensor([10, 40, 33])
    want = pairs(lambda n, f, row, column: column < stop[n])
    assert torch.equal(answer_masks.both_ways(stop, LENGTH), want)


def test_verify():
    """A mask sees itself and the clean tokens before its place; clean tokens see no mask. Masks at prompts see themselves alone: they say nothing."""
    clean = answer_masks.block_causal(FIRST, LENGTH, 1)
    seen = answer_masks.verify(clean, FIRST)
    masks, rest = seen[:, :LENGTH], seen[:, LENGTH:]
    assert torch.equal(masks[:, :, :LENGTH], torch.eye(LENGTH, dtype=torch.bool).expand(3, -1, -1))
    assert torch.equal(masks[:, :, LENGTH:], pairs(lambda n, f, row, column: f <= row and column < row))
    assert not rest[:, :, :LENGTH].any()
    assert torch.equal(rest[:, :, LENGTH:], clean)
