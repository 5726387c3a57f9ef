"""The attention kernels against their naive twins, and the twins against `shared.network.attention`; the logic that is no kernel runs anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shared.gpu.attention import (
    SplitPlan,
    attend_long,
    attend_long_naive,
    attend_split,
    attend_split_naive,
    split_plan,
    tile_extents,
)
from shared.gpu.rope import Heads, LayerWindow, QKNorm, rope_write, rope_write_naive
from shared.network.attention import attend
from shared.network.masks import block_causal, causal_until, token_causal, two_copy_verify
from tests.shared.gpu.kernels import DEVICE, DTYPES, ON_GPU, TOLERANCE, error, needs_kernels, overlaps, random_tensor


class Case:
    """A random cache and raw projections of new tokens.

    ``rows``: those the entries read; ``to``: those they write, where not the same. With ``offset``, each entry writes that much behind its prefix, and sees
    ``beside`` slots more than up to its own tokens.
    """

    def __init__(
        self, lengths, rows, tokens, heads, dtype, slots, mask=None, *, offset=0, beside=0, to=None, turn=None, normed=True
    ):  # fmt: skip
        self.heads, self.dtype, self.mask, self.batch = heads, dtype, mask, len(rows)
        shape = (len(lengths), heads.kv, slots, heads.dim)
        self.keys, self.values = random_tensor(*shape, dtype=dtype), random_tensor(*shape, dtype=dtype)
        index = torch.tensor(rows, device=DEVICE)
        prefixes = torch.tensor(lengths, device=DEVICE)[index.clamp(min=0)]
        self.window = LayerWindow(self.keys, self.values, prefixes, index)
        if offset or beside:
            moved = {"offsets": torch.full_like(index, offset), "width": offset + tokens + beside}
            self.window = replace(self.window, **moved)
        if to is not None:
            self.window = replace(self.window, write_rows=torch.tensor(to, device=DEVICE))
        self.qkv = random_tensor(len(rows) * tokens, heads.width, dtype=dtype)
        angle = torch.randn(4096, turn or heads.dim // 2, device=DEVICE)
        weights = [random_tensor(heads.dim, dtype=dtype) if normed else None for _ in range(2)]
        self.norm = QKNorm(*weights, angle.cos().to(dtype), angle.sin().to(dtype), 1e-6)
        self.positions = torch.randint(4096, (len(rows), tokens), device=DEVICE)

    def copied(self) -> LayerWindow:
        return replace(self.window, keys=self.keys.clone(), values=self.values.clone())

    def written(self) -> torch.Tensor:
        """Which elements of the cache a forward has to write, as its shape says."""
        nowhere = replace(self.window, keys=torch.full_like(self.keys, float("nan")), values=self.values.clone())
        rope_write_naive(self.qkv.clone(), self.positions, nowhere, self.heads, self.norm)
        return ~nowhere.keys.isnan()

    def check_split(self, plan=None, overlap=False):
        window, twin = self.copied(), self.copied()
        inputs = (self.heads, self.norm, self.mask)
        got = attend_split(self.qkv, self.positions, window, *inputs, plan=plan, overlap=overlap)
        want = attend_split_naive(self.qkv, self.positions, twin, *inputs)
        self._compare(got, want, window, twin)

    def check_long(self):
        window, twin, qkv = self.copied(), self.copied(), self.qkv.clone()
        rope_write(qkv, self.positions, window, self.heads, self.norm)
        got = attend_long(qkv, window, self.heads, self.batch, self.mask)
        want = attend_split_naive(self.qkv, self.positions, twin, self.heads, self.norm, self.mask)
        self._compare(got, want, window, twin)

    def _compare(self, got, want, window, twin):
        for i, (one, other) in enumerate(zip(got.chunk(self.batch), want.chunk(self.batch), strict=True)):
            assert error(one, other) < 1.5 * TOLERANCE[self.dtype], f"entry {i}"
            assert self.window.rows[i] >= 0 or not one.any(), "padding gets zeros"
        assert error(window.keys, twin.keys) < TOLERANCE[self.dtype]
        assert torch.equal(window.values, twin.values)
        written = self.written()
        assert torch.equal(window.keys[~written], self.keys[~written]), "nothing else in the cache is written"


def _masks(tokens: int, batch: int):
    masks = [None, token_causal(tokens, DEVICE), torch.rand(batch, tokens, tokens, device=DEVICE) < 0.5]
    if tokens % 2 == 0:
        masks.append(two_copy_verify(tokens // 2, DEVICE))
    masks.append(causal_until(torch.randint(tokens + 1, (batch,), device=DEVICE), tokens))
    return masks


SPLIT_PLANS = [None, SplitPlan(16, 32, 1), SplitPlan(32, 16, 4)]


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", SPLIT_PLANS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 16, 32, 64])
def test_attend_split_masks(tokens, plan, dtype):
    for mask in _masks(tokens, 3):
        for overlap in overlaps():
            Case([17, 0, 100, 1], [2, 0, 1], tokens, Heads(4, 2, 32), dtype, 192, mask).check_split(plan, overlap)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("heads", [Heads(2, 2, 16), Heads(4, 2, 64), Heads(8, 2, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_split_shapes(heads, dtype):
    """Head sizes and groups; lengths 0, 1, 17, 511; permuted rows with padding among them; an offset."""
    for offset in (0, 5):
        Case([511, 1, 0, 17], [3, -1, 0, 2, 1], 16, heads, dtype, 544, offset=offset).check_split()


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("dim", "turn"), [(32, 8), (128, 32), (16, 4)])
def test_a_part_of_each_head_is_rotated(dim, turn, normed, dtype):
    case = Case([33, 0, 5], [0, 2], 8, Heads(4, 2, dim), dtype, 64, turn=turn, normed=normed)
    case.check_split()
    case.check_long()


@pytest.mark.gpu
@needs_kernels
@pytest.mark.skipif(not ON_GPU, reason="too slow for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_attend_split_many_rows(tokens, dtype):
    rows = torch.randperm(40)[:32].tolist()
    Case(torch.randint(700, (40,)).tolist(), rows, tokens, Heads(8, 2, 64), dtype, 800).check_split()


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [Heads(2, 2, 16), Heads(4, 1, 64)], ids=str)
@pytest.mark.parametrize("tokens", [65, 150])
def test_attend_long(tokens, heads, dtype):
    for mask in [None, token_causal(tokens, DEVICE), block_causal(tokens, 16, DEVICE), _masks(tokens, 3)[2]]:
        Case([17, 0, 100, 1], [2, -1, 1], tokens, heads, dtype, 260, mask).check_long()


# Rows of 70, 20 and 0 tokens are read; two branches share a prefix, one goes on in its own row, one is padding.
BRANCHES = {"lengths": [70, 3, 20, 0, 0, 9], "rows": [0, 0, 2, -1, 3], "to": [1, 4, 2, 5, 5]}


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "beside"), [(0, 0), (0, 7), (5, 0), (5, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_branches_read_one_row_and_write_another(masked, offset, beside, dtype):
    """Prefixes that end inside a tile of keys, local slots in another row than the prefix, with and without splits."""
    for tokens, plans in ((8, SPLIT_PLANS), (70, ["long"])):
        mask = torch.rand(5, tokens, offset + tokens + beside, device=DEVICE) < 0.5 if masked else None
        branches = (BRANCHES["lengths"], BRANCHES["rows"], tokens, Heads(4, 2, 16), dtype, 160, mask)
        for plan in plans:
            case = Case(*branches, offset=offset, beside=beside, to=BRANCHES["to"])
            if plan == "long":
                case.check_long()
            else:
                for overlap in overlaps():
                    case.check_split(plan, overlap)


# The twins, and logic that is no kernel


@pytest.mark.parametrize("to", [None, [2, 0, 3]])
@pytest.mark.parametrize(("offset", "beside"), [(0, 0), (3, 4)])
def test_the_naive_twin_is_attention(offset, beside, to):
    """Over the prefix in the row it reads and the local slots in the row it writes, copied next to each other by hand."""
    tokens, mask = 6, torch.rand(3, 6, offset + 6 + beside, device=DEVICE) < 0.7
    mask[..., offset] = True  # every query sees something
    case = Case(
        [12, 5, 9, 0], [1, 0, 3], tokens, Heads(4, 2, 16), torch.float32, 40, mask, offset=offset, beside=beside, to=to
    )
    window, qkv = case.copied(), case.qkv.clone()
    rope_write_naive(qkv, case.positions, window, case.heads, case.norm)
    got = attend_long_naive(qkv, window, case.heads, 3, mask).view(3, tokens, 4, 16)
    for i, (row, write_row) in enumerate(zip([1, 0, 3], to or [1, 0, 3], strict=True)):
        prefix, width = [5, 12, 0][i], window.columns(tokens)
        keys, values = (t[write_row : write_row + 1, :, : prefix + width].clone() for t in (window.keys, window.values))
        keys[0, :, :prefix], values[0, :, :prefix] = window.keys[row, :, :prefix], window.values[row, :, :prefix]
        queries = qkv.view(3, tokens, 8, 16)[i : i + 1, :, :4].transpose(1, 2)
        seen = torch.cat([torch.ones(tokens, prefix, dtype=torch.bool, device=DEVICE), mask[i]], 1)
        want = attend(queries, keys, values, seen, backend="reference")
        assert error(got[i], want[0].transpose(0, 1)) < TOLERANCE[torch.float32], f"entry {i}"


def test_tile_extents():
    mask = block_causal(10, 4)
    # Tiles of 4 rows: all of tile 0 sees [0, 4); of tile 1 [0, 8); the last two rows see everything.
    assert tile_extents(mask, 4).tolist() == [[4, 4], [8, 8], [10, 10]]
    assert tile_extents(token_causal(5), 4).tolist() == [[1, 4], [5, 5]]
    assert tile_extents(torch.zeros(1, 3, 3, dtype=torch.bool), 2).tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_split_plan_is_bounded(batch, tokens):
    heads = Heads(32, 8, 128)
    for slots in (1, 64, 512, 4096):
        plan = split_plan(batch, tokens, heads, slots)
        assert 1 <= plan.splits <= 2 * -(-slots // plan.block_s)
