from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.network.kv_cache import BlockCache

LAYERS, ROWS, HEADS, SLOTS, DIM = 2, 3, 2, 24, 2


def new_cache() -> BlockCache:
    return BlockCache(LAYERS, ROWS, HEADS, SLOTS, DIM)


def fresh(rng: torch.Generator, rows: int, tokens: int) -> torch.Tensor:
    """Random ``[LAYERS, 2, rows, HEADS, tokens, DIM]``: keys and values of one forward."""
    return torch.randn(LAYERS, 2, rows, HEADS, tokens, DIM, generator=rng)


@st.composite
def programs(draw):
    """Forwards over some rows, each followed by a commit of part of it or by none, and resets."""
    actions = []
    for _ in range(draw(st.integers(1, 9))):
        rows = draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True))
        if draw(st.integers(0, 5)) == 0:
            actions.append(("reset", rows))
        else:
            tokens = draw(st.integers(1, 5))
            counts = draw(st.lists(st.integers(0, tokens), min_size=len(rows), max_size=len(rows)))
            actions.append(
                ("forward", None if sorted(rows) == list(range(ROWS)) and draw(st.booleans()) else rows, tokens, counts)
            )
    return actions


@given(programs(), st.integers(0, 1000))
def test_against_a_list_of_lists(program, seed):
    """Whatever is written, committed or forgotten, a forward sees each row's committed tokens and its own, and no other's."""
    cache, rng = new_cache(), torch.Generator().manual_seed(seed)
    kept: list[list[torch.Tensor]] = [[] for _ in range(ROWS)]  # per row: [LAYERS, 2, HEADS, DIM] of each token
    for action in program:
        if action[0] == "reset":
            cache.reset(action[1])
            for row in action[1]:
                kept[row] = []
            continue
        _, rows, tokens, counts = action
        index = list(range(ROWS)) if rows is None else rows
        if max(len(kept[r]) for r in index) + tokens > SLOTS:
            with pytest.raises(ValueError, match="slots"):
                cache.window(tokens, rows)
            return
        window, new = cache.window(tokens, rows), fresh(rng, len(index), tokens)
        mask = window.mask(None)
        for layer in range(LAYERS):
            seen = window.update(layer, new[layer, 0], new[layer, 1])
            for k, row in enumerate(index):
                own = [new[:, :, k, :, t] for t in range(tokens)]
                want = torch.stack(kept[row] + own, -2)[layer]  # [2, HEADS, tokens, DIM]
                visible = slice(None) if mask is None else mask[k, 0, 0]
                assert torch.equal(torch.stack([s[k][:, visible] for s in seen]), want)
        cache.commit(counts, rows)
        for k, row in enumerate(index):
            kept[row] += [new[:, :, k, :, t].clone() for t in range(counts[k])]
        assert cache.lengths == [len(tokens) for tokens in kept]
        assert cache.length.tolist() == cache.lengths


def with_lengths(*lengths: int) -> BlockCache:
    cache = new_cache()
    cache.commit(lengths)
    return cache


window_cases = st.tuples(
    st.lists(st.integers(0, 6), min_size=ROWS, max_size=ROWS),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 3),
    st.permutations(range(ROWS)),
    st.integers(1, ROWS),
)


@given(window_cases, st.sampled_from(["none", "shared", "per row"]), st.integers(0, 1000))
def test_mask_by_its_definition(case, kind, seed):
    lengths, tokens, offset, extra, order, count = case
    rows, width = order[:count], offset + tokens + extra
    cache = with_lengths(*lengths)
    window = cache.window(tokens, rows, offset=offset, width=width if extra else None)
    rng = torch.Generator().manual_seed(seed)
    local = torch.rand(count, tokens, width, generator=rng) < 0.5
    given_mask = {"none": None, "shared": local[0], "per row": local}[kind]
    local = {"none": torch.ones_like(local), "shared": local[:1].expand_as(local), "per row": local}[kind]
    got = window.mask(given_mask)
    assert window.extent == max(lengths[r] for r in rows) + width
    want = torch.zeros(count, 1, tokens, window.extent, dtype=torch.bool)
    for k, row in enumerate(rows):
        for query in range(tokens):
            want[k, 0, query, : lengths[row]] = True
            for j in range(width):
                want[k, 0, query, lengths[row] + j] = local[k, query, j]
    assert want.all() if got is None else torch.equal(got.expand_as(want), want)


@given(window_cases, st.integers(0, 1000))
def test_an_additive_mask_is_the_bool_one_in_another_form(case, seed):
    lengths, tokens, offset, extra, order, count = case
    cache, rng = with_lengths(*lengths), torch.Generator().manual_seed(seed)
    width = offset + tokens + extra
    allowed = torch.rand(tokens, width, generator=rng) < 0.5
    window = cache.window(tokens, order[:count], offset=offset, width=width)
    boolean = window.mask(allowed)
    additive = window.mask(torch.where(allowed, 0.0, float("-inf")))
    assert torch.equal(additive == 0, boolean)
    assert torch.equal(additive == float("-inf"), ~boolean)


def test_a_sub_block_is_rewritten_in_place():
    """Rows hold 2 and 4 tokens; a block of 3 is written, then its middle token again while all 3 stay visible."""
    cache = with_lengths(2, 4, 0)
    rng = torch.Generator().manual_seed(0)
    block, middle = fresh(rng, 2, 3), fresh(rng, 2, 1)
    cache.window(3, [0, 1]).update(0, block[0, 0], block[0, 1])
    window = cache.window(1, [0, 1], offset=1, width=3)
    keys, values = window.update(0, middle[0, 0], middle[0, 1])
    assert keys.shape == (2, HEADS, 4 + 3, DIM)
    for k, length in enumerate((2, 4)):
        want = block[0, :, k].clone()
        want[:, :, 1] = middle[0, :, k, :, 0]
        assert torch.equal(torch.stack([keys[k], values[k]])[:, :, length : length + 3], want)
    visible = window.mask(None)[:, 0, 0]
    assert visible.sum(-1).tolist() == [5, 7]


def test_an_entry_ahead_sees_the_block_its_row_commits_in_the_same_forward():
    """Row 0 (3 tokens) commits a block and drafts the next one at once; row 1 (5 tokens) only drafts."""
    cache, rng = with_lengths(3, 5, 0), torch.Generator().manual_seed(0)
    old = fresh(rng, 2, 5)
    for layer in range(LAYERS):
        cache.keys[layer, :2, :, :5], cache.values[layer, :2, :, :5] = old[layer, 0], old[layer, 1]
    new = fresh(rng, 3, 2)  # entries: draft of row 0, draft of row 1, the block of row 0
    window = cache.window(2, [0, 1, 0], ahead=[2, 0, 0])
    mask = window.mask(None)[:, 0, 0]
    assert window.extent == 7
    assert mask.int().tolist() == [[1] * 7, [1] * 7, [1] * 5 + [0] * 2]
    for layer in range(LAYERS):
        keys, values = window.update(layer, new[layer, 0], new[layer, 1])
        for part, (seen, was, now) in enumerate(
            ((keys, old[layer, 0], new[layer, 0]), (values, old[layer, 1], new[layer, 1]))
        ):
            assert torch.equal(seen[0], torch.cat([was[0, :, :3], now[2], now[0]], 1)), part
            assert torch.equal(seen[1], torch.cat([was[1], now[1]], 1))
            assert torch.equal(seen[2][:, :5], torch.cat([was[0, :, :3], now[2]], 1))
    assert cache.lengths == [3, 5, 0], "only a commit moves a length"
    cache.commit([2], [0])
    draft_again = fresh(rng, 2, 2)
    keys, _ = cache.window(2, [0, 1]).update(0, draft_again[0, 0], draft_again[0, 1])
    assert torch.equal(keys[0, :, :5], torch.cat([old[0, 0, 0, :, :3], new[0, 0, 2]], 1)), "the block was kept"


def test_entries_ahead_at_one_prefix_see_everything():
    """Prefixes 2 + 2 and 4 + 0 are the same: there is nothing to hide, but the slots differ from those of a plain window."""
    window = with_lengths(2, 4, 0).window(2, [0, 1], ahead=[2, 0])
    assert window.uniform
    assert window.mask(None) is None
    assert window.prefix.tolist() == [4, 4]
    with pytest.raises(ValueError, match="slots"):
        with_lengths(SLOTS - 3, 0, 0).window(2, [0], ahead=[2])


def test_no_mask_when_all_see_all():
    assert with_lengths(3, 3, 3).window(2).mask(None) is None
    assert with_lengths(3, 3, 0).window(2, [0, 1]).mask(None) is None
    assert with_lengths(3, 3, 0).window(2).mask(None) is not None


def test_a_mask_is_built_once():
    window, local = new_cache().window(2), torch.ones(2, 2, dtype=torch.bool)
    assert window.mask(local) is window.mask(local)
    assert window.mask(local) is not window.mask(local.clone())


def test_a_rejected_draft_is_overwritten():
    cache, rng = with_lengths(1, 1, 1), torch.Generator().manual_seed(0)
    draft, final = fresh(rng, ROWS, 4), fresh(rng, ROWS, 2)
    cache.window(4).update(0, draft[0, 0], draft[0, 1])
    keys, _ = cache.window(2).update(0, final[0, 0], final[0, 1])
    assert keys.shape[2] == 3
    assert torch.equal(keys[:, :, 1:], final[0, 0])


def test_overflow_raises():
    cache = with_lengths(SLOTS - 2, 0, 0)
    with pytest.raises(ValueError, match="needs 25 cache slots, 24 are allocated"):
        cache.window(3)
    cache.window(3, [1, 2])
    with pytest.raises(ValueError, match="row 0 would hold 25 tokens"):
        cache.commit([3], [0])


def test_commit_wants_one_count_a_row():
    with pytest.raises(ValueError, match="zip"):
        new_cache().commit([1, 2])


def test_size_and_dtype():
    cache = BlockCache(2, 3, 4, 5, 6, dtype=torch.bfloat16)
    assert cache.slots == 5
    assert cache.nbytes == 2 * (2 * 3 * 4 * 5 * 6) * 2


def test_width_covers_what_is_written():
    with pytest.raises(ValueError, match="width 1 does not hold 3 tokens"):
        with_lengths(1, 3, 0).window(3, width=1)
