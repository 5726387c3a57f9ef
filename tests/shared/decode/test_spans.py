from __future__ import annotations

import pytest
import torch

from shared.decode.spans import VerifyPlan, plan_verify, query_sizes, span_inputs, two_copy_kinds, wanted_spans
from shared.gpu.graphs import Shape
from shared.network.masks import two_copy_verify
from shared.options import Sampling
from shared.policy.draft import Draft
from shared.policy.routing import Policy

MASK = 99
# Spans: [1, 2] of the first row, [2] of the second, all four of the third.
MASKED = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
EXACT, ROUNDED = None, [2, 4]  # numbers of queries there are graphs for


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


def planned(policy, sizes, candidates, whole) -> VerifyPlan:
    wanted = wanted_spans(policy, make_draft(), whole=whole)
    return plan_verify(policy.constant, wanted, candidates, 4, whole=whole, sizes=sizes)


@pytest.mark.parametrize(
    ("sizes", "candidates", "whole", "want"),
    [
        (EXACT, [0, 1, 2], False, VerifyPlan([0, 1], 3, 2)),
        (EXACT, [1, 2], False, VerifyPlan([1], 3, 1)),
        (ROUNDED, [1, 2], False, VerifyPlan([1], 4, 2)),
        (EXACT, [0, 1, 2], True, VerifyPlan([0, 1], 4, 4)),
        (EXACT, [2], False, VerifyPlan([], 4, 4)),
        (EXACT, [], False, VerifyPlan([], 4, 4)),
    ],
)
def test_plan(sizes, candidates, whole, want):
    policy = Wants(1, 1, 0)
    assert planned(policy, sizes, candidates, whole) == want
    assert policy.asked == 1, "a policy with a memory sees every draft, whoever may be verified"


def test_plan_of_a_constant_policy():
    never, always = Wants(0, 0, 0, constant=False), Wants(1, 1, 1, constant=True)
    assert planned(never, EXACT, [0, 1], False).index == []
    assert planned(always, EXACT, [0, 2], True) == VerifyPlan([0, 2], 4, 4)
    assert planned(always, EXACT, [0], False) == VerifyPlan([0], 3, 2)
    assert wanted_spans(never, make_draft(), whole=False) is None, "nothing to read"
    assert wanted_spans(always, make_draft(), whole=True) is None


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


def test_kinds_of_the_two_copy_layout():
    assert query_sizes(8) == [2, 4, 8]
    assert query_sizes(1) == [1]
    assert two_copy_kinds(8) == [
        Shape(1, 8, commit_rows=1),
        Shape(1, 10, picks=2),
        Shape(1, 12, picks=4),
        Shape(1, 16, picks=8),
    ]
    assert two_copy_kinds(8)[0].lasting, "a draft's logits are looked at after the verify"
