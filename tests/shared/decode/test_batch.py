from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.decode.batch import Batch, Finished, by_tokens
from shared.options import Blocks, Sampling
from shared.policy.draft import Choice, Draft
from shared.policy.uniforms import Uniforms
from shared.trace import How

MASK, STOP, LENGTH = 99, 7, 4


def new_batch(prompts, *, rows=2, tokens=6, requests=None, steps=LENGTH) -> Batch:
    return Batch(
        prompts,
        requests=requests,
        rows=rows,
        block_length=LENGTH,
        steps=steps,
        max_new_tokens=tokens,
        mask_id=MASK,
        stop_ids=(STOP,),
        device=torch.device("cpu"),
        uniforms=Uniforms(rows, 50, seed=1),
    )


def write(
    batch: Batch, token: int = 5, take=None, *, how=How.UNMASKED, reach=0, confidence=0.5, drafted=None, finite=True
):
    """One step that fills ``take [b, L]`` (default: every masked position) of the active rows with ``token``; the draft was ``drafted``."""
    rows = batch.active
    index = batch.index(rows)
    block = batch.block(index)
    masked = block == MASK
    tokens = torch.full_like(block, token)
    confidence = torch.full(block.shape, confidence)
    entries, logits = torch.arange(len(rows)), torch.zeros(*block.shape, 3)
    draft = Draft(index, block, masked, tokens, confidence, logits, entries, batch.decoded[index], Sampling())
    choice = Choice.none(draft)
    place = torch.arange(LENGTH).expand_as(tokens)
    choice.add(masked & (torch.tensor(take) if take else masked), tokens, how, place)
    if drafted is not None:
        draft = replace(draft, tokens=torch.tensor(drafted))
    reach, finite = torch.full((len(rows),), reach), torch.tensor(finite).expand(len(rows))
    return batch.finish_step(rows, batch.record(draft, choice, reach, finite).tolist())


def finish(batch: Batch, i: int, decode=None, **blocks):
    return batch.retire(i, Blocks(**blocks), decode)


@given(st.lists(st.integers(1, 11), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 3))
def test_layout(lengths, tokens, rows):
    """Blocks lie at absolute multiples of L; what follows the prompt is masked."""
    batch = new_batch([[1] * n for n in lengths], rows=rows, tokens=tokens)
    filled = batch.admit()
    assert filled == batch.active == list(range(min(rows, len(lengths))))
    assert batch.admit() == []
    for i in filled:
        row, n = batch.rows[i], lengths[i]
        assert (row.start, row.total) == (n // LENGTH * LENGTH, -(-(n + tokens) // LENGTH) * LENGTH)
        assert batch.tokens[i].tolist() == [1] * n + [MASK] * (batch.capacity - n)
        assert batch.positions(torch.tensor([i]))[0].tolist() == list(range(row.start, row.start + LENGTH))
    assert batch.capacity == max(-(-(n + tokens) // LENGTH) * LENGTH for n in lengths)


def test_a_text_from_start_to_end():
    batch = new_batch([[1, 2, 3, 4, 5]], rows=1, tokens=5)
    batch.admit()
    assert write(batch, 10, [[False, True, False, True]], how=How.ACCEPTED, reach=4, confidence=0.75) == []
    assert batch.decoded.tolist() == [2]
    assert write(batch, 11) == [Finished(0, last=False, verified_to=0)]
    assert batch.new_tokens(0, 5) == [10, 11, 10]
    batch.advance([0])
    assert batch.decoded.tolist() == [0]
    assert write(batch, 12) == [Finished(0, last=True, verified_to=0)]
    batch.count("draft", [0])
    done = finish(batch, 0, decode=lambda ids: "".join(chr(87 + t) for t in ids))
    assert done.tokens == [10, 11, 10, 12, 12], "five of the seven decoded"
    assert done.text == "abacc"
    trace = done.trace
    assert trace.token_ids == [1, 2, 3, 4, 5, 10, 11, 10, 12, 12, 12, 12]
    assert trace.step_of == [-1] * 5 + [0, 1, 0, 2, 2, 2, 2]
    assert trace.how_of == [How.PROMPT] * 5 + [How.ACCEPTED, How.UNMASKED, How.ACCEPTED] + [How.UNMASKED] * 4
    assert trace.order() == [[5, 7], [6], [8, 9, 10, 11]]
    assert trace.confidence_of[5:8] == [0.75, 0.5, 0.75]
    assert (trace.verified_span, trace.accepted) == ([3, 0, 0], [2, 0, 0])
    assert trace.forwards == {"draft": 1}
    assert batch.active == []


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
    batch = new_batch([[1, 2]], rows=1, tokens=10)
    batch.admit()
    write(batch, 5)
    batch.advance([0])
    (done,) = write(batch, STOP)
    assert done.last
    assert finish(batch, done.row, trim_stop_tokens=trim, round_to_blocks=whole).tokens == want


def test_a_stop_id_in_the_prompt_does_not_count():
    batch = new_batch([[1, STOP]], rows=1)
    batch.admit()
    assert write(batch) == [Finished(0, last=False, verified_to=0)]


def test_a_stop_id_right_after_the_prompt_counts():
    batch = new_batch([[1, 2]], rows=1)
    batch.admit()
    write(batch, STOP, [[False, False, True, False]])
    assert write(batch) == [Finished(0, last=True, verified_to=0, stopped=True)]
    assert finish(batch, 0).tokens == []


@pytest.mark.parametrize(
    ("drafted", "reach", "verified_to"),
    [([5] * 4, 0, 0), ([5] * 4, 4, 4), ([5] * 4, 3, 3), ([5, 5, 6, 5], 4, 0)],
    ids=["not verified", "to the end", "up to the span's end", "a token differs from its draft"],
)
def test_how_far_a_finished_block_was_verified_as_it_is(drafted, reach, verified_to):
    batch = new_batch([[1] * 4], rows=1)
    batch.admit()
    assert write(batch, 5, how=How.ACCEPTED, reach=reach, drafted=[drafted]) == [Finished(0, False, verified_to)]


def test_a_draft_that_was_not_taken_does_not_count_as_changed():
    """What the step leaves masked, or what was known before, is no difference between the drafted block and the final one."""
    batch = new_batch([[1, 2]], rows=1)
    batch.admit()
    write(batch, 5, [[False, False, True, False]], drafted=[[5, 5, 5, 9]])
    assert write(batch, 5, reach=4, drafted=[[8, 8, 8, 5]]) == [Finished(0, False, 4)]


def test_a_free_row_takes_the_next_prompt():
    batch = new_batch([[1], [2, 2], [3, 3, 3]], rows=2, tokens=3, requests=[4, 9, 6])
    assert batch.admit() == [0, 1]
    write(batch)
    assert finish(batch, 0).request == 4
    assert batch.admit() == [0]
    assert batch.rows[0].request == 6
    assert batch.tokens[0, :4].tolist() == [3, 3, 3, MASK]
    assert (batch.decoded[0], batch.iteration[0], batch.uniforms.cursor[0]) == (0, 0, 0)


def test_quota_and_overtime():
    batch = new_batch([[1], [2]], steps=2)
    batch.admit()
    batch.step[0], batch.step[1] = 1, 2
    batch.schedule = torch.tensor([3, 1])
    due, late = batch.quota(torch.tensor([0, 1]))
    assert due.tolist() == [1, 3], "after the last step the schedule runs once more"
    assert late.tolist() == [False, True]


def test_forwards_are_counted_per_row_and_per_batch():
    batch = new_batch([[1], [2]])
    batch.admit()
    batch.count("draft", [0, 1])
    batch.count("verify", [1])
    assert dict(batch.forwards) == {"draft": 1, "verify": 1}
    assert [dict(row.forwards) for row in batch.rows] == [{"draft": 1}, {"draft": 1, "verify": 1}]


def test_a_block_that_does_not_finish():
    batch = new_batch([[1, 2, 3]], rows=1, steps=2)
    batch.admit()
    for _ in range(3):
        assert write(batch, MASK) == []
    with pytest.raises(RuntimeError, match="request 0, block at position 0, step 4: 1 positions still masked"):
        write(batch, MASK)


def test_logits_that_are_not_finite():
    batch = new_batch([[1], [2]], requests=[3, 8])
    batch.admit()
    with pytest.raises(FloatingPointError, match="request 3, block at position 0, step 1"):
        write(batch, confidence=float("nan"))
    with pytest.raises(FloatingPointError, match="the verifier logits hold NaN"):
        write(batch, finite=False)


def test_more_uniforms_than_there_are():
    batch = new_batch([[1]], rows=1, tokens=3)
    batch.admit()
    write(batch)
    batch.uniforms.cursor[0] = 51
    with pytest.raises(RuntimeError, match="request 0 used 51 uniforms, only 50 exist"):
        finish(batch, 0)


def test_groups_of_bounded_size():
    assert by_tokens({0: 4, 3: 4, 5: 4}, 8) == [[0, 3], [5]]
    assert by_tokens({0: 4, 3: 40, 5: 4}, 8) == [[0], [3], [5]]
    assert by_tokens({0: 2, 1: 4, 2: 2}, 12) == [[0, 1, 2]]
    assert by_tokens({}, 8) == []


def test_tokens_are_counted_where_the_family_tells_them():
    batch = new_batch([[1, 2], [3]])
    batch.admit()
    batch.count("draft", [0, 1], 8)
    batch.count("draft", [1], 4)
    batch.count("verify", [1])
    assert batch.forwards == {"draft": 2, "verify": 1}
    assert batch.forward_tokens == {"draft": 12, "verify": 0}
