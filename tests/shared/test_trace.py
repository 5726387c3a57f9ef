from __future__ import annotations

import json
from dataclasses import replace

from shared.trace import How, Spent, Trace, Verify, add_lanes, format_trace

# Prompt of 2, blocks of 4: positions 2 and 3 end block 0, positions 4 to 7 are block 1.
TRACE = Trace(
    prompt_length=2,
    block_length=4,
    token_ids=[90, 91, 12, 13, 14, 15, 16, 17],
    step_of=[-1, -1, 0, 0, 2, 1, 1, 2],
    how_of=[How.PROMPT, How.PROMPT, How.ACCEPTED, How.RESAMPLED, How.KEPT, How.UNMASKED, How.CONFIDENT, How.RATIO],
    rank_of=[0, 0, 0, 1, 1, 1, 0, 0],
    confidence_of=[0.0, 0.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    steps=3,
    verifies=[Verify(0, 2, 2, 1), Verify(2, 5, 4, 0)],
    lanes={"model": {"prefill": Spent(), "draft": Spent(3), "verify": Spent(2), "commit": Spent(1)}},
    mask_id=99,
)


class Words:
    def decode(self, ids, **_):
        return "".join(chr(ord("a") + i - 12) for i in ids)


def test_order_by_step_then_rank():
    assert TRACE.order() == [[2, 3], [6, 5], [7, 4]]


def test_counts_of_generated_positions():
    want = {"unmasked": 1, "accepted": 1, "resampled": 1, "kept": 1, "ratio": 1, "confident": 1}
    assert TRACE.counts() == want
    assert list(TRACE.counts()) == list(want), "in the order of How"


def test_figures():
    assert TRACE.total_forwards == 6
    assert TRACE.forwards == {"prefill": 0, "draft": 3, "verify": 2, "commit": 1}
    assert (TRACE.verified_span, TRACE.accepted) == ([2, 0, 4], [1, 0, 0])
    assert TRACE.gained == 2  # one accepted, and the verifier's own token at the first rejection


def empty(**more) -> Trace:
    return Trace(**{**dict(prompt_length=1, block_length=1, token_ids=[5, 6], step_of=[-1, 0], how_of=[1, 2], rank_of=[0, 0],
                           confidence_of=[0.0, 1.0], steps=1, verifies=[]), **more})  # fmt: skip


def test_nothing_verified():
    assert (empty().gained, empty().verified_span, empty().forwards) == (0, [0], {})


def test_lanes_add_up():
    one = {"target": {"verify": Spent(1, 5, 5, 20, 125)}, "drafter": {"draft": Spent(4, 4, 4, 10, 30)}}
    two = {"target": {"verify": Spent(2, 9, 9, 50, 400), "prefill": Spent(1, 8, 1, 0, 64)}}
    total = add_lanes([one, two])
    assert total["target"] == {"verify": Spent(3, 14, 14, 70, 525), "prefill": Spent(1, 8, 1, 0, 64)}
    assert total["drafter"] == one["drafter"]
    assert empty(lanes=total).forwards == {"verify": 3, "prefill": 1, "draft": 4}
    assert format_trace(empty(lanes=total)).splitlines()[-2:] == [
        "forwards of target: 4 (prefill 1, verify 3)",
        "forwards of drafter: 4 (draft 4)",
    ]


def test_what_is_taken_back():
    """Position 1 was decided, taken back and decided again."""
    trace = empty(steps=3, step_of=[-1, 2], edits=[(1, 1, 8, 99)], mask_id=99)
    assert trace.remasked == [(1, 1, 8)]
    assert trace.order() == [[], [], [1]], "the last time it was decided"
    assert trace.first_token(1) == 8
    assert empty(edits=[(1, 1, 8, 6)], mask_id=99).remasked == [], "an edit is no remasking"


def test_two_verifies_in_a_step():
    trace = empty(verifies=[Verify(0, 6, 4, 4), Verify(0, 2, 2, 1)])
    assert (trace.verified_span, trace.accepted) == ([6], [5])
    assert "[verified 4, accepted 4]  [verified 2, accepted 1]" in format_trace(trace)


def test_format():
    assert format_trace(TRACE).splitlines() == [
        "step    0 | 2+ 3~  [verified 2, accepted 1]",
        "step    1 | 6c 5",
        "step    2   7r 4-  [verified 4, accepted 0]",
        "forwards: 6 (draft 3, verify 2, commit 1)",
    ]


def test_format_with_text_in_reading_order():
    lines = format_trace(TRACE, Words()).splitlines()
    assert [line.strip() for line in lines[1:6:2]] == ["'ab'", "'de'", "'cf'"]


def test_format_of_a_step_that_decoded_nothing():
    trace = empty(block_length=2, step_of=[-1, 1], steps=2, verifies=[Verify(0, 1, 1, 0)])
    assert format_trace(trace).splitlines()[:2] == ["step    0     [verified 1, accepted 0]", "step    1 | 1"]


def test_json_is_complete():
    saved = json.loads(json.dumps(TRACE.to_json()))
    names = saved.pop("how_names")
    assert [names[h] for h in saved["how_of"][2:4]] == ["accepted", "resampled"]
    derived = {name: saved.pop(name) for name in ("forwards", "verified_span", "accepted")}
    assert derived == {name: getattr(TRACE, name) for name in derived}
    saved["verifies"] = [Verify(**v) for v in saved["verifies"]]
    saved["lanes"] = {lane: {k: Spent(**s) for k, s in kinds.items()} for lane, kinds in saved["lanes"].items()}
    assert Trace(**saved) == TRACE


# Position 2 was 18 at first, 19 for a while, and is 12 in the end; position 5 was 11.
EDITED = replace(TRACE, edits=[(1, 2, 18, 19), (2, 2, 19, 12), (2, 5, 11, 15)])


def test_edits_by_what_they_replaced():
    assert EDITED.edit_counts() == {"unmasked": 1, "accepted": 1, "edited": 1}
    assert TRACE.edit_counts() == {}
    assert EDITED.counts() == TRACE.counts(), "how a position was first decided stays"


def test_first_tokens():
    assert [EDITED.first_token(p) for p in (2, 3, 5)] == [18, 13, 11]


def test_format_of_edits():
    lines = format_trace(EDITED).splitlines()
    assert lines[2] == "      edits 2: 18 -> 19"
    assert lines[4] == "      edits 2: 19 -> 12, 5: 11 -> 15"
    spoken = [line.strip() for line in format_trace(EDITED, Words()).splitlines()]
    assert spoken[1] == "'gb'", "what the step wrote, not what became of it"
    assert "edits 2: 'g' -> 'h'" in spoken


def test_json_has_the_edits():
    saved = json.loads(json.dumps(EDITED.to_json()))
    assert saved["edits"] == [[1, 2, 18, 19], [2, 2, 19, 12], [2, 5, 11, 15]]
