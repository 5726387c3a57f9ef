"""Each kernel against its definition in float64, with fresh random inputs; the logic that is no kernel runs anywhere.

Kernels run on a GPU, or in triton's interpreter with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shared.gpu import triton_ops as ops
from shared.network.masks import block_causal, causal_until, token_causal, two_copy_verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
needs_kernels = pytest.mark.skipif(not ops.available(DEVICE), reason="no CUDA device, and triton does not interpret")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]  # the interpreter truncates bfloat16


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def _random(*shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def _overlaps() -> list[bool]:
    return [False, True] if ops.overlapping_launch(DEVICE) else [False]


# Elementwise


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (17, 96), (33, 320)])
def test_add_rms_norm(rows, hidden, dtype):
    x, delta, weight = (
        _random(rows, hidden, dtype=dtype),
        _random(rows, hidden, dtype=dtype),
        _random(hidden, dtype=dtype),
    )
    total = (x.float() + delta.float()).to(dtype)
    kept = x.clone()
    assert _error(ops.add_rms_norm(kept, None, weight, 1e-6), _norm(x, weight, 1e-6)) < TOLERANCE[dtype]
    assert torch.equal(kept, x)
    assert _error(ops.add_rms_norm(x, delta, weight, 1e-6), _norm(total, weight, 1e-6)) < TOLERANCE[dtype]
    assert torch.equal(x, total)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    gate_up = _random(5, 2 * 96, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert _error(ops.silu_mul(gate_up), gate * gate.sigmoid() * up) < TOLERANCE[dtype]


# Narrow products

PLANS = [
    ops.Plan(32, 32),
    ops.Plan(16, 64, stages=2),
    ops.Plan(64, 32, split=2),
    ops.Plan(32, 32, split=3, prefetch=64),
]


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 32])
def test_narrow_chain(tokens, plan, dtype):
    """A product that adds to the residual stream, then the gated product and the picked product that read its norm."""
    hidden, inner, eps, work = 160, 208, 1e-6, ops.Workspace(DEVICE)
    a, w_in = _random(tokens, inner, dtype=dtype), _random(hidden, inner, dtype=dtype, scale=0.1)
    x, norm_weight = _random(tokens, hidden, dtype=dtype), _random(hidden, dtype=dtype)
    w_gated, w_head = _random(2 * inner, hidden, dtype=dtype, scale=0.1), _random(144, hidden, dtype=dtype, scale=0.1)
    total = (x.double() + a.double() @ w_in.double().T).to(dtype)
    in_plan, gated_plan, head_plan = (
        plan or ops.narrow_plan(tokens, w, gated=w is w_gated) for w in (w_in, w_gated, w_head)
    )
    for overlap in _overlaps():
        stream, normed = x.clone(), torch.full_like(x, float("nan"))
        norm = ops.Norm(norm_weight, normed)
        ops.narrow_matmul(a, w_in, stream, in_plan, work, residual=norm, overlap=overlap)
        assert _error(stream, total) < TOLERANCE[dtype]
        scaled = _norm(stream, norm_weight, eps)
        gated = torch.full((tokens, inner), float("nan"), device=DEVICE, dtype=dtype)
        ops.narrow_matmul(normed, w_gated, gated, gated_plan, work, scale_eps=eps, gated=True, overlap=overlap)
        gate, up = (scaled @ w_gated.double().T).chunk(2, -1)
        assert _error(gated, gate * gate.sigmoid() * up) < 2 * TOLERANCE[dtype]
        picked = torch.randint(tokens, (1, 3), device=DEVICE)
        head = torch.full((3, 144), float("nan"), device=DEVICE, dtype=dtype)
        ops.narrow_matmul(
            normed, w_head, head, head_plan, work, scale_eps=eps, picked=picked, tokens_per_row=tokens, overlap=overlap
        )
        assert _error(head, (scaled @ w_head.double().T)[picked[0]]) < TOLERANCE[dtype]
        assert not work.counters.any(), "every kernel leaves the counters at zero"


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_narrow_bias(plan, dtype):
    """Added once, after the norm's division and before the residual stream."""
    x, weight, bias = (_random(*shape, dtype=dtype) for shape in ((5, 96), (80, 96), (80,)))
    work, table = ops.Workspace(DEVICE), _random(9, 96, dtype=dtype)
    plain = ops.narrow_matmul(x, weight, x.new_empty(5, 80), plan, work, bias=bias)
    assert _error(plain, x.double() @ weight.double().T + bias.double()) < TOLERANCE[dtype]
    before, ones = _random(5, 80, dtype=dtype), torch.ones(80, dtype=dtype, device=DEVICE)
    stream, norm = before.clone(), ops.Norm(ones, torch.empty_like(before))
    ops.narrow_matmul(x, weight, stream, plan, work, bias=bias, residual=norm)
    assert _error(stream, before.double() + x.double() @ weight.double().T + bias.double()) < TOLERANCE[dtype]
    norm = ops.Norm(torch.ones_like(table[0]), torch.empty_like(x))
    rows = ops.embed(torch.arange(5, device=DEVICE), table, norm, work)
    scaled = ops.narrow_matmul(norm.normed, weight, x.new_empty(5, 80), plan, work, scale_eps=1e-6, bias=bias)
    want = _norm(rows, norm.weight, 1e-6) @ weight.double().T + bias.double()
    assert _error(scaled, want) < TOLERANCE[dtype]


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_prepares_the_norm(dtype):
    table, weight, work = _random(50, 96, dtype=dtype), _random(96, dtype=dtype), ops.Workspace(DEVICE)
    ids = torch.randint(50, (7,), device=DEVICE)
    norm = ops.Norm(weight, torch.empty(7, 96, dtype=dtype, device=DEVICE))
    x = ops.embed(ids, table, norm, work)
    assert torch.equal(x, table[ids])
    w = _random(32, 96, dtype=dtype)
    out = ops.narrow_matmul(norm.normed, w, x.new_empty(7, 32), ops.Plan(16, 32), work, scale_eps=1e-6)
    assert _error(out, _norm(x, weight, 1e-6) @ w.double().T) < TOLERANCE[dtype]


# Attention


class Case:
    """A random cache, raw projections, and what attention over them must give, in float64."""

    def __init__(self, lengths, rows, tokens, heads, dtype, slots, mask=None, offset=0, turn=None, normed=True):
        b, dim = len(rows), heads.dim
        self.heads, self.rows, self.tokens, self.mask, self.offset, self.dtype = (
            heads,
            rows,
            tokens,
            mask,
            offset,
            dtype,
        )
        shape = (len(lengths), heads.kv, slots, dim)
        self.keys, self.values = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype)
        self.before = self.keys.clone(), self.values.clone()
        self.lengths = torch.tensor(lengths, device=DEVICE)
        index = torch.tensor(rows, device=DEVICE)
        self.place = ops.Place(self.keys, self.values, self.lengths[index.clamp(min=0)], index)
        if offset:
            offsets = torch.full_like(index, offset)
            self.place = dataclasses.replace(self.place, offsets=offsets, width=offset + tokens)
        self.qkv = _random(b * tokens, heads.width, dtype=dtype)
        self.raw = self.qkv.clone()
        angle = torch.randn(4096, turn or dim // 2, device=DEVICE)
        weights = [_random(dim, dtype=dtype) if normed else None for _ in range(2)]
        self.norm = ops.QKNorm(*weights, angle.cos().to(dtype), angle.sin().to(dtype), 1e-6)
        self.positions = torch.randint(4096, (b, tokens), device=DEVICE)

    def _rotated(self, x, weight, positions):
        x = (x if weight is None else _norm(x, weight, self.norm.eps).to(self.dtype)).double()
        cos, sin = (t[positions].double()[:, None] for t in (self.norm.cos, self.norm.sin))
        turned = 2 * cos.shape[-1]
        a, b = x[..., :turned].chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., turned:]], -1).to(self.dtype)

    def expected(self, i):
        """Output ``[T, H * D]`` of row i, its new keys and values ``[H_kv, T, D]``. What lies between prefix and offset is seen."""
        h, t = self.heads, self.tokens
        raw = self.raw[i * t : (i + 1) * t].view(t, -1, h.dim)
        q = self._rotated(raw[:, : h.query], self.norm.q_weight, self.positions[i]).transpose(0, 1)
        k = self._rotated(raw[:, h.query : h.query + h.kv], self.norm.k_weight, self.positions[i]).transpose(0, 1)
        v = raw[:, h.query + h.kv :].transpose(0, 1)
        row, length = self.rows[i], int(self.lengths[self.rows[i]]) + self.offset
        all_k = torch.cat([self.before[0][row, :, :length], k], 1).double().repeat_interleave(h.group, 0)
        all_v = torch.cat([self.before[1][row, :, :length], v], 1).double().repeat_interleave(h.group, 0)
        scores = q.double() @ all_k.transpose(1, 2) * h.dim**-0.5
        if self.mask is not None:
            local = self.mask if self.mask.dim() == 2 else self.mask[i]
            scores[:, :, length:] = scores[:, :, length:].masked_fill(~local, float("-inf"))
        probs = scores.softmax(-1).nan_to_num(0.0)
        return (probs @ all_v).transpose(0, 1).reshape(t, -1), k, v

    def check(self, out):
        t = self.tokens
        want_k, want_v = (c.clone() for c in self.before)
        for i, row in enumerate(self.rows):
            got = out[i * t : (i + 1) * t]
            if row < 0:
                assert not got.any(), "a padding row gets zeros"
                continue
            expected, k, v = self.expected(i)
            assert _error(got, expected) < 1.5 * TOLERANCE[self.dtype], f"row {i}"
            first = int(self.lengths[row]) + self.offset
            want_k[row, :, first : first + t], want_v[row, :, first : first + t] = k, v
        assert _error(self.keys, want_k) < TOLERANCE[self.dtype]
        untouched = want_k == self.before[0]
        assert torch.equal(self.keys[untouched], want_k[untouched]), "nothing else in the cache is written"
        assert torch.equal(self.values, want_v)


def _masks(tokens: int, batch: int):
    masks = [None, token_causal(tokens, DEVICE), torch.rand(batch, tokens, tokens, device=DEVICE) < 0.5]
    if tokens % 2 == 0:
        masks.append(two_copy_verify(tokens // 2, DEVICE))
    masks.append(causal_until(torch.randint(tokens + 1, (batch,), device=DEVICE), tokens))
    return masks


SPLIT_PLANS = [None, ops.SplitPlan(16, 32, 1), ops.SplitPlan(32, 16, 4)]


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", SPLIT_PLANS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 16, 32, 64])
def test_attend_split_masks(tokens, plan, dtype):
    for mask in _masks(tokens, 3):
        for overlap in _overlaps():
            case = Case([17, 0, 100, 1], [2, 0, 1], tokens, ops.Heads(4, 2, 32), dtype, 192, mask)
            out = ops.attend_split(
                case.qkv, case.positions, case.place, case.heads, case.norm, mask, plan=plan, overlap=overlap
            )
            case.check(out)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("heads", [ops.Heads(2, 2, 16), ops.Heads(4, 2, 64), ops.Heads(8, 2, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_split_shapes(heads, dtype):
    """Head sizes and groups; lengths 0, 1, 17, 511; permuted rows with padding among them; an offset."""
    for offset in (0, 5):
        case = Case([511, 1, 0, 17], [3, -1, 0, 2, 1], 16, heads, dtype, 544, offset=offset)
        case.check(ops.attend_split(case.qkv, case.positions, case.place, heads, case.norm))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("dim", "turn"), [(32, 8), (128, 32), (16, 4)])
def test_a_part_of_each_head_is_rotated(dim, turn, normed, dtype):
    heads = ops.Heads(4, 2, dim)
    case = Case([33, 0, 5], [0, 2], 8, heads, dtype, 64, turn=turn, normed=normed)
    case.check(ops.attend_split(case.qkv, case.positions, case.place, heads, case.norm))
    case = Case([33, 0, 5], [0, 2], 8, heads, dtype, 64, turn=turn, normed=normed)
    ops.rope_write(case.qkv, case.positions, case.place, heads, case.norm)
    case.check(ops.attend_long(case.qkv, case.place, heads, 2))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.skipif(not ON_GPU, reason="too slow for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_attend_split_large_batch(tokens, dtype):
    rows = torch.randperm(40)[:32].tolist()
    case = Case(torch.randint(700, (40,)).tolist(), rows, tokens, ops.Heads(8, 2, 64), dtype, 800)
    case.check(ops.attend_split(case.qkv, case.positions, case.place, case.heads, case.norm))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [ops.Heads(2, 2, 16), ops.Heads(4, 1, 64)], ids=str)
@pytest.mark.parametrize("tokens", [65, 150])
def test_attend_long(tokens, heads, dtype):
    for mask in [None, token_causal(tokens, DEVICE), block_causal(tokens, 16, DEVICE), _masks(tokens, 3)[2]]:
        case = Case([17, 0, 100, 1], [2, -1, 1], tokens, heads, dtype, 260, mask)
        ops.rope_write(case.qkv, case.positions, case.place, heads, case.norm)
        case.check(ops.attend_long(case.qkv, case.place, heads, 3, mask))


# Logic that is no kernel


def test_tile_extents():
    mask = block_causal(10, 4)
    # Tiles of 4 rows: all of tile 0 sees [0, 4); of tile 1 [0, 8); the last two rows see everything.
    assert ops.tile_extents(mask, 4).tolist() == [[4, 4], [8, 8], [10, 10]]
    assert ops.tile_extents(token_causal(5), 4).tolist() == [[1, 4], [5, 5]]
    assert ops.tile_extents(torch.zeros(1, 3, 3, dtype=torch.bool), 2).tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_split_plan_is_bounded(batch, tokens):
    heads = ops.Heads(32, 8, 128)
    for slots in (1, 64, 512, 4096):
        plan = ops.split_plan(batch, tokens, heads, slots)
        assert 1 <= plan.splits <= 2 * -(-slots // plan.block_s)
