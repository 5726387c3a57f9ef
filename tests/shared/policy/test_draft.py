from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.options import Sampling
from shared.policy.draft import Choice, Draft, rank_by
from shared.trace import How

masks = st.lists(st.booleans(), min_size=1, max_size=9)


def make_draft(masked: list[list[bool]], tokens=None, logits=None, sampling: Sampling | None = None) -> Draft:
    masked = torch.tensor(masked)
    rows, length = masked.shape
    tokens = torch.arange(rows * length).reshape(rows, length) if tokens is None else torch.tensor(tokens)
    logits = torch.zeros(rows, length, 3) if logits is None else logits
    confidence = torch.linspace(0.1, 0.9, rows * length).reshape(rows, length)
    decoded = torch.arange(rows)
    return Draft(
        torch.arange(rows),
        tokens,
        masked,
        tokens,
        confidence,
        logits,
        torch.arange(rows),
        decoded,
        sampling or Sampling(),
    )


@given(masks)
def test_span_is_the_first_maximal_run(masked):
    draft = make_draft([masked])
    want = []
    for i, here in enumerate(masked):
        if here:
            want.append(i)
        elif want:
            break
    assert draft.span[0].nonzero()[:, 0].tolist() == want
    if want:
        assert int(draft.first_masked) == want[0]


def test_span_per_row():
    draft = make_draft([[False, True, True, False, True], [True] * 5, [False] * 4 + [True], [False] * 5])
    assert draft.span.int().tolist() == [[0, 1, 1, 0, 0], [1] * 5, [0, 0, 0, 0, 1], [0] * 5]


def test_select():
    draft = make_draft([[True, False], [False, True], [True, True]])
    part = draft.select(torch.tensor([2, 0]))
    assert part.rows.tolist() == [2, 0]
    assert part.span.tolist() == [[True, True], [True, False]]
    assert part.tokens.tolist() == [[4, 5], [0, 1]]
    assert part.decoded.tolist() == [2, 0]
    assert part.sampling is draft.sampling


def test_log_weights_use_the_target_temperature():
    logits = torch.tensor([[[2.0, 1.0, 0.0]]])
    assert torch.equal(make_draft([[True]], logits=logits).log_weights, logits), "greedy: the plain logits"
    half = make_draft([[True]], logits=logits, sampling=Sampling(verify_temperature=0.5, top_k=2)).log_weights
    assert half.tolist() == [[[4.0, 2.0, float("-inf")]]]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=8))
def test_rank_by(cells):
    key, take = zip(*cells, strict=True)
    rank = rank_by(torch.tensor([key]), torch.tensor([take]))[0].tolist()
    order = sorted((i for i, t in enumerate(take) if t), key=lambda i: (key[i], i))
    assert [rank[i] for i in order] == list(range(len(order)))
    assert sorted(rank) == list(range(len(key)))


def row(*flags: int) -> torch.Tensor:
    return torch.tensor([flags], dtype=torch.bool)


def test_choice_adds_in_order_and_never_overwrites():
    draft = make_draft([[True] * 4], tokens=[[10, 11, 12, 13]])
    choice = Choice.none(draft)
    choice.add(row(0, 1, 1, 0), draft.tokens, How.ACCEPTED, torch.tensor([[0.0, 2.0, 1.0, 0.0]]))
    choice.add(row(1, 1, 0, 0), draft.tokens + 90, How.RESAMPLED, torch.tensor([[5.0, 0.0, 0.0, 0.0]]))
    assert choice.take.tolist() == [[True, True, True, False]]
    assert choice.tokens.tolist() == [[100, 11, 12, 13]]
    assert choice.how.tolist() == [[How.RESAMPLED, How.ACCEPTED, How.ACCEPTED, How.NONE]]
    assert choice.rank[0, :3].tolist() == [2, 1, 0]
    assert choice.count.tolist() == [3]
    assert draft.tokens.tolist() == [[10, 11, 12, 13]], "the draft is left alone"


@given(st.lists(masks.map(lambda m: (m * 6)[:6]), min_size=1, max_size=5))
def test_every_position_is_chosen_once(adds):
    draft = make_draft([[True] * 6])
    choice, owner = Choice.none(draft), {}
    for k, flags in enumerate(adds):
        choice.add(row(*flags), torch.full((1, 6), k), How.UNMASKED, torch.arange(6)[None])
        owner |= {i: k for i, f in enumerate(flags) if f and i not in owner}
    assert choice.take[0].nonzero()[:, 0].tolist() == sorted(owner)
    assert all(int(choice.tokens[0, i]) == k for i, k in owner.items())
    assert int(choice.count) == len(owner)
    assert sorted(int(choice.rank[0, i]) for i in owner) == list(range(len(owner)))
    assert sorted(owner, key=lambda i: int(choice.rank[0, i])) == list(owner)[: len(owner)]


def test_put_replaces_rows():
    draft = make_draft([[True] * 2] * 3)
    choice, part = Choice.none(draft), Choice.none(draft.select(torch.tensor([2, 0])))
    part.add(torch.tensor([[True, False], [True, True]]), part.tokens + 50, How.ACCEPTED, torch.arange(2).expand(2, 2))
    choice.put(torch.tensor([2, 0]), part)
    assert choice.count.tolist() == [2, 0, 1]
    assert choice.tokens.tolist() == [[50, 51], [2, 3], [54, 5]]
    assert choice.take.tolist() == [[True, True], [False, False], [True, False]]


def test_none_takes_nothing():
    choice = Choice.none(make_draft([[True, False]]))
    assert not choice.take.any()
    assert choice.count.tolist() == [0]


def test_how_is_stable():
    """The numbers are in saved traces."""
    names = ["NONE", "PROMPT", "UNMASKED", "ACCEPTED", "RESAMPLED", "KEPT", "RATIO", "CONFIDENT", "NEXT", "EDITED"]
    names += ["FORCED", "BONUS", "FILLED", "REMASKED"]
    assert [h.name for h in How] == names
    assert [int(h) for h in How] == list(range(len(names)))


def test_a_draft_is_frozen():
    with pytest.raises(AttributeError):
        make_draft([[True]]).tokens = None
