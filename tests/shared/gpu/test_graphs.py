"""Which captured graph serves a wanted shape, and what a replay does with entries it was not asked for."""

import pytest
import torch

from shared.gpu.graphs import GraphRunner, Shape, best_fit, inputs_of, sizes
from shared.network.kv_cache import Where
from shared.network.masks import token_causal


def test_sizes_are_powers_of_two_and_the_most():
    assert sizes(1) == [1]
    assert sizes(6) == [1, 2, 4, 6]
    assert sizes(32) == [1, 2, 4, 8, 16, 32]


def test_best_fit_is_the_smallest_that_holds_both_kinds_of_entries():
    shapes = [
        Shape(1, 16),
        Shape(4, 16),
        Shape(4, 16, commit_rows=1),
        Shape(4, 16, commit_rows=4),
        Shape(4, 32, picks=16),
    ]
    assert best_fit(shapes, Shape(1, 16)) == Shape(1, 16)
    assert best_fit(shapes, Shape(3, 16)) == Shape(4, 16)
    assert best_fit(shapes, Shape(1, 16, commit_rows=1)) == Shape(4, 16, commit_rows=1)
    assert best_fit(shapes, Shape(2, 16, commit_rows=3)) == Shape(4, 16, commit_rows=4)
    assert best_fit(shapes, Shape(2, 32, picks=16)) == Shape(4, 32, picks=16)
    assert best_fit(shapes, Shape(2, 32, picks=8)) is None
    assert best_fit(shapes, Shape(5, 16)) is None
    assert best_fit(shapes, Shape(1, 16, width=32)) is None
    assert best_fit([*shapes, Shape(2, 16, width=32)], Shape(1, 16, width=32)) == Shape(2, 16, width=32)

    assert best_fit([Shape(2, 16, branches=True)], Shape(1, 16)) is None
    assert best_fit([Shape(2, 16, features=(1,))], Shape(1, 16)) is None


def given(ids, positions, rows, prefixes, mask=None, at=None, offsets=None) -> dict:
    where = Where(rows, offset=offsets)
    lengths = torch.zeros(int(rows.max()) + 1, dtype=torch.long, device=rows.device)
    return {**inputs_of(ids, positions, where, lengths, mask, at), "prefixes": prefixes}


def test_inputs_are_those_of_the_window():
    lengths = torch.tensor([4, 9, 2])
    where = Where(torch.tensor([2, 1, 1]), ahead=torch.tensor([0, 8, 0]), write_rows=torch.tensor([0, 0, 1]))
    found = inputs_of(torch.zeros(3, 1), torch.zeros(3, 1), where, lengths, None, None)
    assert found["rows"].tolist() == [2, 1, 1]
    assert found["prefixes"].tolist() == [2, 17, 9]
    assert found["write_rows"].tolist() == [0, 0, 1]
    assert found["offsets"] is None


def test_runner_falls_back_to_eager():
    def forward(input_ids, logit_rows, **_):
        return input_ids * logit_rows

    runner = GraphRunner(forward, "cpu")
    ids, entry = torch.arange(4)[None], torch.zeros(1, dtype=torch.long)
    assert torch.equal(runner(given(ids, ids, entry, entry), logit_rows=1), ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_runner_replays_with_padding():
    table = torch.randn(10, 6, device="cuda")

    def forward(input_ids, position_ids, rows, prefixes, local_mask, logits_at, logit_rows, **_):
        out = table[input_ids] + position_ids[..., None] + (rows * prefixes)[:, None, None]
        out = (out + local_mask.sum(-1)[..., None])[:logit_rows]
        return out if logits_at is None else out.gather(1, logits_at[..., None].expand(-1, -1, 6))

    runner = GraphRunner(forward, "cuda")
    runner.capture(
        [
            Shape(2, 4),
            Shape(4, 4),
            Shape(4, 4, picks=2),
            Shape(4, 4, commit_rows=2),
            Shape(4, 4, picks=2, commit_rows=2),
        ]
    )
    mask = token_causal(4, "cuda")
    for logit_rows, commit_rows in ((1, 0), (2, 0), (3, 0), (5, 0), (1, 1), (3, 2), (4, 3)):
        batch = logit_rows + commit_rows
        ids, positions = (torch.randint(10, (batch, 4), device="cuda") for _ in range(2))
        rows, at = torch.arange(batch, device="cuda"), torch.randint(4, (logit_rows, 2), device="cuda")
        prefixes = torch.randint(50, (batch,), device="cuda")
        for picked in (None, at):
            got = runner(given(ids, positions, rows, prefixes, mask, picked), logit_rows=logit_rows)
            want = forward(ids, positions, rows, prefixes, mask.expand(batch, -1, -1), picked, logit_rows)
            assert torch.equal(got, want), (logit_rows, commit_rows)
            assert runner.owns(got) == (logit_rows <= 4 and commit_rows <= 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_lasting_logits_outlast_other_replays():
    def forward(input_ids, logits_at, logit_rows, offsets, width, **_):
        out = (input_ids + (0 if offsets is None else width * offsets[:, None]))[..., None].float()
        return out[:logit_rows].gather(1, logits_at[..., None])

    runner = GraphRunner(forward, "cuda")
    runner.capture([Shape(2, 4, picks=2, lasting=True), Shape(2, 4, picks=3), Shape(2, 4, picks=2, width=8)])
    ids = torch.randint(10, (2, 4), device="cuda")
    entry, at = torch.arange(2, device="cuda"), torch.tensor([[0, 2, 3], [1, 1, 0]], device="cuda")
    kept = runner(given(ids, ids, entry, entry, at=at[:, :2]), logit_rows=2)
    want = ids.gather(1, at[:, :2]).float()[..., None]
    other = runner(given(ids + 5, ids, entry, entry, at=at), logit_rows=2)
    moved = runner(given(ids, ids, entry, entry, at=at[:, :2], offsets=entry), logit_rows=2, width=8)
    assert torch.equal(kept, want)
    assert torch.equal(moved, want + 8 * entry[:, None, None])
    assert other.shape == (2, 3, 1)
