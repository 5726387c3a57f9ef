from __future__ import annotations

import json

import pytest

from shared.output import Completion, Lossless, Output
from shared.trace import Trace


def text(request: int, tokens: list[int], forwards: dict, verified: list[int], accepted: list[int]) -> Completion:
    ids = [9, *tokens]
    trace = Trace(
        1, 4, ids, [0] * len(ids), [2] * len(ids), [0] * len(ids), [1.0] * len(ids), verified, accepted, forwards
    )
    return Completion(request, tokens, trace, 0.5, 0, f"text {request}")


OUTPUT = Output(
    [
        text(0, [1, 2, 3], {"prefill": 1, "draft": 2, "verify": 2, "commit": 1}, [4, 2], [3, 0]),
        text(1, [4, 5], {"draft": 3, "verify": 1}, [0, 0, 3], [0, 0, 1]),
    ],
    2.0,
    {"prefill": 1, "draft": 3, "verify": 2, "commit": 1},
    False,
    "because",
)


def test_figures_by_hand():
    assert OUTPUT.tokens == [[1, 2, 3], [4, 5]]
    assert OUTPUT.texts == ["text 0", "text 1"]
    assert OUTPUT.token_count == 5
    assert OUTPUT.forwards == {"prefill": 1, "draft": 5, "verify": 3, "commit": 1}
    assert OUTPUT.forwards_per_token == pytest.approx(10 / 5)
    assert OUTPUT.tokens_per_second == pytest.approx(5 / 2.0)
    assert OUTPUT.mean_accepted_length == pytest.approx(4 / 3)  # 3 + 0 + 1 accepted in three verified steps


def test_summary():
    assert OUTPUT.summary() == {
        "texts": 2,
        "tokens": 5,
        "seconds": 2.0,
        "tokens_per_second": 2.5,
        "forwards": {"prefill": 1, "draft": 5, "verify": 3, "commit": 1},
        "forwards_per_token": 2.0,
        "batch_forwards": {"prefill": 1, "draft": 3, "verify": 2, "commit": 1},
        "accepted_length": 1.333,
        "lossless": False,
        "lossless_reason": "because",
    }
    assert json.loads(json.dumps(OUTPUT.summary())) == OUTPUT.summary()


def test_an_empty_text_divides_nothing_by_nothing():
    empty = Output([text(0, [], {"draft": 1}, [0], [0])], 0.0, {}, True, "")
    assert empty.forwards_per_token == 1
    assert empty.tokens_per_second == 0
    assert empty.mean_accepted_length == 0


def test_lossless_unpacks():
    lossless, reason = Lossless(True, "why")
    assert (lossless, reason) == (True, "why")
