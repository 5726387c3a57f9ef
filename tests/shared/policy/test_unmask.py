from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.options import Sampling, Strategy, Unmask
from shared.policy.acceptance import entropy
from shared.policy.draft import Choice, Draft
from shared.policy.unmask import block_sum_entropy, step_quota, unmask
from shared.trace import How


@given(st.integers(1, 40), st.integers(1, 40))
def test_step_quota(length, steps):
    quota = step_quota(length, steps)
    assert len(quota) == steps
    assert min(quota) >= 1
    if steps <= length:
        assert sum(quota) == length
        assert max(quota) - min(quota) <= 1
        assert quota == sorted(quota, reverse=True)


def test_step_quota_by_hand():
    assert step_quota(8, 3) == [3, 3, 2]
    assert step_quota(4, 4) == [1, 1, 1, 1]
    assert step_quota(2, 4) == [1, 1, 1, 1], "a step is never due nothing"


def make_draft(masked: list[list[bool]], confidence: list[list[float]], logits=None) -> Draft:
    masked, confidence = torch.tensor(masked), torch.tensor(confidence)
    rows, length = masked.shape
    logits = torch.zeros(rows, length, 3) if logits is None else logits
    zeros = torch.zeros(rows, length, dtype=torch.long)
    return Draft(
        torch.arange(rows), zeros, masked, zeros, confidence, logits, torch.arange(rows), zeros[:, 0], Sampling()
    )


def taken(take: torch.Tensor, key: torch.Tensor) -> list[list[int]]:
    """The positions each row takes, in the order in which they are recorded."""
    return [
        sorted((i for i, t in enumerate(row) if t), key=lambda i, k=keys: k[i])
        for row, keys in zip(take.tolist(), key.tolist(), strict=True)
    ]


def plain_rule(rule, eligible, confidence, cost, quota, options, overtime, cap):
    """One row in plain Python. ``cost``: entropy of each position."""
    free = [i for i, e in enumerate(eligible) if e]
    quota = min(quota, len(free))
    if quota == 0:
        return []
    ranked = sorted(free, key=lambda i: -confidence[i])
    if rule == "sequential":
        return free[:quota]
    if rule == "low_confidence_static":
        return ranked[:quota]
    if rule == "low_confidence_dynamic":
        high = [i for i in ranked if confidence[i] > options.confidence_threshold]
        return high if len(high) >= quota else ranked[:quota]
    ranked, spent, count = sorted(free, key=lambda i: cost[i]), 0.0, 0
    for i in ranked:
        spent += cost[i]
        count += spent < options.eb_threshold
    count = max(count, quota if overtime else 1)
    return ranked[: min(count, quota) if cap else count]


LEVELS = [0.125, 0.25, 0.5, 0.75, 0.875]  # exact in binary, so that ties and equalities are frequent


@st.composite
def steps(draw):
    length = draw(st.integers(1, 7))
    row = lambda values: draw(st.lists(values, min_size=length, max_size=length))  # noqa: E731
    rows = draw(st.integers(1, 3))
    return {
        "masked": [row(st.booleans()) for _ in range(rows)],
        "confidence": [row(st.sampled_from(LEVELS)) for _ in range(rows)],
        "peak": [row(st.integers(0, 4)) for _ in range(rows)],
        "quota": [draw(st.integers(0, length + 2)) for _ in range(rows)],
        "overtime": [draw(st.booleans()) for _ in range(rows)],
        "cap": draw(st.booleans()),
        "options": {"confidence_threshold": draw(st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))},
        "eb_threshold": draw(st.sampled_from([0.01, 0.6, 1.3, 2.1, 5.0])),
    }


@pytest.mark.parametrize("rule", get_args(Strategy))
@given(case=steps())
def test_rules_by_their_definition(rule, case):
    options = Unmask(remasking_strategy=rule, eb_threshold=case["eb_threshold"], **case["options"])
    logits = torch.tensor(case["peak"], dtype=torch.float32)[..., None] * torch.tensor([1.0, 0.0, 0.0])
    draft = make_draft(case["masked"], case["confidence"], logits)
    take, key = unmask(
        draft,
        draft.masked,
        torch.tensor(case["quota"]),
        options,
        overtime=torch.tensor(case["overtime"]),
        cap=case["cap"],
    )
    got = taken(take, key)
    for k, masked in enumerate(case["masked"]):
        cost = entropy(logits[k]).tolist()
        if rule == "entropy_bounded_blocksum":
            cost = [-sum(c * math.log(c) for c in case["confidence"][k])] * len(masked)
        want = plain_rule(
            rule, masked, case["confidence"][k], cost, case["quota"][k], options, case["overtime"][k], case["cap"]
        )
        assert got[k] == want
        assert all(masked[i] for i in got[k]), "known positions stay"
        if case["quota"][k] == 0:
            assert got[k] == []
        elif any(masked):
            assert got[k], "some token is taken, so a block cannot stall"


def one(rule: str, confidence: list[float], quota: int, masked=None, *, overtime=False, cap=False, logits=None, **flat):
    draft = make_draft([masked or [True] * len(confidence)], [confidence], logits)
    options = Unmask(remasking_strategy=rule, **flat)
    late = torch.tensor([overtime])
    take, key = unmask(draft, draft.masked, torch.tensor([quota]), options, overtime=late, cap=cap)
    return taken(take, key)[0]


def test_ties_go_to_the_lower_position():
    assert one("low_confidence_static", [0.5, 0.75, 0.5, 0.75], 3) == [1, 3, 0]


def test_dynamic_threshold_is_strict():
    assert one("low_confidence_dynamic", [0.75, 0.5, 0.875], 1, confidence_threshold=0.75) == [2]
    assert one("low_confidence_dynamic", [0.75, 0.5, 0.875], 1, confidence_threshold=0.5) == [2, 0]
    assert one("low_confidence_dynamic", [0.75, 0.5, 0.875], 3, confidence_threshold=0.5) == [2, 0, 1], "too few above"


def test_sequential_skips_known_positions():
    assert one("sequential", [0.5] * 5, 2, [False, True, False, True, True]) == [1, 3]


def test_entropy_budget_by_hand():
    # entropies ln 2, 0, ln 3 = 0.69, 0, 1.10; ascending running totals 0, 0.69, 1.79
    inf = -math.inf
    logits = torch.tensor([[[0.0, 0.0, inf], [0.0, inf, inf], [0.0, 0.0, 0.0]]])
    take = lambda budget, **k: one("entropy_bounded", [0.5] * 3, 1, logits=logits, eb_threshold=budget, **k)  # noqa: E731
    assert take(0.7) == [1, 0]
    assert take(0.6) == [1]
    assert take(1.9) == [1, 0, 2]
    assert take(1.9, cap=True) == [1], "a cap holds it to the quota"


def test_entropy_budget_in_overtime_takes_the_quota():
    logits = torch.zeros(1, 4, 3)  # ln 3 each, over any small budget
    assert len(one("entropy_bounded", [0.5] * 4, 3, logits=logits, eb_threshold=0.1)) == 1
    assert len(one("entropy_bounded", [0.5] * 4, 3, logits=logits, eb_threshold=0.1, overtime=True)) == 3


def test_block_sum_counts_known_positions():
    # -(0.5 ln 0.5 + 0.25 ln 0.25) = 0.5 ln 2 + 0.5 ln 2 = ln 2, at every position
    assert block_sum_entropy(torch.tensor([[0.5, 0.25]])).tolist() == [pytest.approx([math.log(2)] * 2)]
    # E = 2 ln 2 = 1.386 with the two known positions: totals 1.39, 2.77; the leftmost masked ones are taken
    masked = [False, True, True, False]
    confidence = [0.5, 0.25, 0.5, 0.25]
    assert one("entropy_bounded_blocksum", confidence, 1, masked, eb_threshold=2.8) == [1, 2]
    assert one("entropy_bounded_blocksum", confidence, 1, masked, eb_threshold=2.7) == [1]


def test_entropy_budget_is_strict():
    confidence = [0.5, 0.25, 0.5]
    each = float(block_sum_entropy(torch.tensor([confidence]))[0, 0])
    assert one("entropy_bounded_blocksum", confidence, 1, eb_threshold=2 * each) == [0], "two cost the whole budget"
    assert one("entropy_bounded_blocksum", confidence, 1, eb_threshold=2.001 * each) == [0, 1]


def test_positions_chosen_already_are_not_eligible():
    draft = make_draft([[True] * 3], [[0.875, 0.5, 0.25]])
    choice = Choice.none(draft)
    choice.add(torch.tensor([[True, False, False]]), draft.tokens, How.ACCEPTED, torch.arange(3)[None])
    eligible = draft.masked & ~choice.take
    options, late = Unmask(remasking_strategy="low_confidence_static"), torch.tensor([False])
    take, key = unmask(draft, eligible, torch.tensor([5]), options, overtime=late, cap=True)
    assert taken(take, key) == [[1, 2]]
