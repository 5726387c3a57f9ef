from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shared.decode.spans import Picked, pick, span_inputs, wishes
from shared.network.masks import two_copy_verify
from shared.options import Sampling
from shared.policy.draft import Draft
from shared.policy.routing import Policy

MASK = 99
# Spans: [1, 2] of the first row, [2] of the second, all four of the third.
MASKED = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
EXACT = SimpleNamespace(block_length=4, verify_tokens=lambda n: n, queries=lambda n: n)
ROUNDED = SimpleNamespace(block_length=4, verify_tokens=lambda n: 4, queries=lambda n: max(n, 2))


def make_draft() -> Draft:
    block = torch.arange(12).reshape(3, 4).masked_fill(MASKED, MASK)
    tokens = block + 50
    rows = torch.arange(3)
    return Draft(rows, block, MASKED, tokens, torch.ones(3, 4), torch.zeros(3, 4, 2), rows, rows, Sampling())


class Wants(Policy):
    def __init__(self, *rows, constant=None):
        self.rows, self.constant, self.asked = torch.tensor(rows), constant, 0

    def decide(self, draft):
        self.asked += 1
        return self.rows.bool()


def picked(policy, engine, candidates, whole) -> Picked:
    return pick(policy, wishes(policy, make_draft(), whole=whole), engine, candidates, whole=whole)


@pytest.mark.parametrize(
    ("engine", "candidates", "whole", "want"),
    [
        (EXACT, [0, 1, 2], False, Picked([0, 1], 3, 2)),
        (EXACT, [1, 2], False, Picked([1], 3, 1)),
        (ROUNDED, [1, 2], False, Picked([1], 4, 2)),
        (EXACT, [0, 1, 2], True, Picked([0, 1], 4, 4)),
        (EXACT, [2], False, Picked([], 4, 4)),
        (EXACT, [], False, Picked([], 4, 4)),
    ],
)
def test_pick(engine, candidates, whole, want):
    policy = Wants(1, 1, 0)
    assert picked(policy, engine, candidates, whole) == want
    assert policy.asked == 1, "a policy with a memory sees every draft, whoever may be verified"


def test_pick_of_a_policy_that_never_changes_its_mind():
    never, always = Wants(0, 0, 0, constant=False), Wants(1, 1, 1, constant=True)
    assert picked(never, EXACT, [0, 1], False).index == []
    assert picked(always, EXACT, [0, 2], True) == Picked([0, 2], 4, 4)
    assert picked(always, EXACT, [0], False) == Picked([0], 3, 2)
    assert wishes(never, make_draft(), whole=False) is None, "nothing to read"
    assert wishes(always, make_draft(), whole=True) is None


def test_inputs_of_whole_blocks_are_the_two_copies():
    start = torch.tensor([4, 8, 0])
    asked = span_inputs(make_draft(), 4, 4, start, MASK)
    filled = torch.where(MASKED, make_draft().tokens, make_draft().block)
    assert torch.equal(asked.ids, torch.cat([filled, torch.full((3, 4), MASK)], 1))
    assert torch.equal(asked.positions, (start[:, None] + torch.arange(4)).repeat(1, 2))
    assert torch.equal(asked.mask, two_copy_verify(4).expand(3, -1, -1))


def test_inputs_of_spans():
    part = make_draft().select(torch.tensor([0, 1]))
    asked = span_inputs(part, 3, 2, torch.tensor([4, 8]), MASK)
    assert asked.wanted.tolist() == [[3, 4], [3, 4]]
    assert asked.queries.tolist() == [[1, 2], [2, 4]], "the second row has one query; the other is padding"
    assert asked.ids.tolist() == [[0, 149, 149, MASK, MASK], [4, 5, 149, MASK, MASK]]
    assert asked.positions.tolist() == [[4, 5, 6, 5, 6], [8, 9, 10, 10, 11]]
    assert asked.mask[0, 3].tolist() == [True, False, False, True, False], "position 1 sees position 0 and itself"
    assert asked.mask[1, 3].tolist() == [True, True, False, True, False]
