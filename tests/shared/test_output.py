from __future__ import annotations

import json

import pytest

from shared.output import Completion, Lossless, Output, Sizes, Work, losslessness
from shared.trace import How, Spent, Trace, Verify

SIZES = {"model": Sizes(body=100, head=10, cached=2, queries=3, number_bytes=4)}


def text(request: int, tokens: list[int], lanes: dict, verifies: list[Verify], how=How.UNMASKED) -> Completion:
    ids = [9, *tokens]
    count = len(ids)
    hows = [How.PROMPT] + [how] * len(tokens)
    trace = Trace(1, 4, ids, [0] * count, hows, [0] * count, [1.0] * count, 3, verifies, lanes)
    return Completion(request, tokens, trace, 0.5, 0, f"text {request}")


def model(**kinds: int) -> dict:
    return {"model": {kind: Spent(n, 8 * n, 4 * n, 10 * n, 100 * n) for kind, n in kinds.items()}}


OUTPUT = Output(
    [
        text(0, [1, 2, 3], model(prefill=1, draft=2, verify=2, commit=1), [Verify(0, 4, 4, 3), Verify(1, 2, 2, 0)]),
        text(1, [4, 5], model(draft=3, verify=1), [Verify(2, 3, 3, 1)], How.RESAMPLED),
    ],
    2.0,
    Lossless(False, "because"),
    model(prefill=1, draft=3, verify=2, commit=1),
    SIZES,
)


def test_figures_by_hand():
    assert OUTPUT.tokens == [[1, 2, 3], [4, 5]]
    assert OUTPUT.texts == ["text 0", "text 1"]
    assert OUTPUT.token_count == 5
    assert OUTPUT.forwards == {"prefill": 1, "draft": 5, "verify": 3, "commit": 1}
    assert OUTPUT.batch_forwards == {"prefill": 1, "draft": 3, "verify": 2, "commit": 1}
    assert OUTPUT.batch_tokens == {"prefill": 8, "draft": 24, "verify": 16, "commit": 8}
    assert OUTPUT.forwards_per_token == pytest.approx(10 / 5)
    assert OUTPUT.lane_forwards_per_token == {"model": pytest.approx(2)}
    assert OUTPUT.tokens_per_second == pytest.approx(5 / 2.0)
    assert OUTPUT.accepted_per_verify == pytest.approx(4 / 3)  # 3 + 0 + 1 accepted in three verifies
    assert OUTPUT.mean_acceptance_length == pytest.approx(6 / 3)  # and two tokens of the verifier's own


def test_work_by_hand():
    """One pass of 8 tokens, 4 with logits, over 10 cached ones; 100 query-key pairs a pass."""
    once = SIZES["model"].work(Spent(1, 8, 4, 10, 100))
    assert once == Work(read_bytes=(100 + 10 + 2 * 10) * 4, operations=2 * (100 * 8 + 10 * 4) + 4 * 3 * 100)
    assert SIZES["model"].work(Spent(1, 8, 0, 10, 100)).read_bytes == (100 + 2 * 10) * 4, "no logits, no head"
    assert SIZES["model"].work(Spent()) == Work()
    assert once.floor(read=520, rate=1e9) == pytest.approx(1)
    assert once.floor(read=1e9, rate=2880) == pytest.approx(1)


def test_floor_of_a_token_adds_up_over_kinds_and_lanes():
    """All ten passes read 520 bytes and do 2880 operations, by kind at most one of which binds."""
    assert OUTPUT.floor_seconds_per_token(read=520, rate=1e12) == pytest.approx(10 / 5)
    drafter = {"drafter": {"draft": Spent(5, 5, 5, 0, 5)}}
    lanes = {**model(verify=2), **drafter}
    sizes = {**SIZES, "drafter": Sizes(body=10, head=1, cached=1, queries=1, number_bytes=2)}
    both = Output([text(0, [1, 2], lanes, [])], 1.0, Lossless(True, ""), {}, sizes)
    assert both.lane_forwards_per_token == {"model": 1.0, "drafter": 2.5}
    assert both.floor_seconds_per_token(read=1, rate=1e12) == pytest.approx((2 * 520 + 5 * 22) / 2)


def test_experts_that_are_touched():
    """Four experts, two a token: one token reads two of them, many tokens read nearly all four."""
    sizes = Sizes(body=0, head=0, cached=0, queries=0, number_bytes=1, expert=7, experts=4, chosen=2, expert_layers=3)
    assert sizes.touched(1) == 3 * 2
    assert 3 * 3.9 < sizes.touched(8) < 3 * 4
    assert sizes.work(Spent(2, 2)) == Work(read_bytes=2 * 3 * 2 * 7, operations=2 * 7 * 2 * 2 * 3)


def test_summary():
    summary = OUTPUT.summary()
    work = summary.pop("work")
    assert work["model"]["prefill"] == {"read_bytes": 520, "operations": 2880}
    assert summary == {
        "texts": 2,
        "tokens": 5,
        "seconds": 2.0,
        "tokens_per_second": 2.5,
        "forwards": {"prefill": 1, "draft": 5, "verify": 3, "commit": 1},
        "forwards_per_token": 2.0,
        "lane_forwards_per_token": {"model": 2.0},
        "batch_forwards": {"prefill": 1, "draft": 3, "verify": 2, "commit": 1},
        "accepted_per_verify": 1.333,
        "mean_acceptance_length": 2.0,
        "lossless": False,
        "lossless_reason": "because",
        "lossless_relative_to": "block size one",
    }
    assert json.loads(json.dumps(OUTPUT.summary())) == OUTPUT.summary()


def test_an_empty_text_divides_nothing_by_nothing():
    empty = Output([text(0, [], model(draft=1), [])], 0.0, Lossless(True, ""))
    assert empty.forwards_per_token == 1
    assert empty.tokens_per_second == 0
    assert empty.accepted_per_verify == empty.mean_acceptance_length == 0


def test_lossless_is_a_truth_with_its_reason():
    assert Lossless(True, "why")
    assert not Lossless(False, "why not", "the target")
    assert str(Lossless(False, "why not")) == "no (why not)"
    assert losslessness({"a": False}, "greedy text") == Lossless(
        True, "every token is verified: same greedy text as block size one", "block size one"
    )
    broken = losslessness({"a": True, "b": False, "c": True}, "greedy text", "the target")
    assert broken == Lossless(False, "a; c", "the target")
