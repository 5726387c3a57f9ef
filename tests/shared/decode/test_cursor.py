from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.decode.canvas import Canvas
from shared.decode.cursor import BlockCursor, Finished, most_iterations
from shared.decode.steps import by_tokens
from shared.options import Sampling
from shared.policy.draft import Choice, Draft
from shared.policy.uniforms import Uniforms
from shared.trace import How, Verify

MASK, STOP, LENGTH, WIDTH = 99, 7, 4, 24


def new_cursor(prompts, *, rows=2, tokens=6, requests=None, steps=LENGTH, verifies=1, **blocks) -> BlockCursor:
    canvas = Canvas(
        prompts,
        requests=requests,
        rows=rows,
        allocated=rows,
        width=WIDTH,
        iterations=most_iterations(WIDTH, LENGTH, steps),
        verifies_a_step=verifies,
        max_new_tokens=tokens,
        mask_id=MASK,
        stop_ids=(STOP,),
        device=torch.device("cpu"),
        uniforms=Uniforms(rows, 50, seed=1),
    )
    return BlockCursor(canvas, block_length=LENGTH, steps=steps, **blocks)


def admit(cursor: BlockCursor) -> list[int]:
    rows = cursor.canvas.admit()
    cursor.begin(rows)
    return rows


def write(
    cursor: BlockCursor,
    token: int = 5,
    take=None,
    *,
    how=How.UNMASKED,
    reach=0,
    confidence=0.5,
    drafted=None,
    finite=True,
):
    """One step that fills ``take [b, L]`` (default: every masked position) of the active rows with ``token``; the draft was ``drafted``."""
    rows = cursor.canvas.active
    index = cursor.canvas.index(rows)
    block = cursor.block(index)
    masked = block == MASK
    tokens = torch.full_like(block, token)
    confidence = torch.full(block.shape, confidence)
    entries, logits = torch.arange(len(rows)), torch.zeros(*block.shape, 3)
    draft = Draft(index, block, masked, tokens, confidence, logits, entries, cursor.decoded[index], Sampling())
    choice = Choice.none(draft)
    place = torch.arange(LENGTH).expand_as(tokens)
    choice.add(masked & (torch.tensor(take) if take else masked), tokens, how, place)
    if drafted is not None:
        draft = replace(draft, tokens=torch.tensor(drafted))
    reach, finite = torch.full((len(rows),), reach), torch.tensor(finite).expand(len(rows))
    return cursor.finish_step(rows, cursor.record(draft, choice, reach, finite).tolist())


def finish(cursor: BlockCursor, i: int, decode=None):
    end, ids = cursor.end(i), cursor.canvas.tokens[i].tolist()
    how = {"block_length": LENGTH, "edits": cursor.edits(i), "decode": decode}
    return cursor.canvas.retire(i, ids=ids[:end], tokens=cursor.returned(i, ids, end), **how)


@given(st.lists(st.integers(1, 11), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 3))
def test_layout(lengths, tokens, rows):
    """Blocks lie at absolute multiples of L; what follows the prompt is masked."""
    cursor = new_cursor([[1] * n for n in lengths], rows=rows, tokens=tokens)
    filled = admit(cursor)
    assert filled == cursor.canvas.active == list(range(min(rows, len(lengths))))
    assert admit(cursor) == []
    for i in filled:
        row, n = cursor.blocks[i], lengths[i]
        assert (row.start, row.total) == (n // LENGTH * LENGTH, -(-(n + tokens) // LENGTH) * LENGTH)
        assert cursor.canvas.tokens[i].tolist() == [1] * n + [MASK] * (WIDTH - n)
        assert cursor.positions(torch.tensor([i]))[0].tolist() == list(range(row.start, row.start + LENGTH))


def test_a_text_from_start_to_end():
    cursor = new_cursor([[1, 2, 3, 4, 5]], rows=1, tokens=5)
    admit(cursor)
    assert write(cursor, 10, [[False, True, False, True]], how=How.ACCEPTED, reach=4, confidence=0.75) == []
    assert cursor.decoded.tolist() == [2]
    assert write(cursor, 11) == [Finished(0, last=False, verified_to=0)]
    assert cursor.new_tokens(0) == cursor.text_so_far(0) == [10, 11, 10]
    cursor.advance([0])
    assert cursor.decoded.tolist() == [0]
    assert write(cursor, 12) == [Finished(0, last=True, verified_to=0)]
    cursor.canvas.rows[0].spend("model", "draft", 1, 4, 4, 0, 16)
    done = finish(cursor, 0, decode=lambda ids: "".join(chr(87 + t) for t in ids))
    assert done.tokens == [10, 11, 10, 12, 12], "five of the seven decoded"
    assert done.text == "abacc"
    trace = done.trace
    assert trace.token_ids == [1, 2, 3, 4, 5, 10, 11, 10, 12, 12, 12, 12]
    assert trace.step_of == [-1] * 5 + [0, 1, 0, 2, 2, 2, 2]
    assert trace.how_of == [How.PROMPT] * 5 + [How.ACCEPTED, How.UNMASKED, How.ACCEPTED] + [How.UNMASKED] * 4
    assert trace.order() == [[5, 7], [6], [8, 9, 10, 11]]
    assert trace.confidence_of[5:8] == [0.75, 0.5, 0.75]
    assert trace.verifies == [Verify(step=0, proposed=3, sent=3, accepted=2)]
    assert trace.forwards == {"draft": 1}
    assert cursor.canvas.active == []


@pytest.mark.parametrize(
    ("trim", "whole", "want"),
    [
        (True, False, [5, 5]),
        (False, False, [5, 5, STOP, STOP, STOP, STOP]),
        (True, True, [5, 5]),
        (False, True, [5, 5, STOP, STOP, STOP, STOP, MASK, MASK, MASK, MASK]),
    ],
)
def test_what_is_returned_after_a_stop(trim, whole, want):
    """Prompt 2, ten new tokens, blocks of 4; the stop comes in the second of three blocks."""
    cursor = new_cursor([[1, 2]], rows=1, tokens=10, trim_stop_tokens=trim, round_to_blocks=whole)
    admit(cursor)
    write(cursor, 5)
    cursor.advance([0])
    (done,) = write(cursor, STOP)
    assert done.last
    assert finish(cursor, done.row).tokens == want


def test_a_stop_id_in_the_prompt_does_not_count():
    cursor = new_cursor([[1, STOP]], rows=1)
    admit(cursor)
    assert write(cursor) == [Finished(0, last=False, verified_to=0)]


def test_a_stop_id_right_after_the_prompt_counts():
    cursor = new_cursor([[1, 2]], rows=1)
    admit(cursor)
    write(cursor, STOP, [[False, False, True, False]])
    assert write(cursor) == [Finished(0, last=True, verified_to=0, stopped=True)]
    assert finish(cursor, 0).tokens == []


@pytest.mark.parametrize(
    ("drafted", "reach", "verified_to"),
    [([5] * 4, 0, 0), ([5] * 4, 4, 4), ([5] * 4, 3, 3), ([5, 5, 6, 5], 4, 0)],
    ids=["not verified", "to the end", "up to the span's end", "a token differs from its draft"],
)
def test_how_far_a_finished_block_was_verified_as_it_is(drafted, reach, verified_to):
    cursor = new_cursor([[1] * 4], rows=1)
    admit(cursor)
    assert write(cursor, 5, how=How.ACCEPTED, reach=reach, drafted=[drafted]) == [Finished(0, False, verified_to)]


def test_a_draft_that_was_not_taken_does_not_count_as_changed():
    """What the step leaves masked, or what was known before, is no difference between the drafted block and the final one."""
    cursor = new_cursor([[1, 2]], rows=1)
    admit(cursor)
    write(cursor, 5, [[False, False, True, False]], drafted=[[5, 5, 5, 9]])
    assert write(cursor, 5, reach=4, drafted=[[8, 8, 8, 5]]) == [Finished(0, False, 4)]


def test_a_free_row_takes_the_next_prompt():
    cursor = new_cursor([[1], [2, 2], [3, 3, 3]], rows=2, tokens=3, requests=[4, 9, 6])
    assert admit(cursor) == [0, 1]
    write(cursor)
    assert finish(cursor, 0).request == 4
    assert admit(cursor) == [0]
    assert cursor.canvas.rows[0].request == 6
    assert cursor.canvas.tokens[0, :4].tolist() == [3, 3, 3, MASK]
    assert (cursor.decoded[0], cursor.canvas.iteration[0], cursor.canvas.uniforms.cursor[0]) == (0, 0, 0)


def test_quota_and_overtime():
    cursor = new_cursor([[1], [2]], steps=2)
    admit(cursor)
    cursor.step[0], cursor.step[1] = 1, 2
    cursor.schedule = torch.tensor([3, 1])
    due, late = cursor.quota(torch.tensor([0, 1]))
    assert due.tolist() == [1, 3], "after the last step the schedule runs once more"
    assert late.tolist() == [False, True]


def test_a_block_that_does_not_finish():
    cursor = new_cursor([[1, 2, 3]], rows=1, steps=2)
    admit(cursor)
    for _ in range(3):
        assert write(cursor, MASK) == []
    with pytest.raises(RuntimeError, match="request 0, block at position 0, step 4: 1 positions still masked"):
        write(cursor, MASK)


def test_logits_that_are_not_finite():
    cursor = new_cursor([[1], [2]], requests=[3, 8])
    admit(cursor)
    with pytest.raises(FloatingPointError, match="request 3, block at position 0, step 1"):
        write(cursor, confidence=float("nan"))
    with pytest.raises(FloatingPointError, match="the verifier logits hold NaN"):
        write(cursor, finite=False)


def test_more_uniforms_than_there_are():
    cursor = new_cursor([[1]], rows=1, tokens=3)
    admit(cursor)
    write(cursor)
    cursor.canvas.uniforms.cursor[0] = 51
    with pytest.raises(RuntimeError, match="request 0 used 51 uniforms, only 50 exist"):
        finish(cursor, 0)


def test_groups_of_bounded_size():
    assert by_tokens({0: 4, 3: 4, 5: 4}, 8) == [[0, 3], [5]]
    assert by_tokens({0: 4, 3: 40, 5: 4}, 8) == [[0], [3], [5]]
    assert by_tokens({0: 2, 1: 4, 2: 2}, 12) == [[0, 1, 2]]
    assert by_tokens({}, 8) == []


def test_a_text_that_goes_on_streams_only_what_is_returned():
    cursor = new_cursor([[1, 2, 3]], rows=1, tokens=2)
    admit(cursor)
    write(cursor, 5)
    cursor.advance([0])
    assert cursor.new_tokens(0) == [MASK], "of the second block only the first token is wanted"
    rounded = new_cursor([[1, 2, 3]], rows=1, tokens=2, round_to_blocks=True)
    admit(rounded)
    write(rounded, 5)
    rounded.advance([0])
    assert rounded.new_tokens(0) == [MASK] * 4


def test_several_verifies_a_step_and_none():
    """Each row keeps its own list; a row that was not verified leaves no entry."""
    cursor = new_cursor([[1], [2]], verifies=2)
    admit(cursor)
    canvas, rows = cursor.canvas, torch.tensor([0, 1])
    numbers = lambda *values: torch.tensor(values)  # noqa: E731
    canvas.note_verify(rows, torch.tensor([True, False]), numbers(5, 6), numbers(3, 6), numbers(1, 6))
    canvas.note_verify(rows, torch.tensor([True, True]), numbers(4, 7), numbers(4, 2), numbers(0, 2), 1)
    canvas.step(rows)
    canvas.note_verify(rows, torch.tensor([False, True]), numbers(9, 9), numbers(9, 9), numbers(9, 9))
    canvas.step(rows)
    for row in canvas.rows:
        row.iterations += 2
    write(cursor, 5)
    write(cursor, 5)
    first, second = finish(cursor, 0).trace, finish(cursor, 1).trace
    assert first.verifies == [Verify(0, 5, 3, 1), Verify(0, 4, 4, 0)]
    assert second.verifies == [Verify(0, 7, 2, 2), Verify(1, 9, 9, 9)]
    assert (first.verified_span[0], first.accepted[0]) == (7, 1)
