"""Attention over the cache, beside its naive twins (see `shared.gpu.norm`).

`attend_split` serves few new tokens: it norms, rotates, writes and attends in one launch, and splits a row's cached keys over programs (flash-decoding).
`attend_long` serves many, after `shared.gpu.rope.rope_write`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.gpu.launch import jit, launch_options, pow2, prefetch_rows, shared_memory, tl, triton
from shared.gpu.rope import Heads, LayerWindow, QKNorm, first_of_pair, load_angles, load_rotated, rope_write_naive

SPLIT_TOKENS = 64  # new tokens a row that `attend_split` serves
_LOG2_E = 1.4426950408889634


@jit
def _softmax_step(scores, v, top, total, acc):
    """Fold ``scores [M, S]`` (base-2 logarithms) over values ``v [S, D]`` into the running softmax."""
    higher = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(top - safe)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return higher, total * fade + tl.sum(p, 1), acc


@jit
def _share(length, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr):
    """Keys of the committed prefix each split takes, and how many splits that keeps busy; the last one is left out."""
    sharing: tl.constexpr = SPLITS - 1 if SPLITS > 1 else 1
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, BLOCK_S), sharing), 1) * BLOCK_S
    return chunk, tl.cdiv(length, chunk)


@jit
def _pair_scores(q1, q2, k1, k2, scale):
    """Scores ``[M, S]`` of rotated queries and keys, each as both channels of its pairs."""
    scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    return tl.dot(q2, tl.trans(k2), scores, input_precision="ieee") * scale


@jit
def _attend_cache(
    q1, q2, keys, values, mask, mask_row, live, first, last, length, offset, shift, tokens, scale,
    D: tl.constexpr, TURN: tl.constexpr, PAIRS: tl.constexpr, MASKED: tl.constexpr, MOVED: tl.constexpr,
    BRANCHED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The running softmax of queries over the slots ``[first, last)`` of a head's ``keys`` and ``values``. ``MOVED``: without the
    ``tokens`` slots that this forward writes, and from ``length`` on under the mask at ``mask_row [M]``; ``BRANCHED``: those from ``length`` on
    lie ``shift`` elements further, in another row.
    """
    d, channel = tl.arange(0, D), first_of_pair(TURN, PAIRS)
    half_in = tl.arange(0, PAIRS) < D // 2
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for s0 in range(first, last, BLOCK_S):
        slot = s0 + tl.arange(0, BLOCK_S)
        held = slot < last
        if MOVED:
            column = slot - length
            held = held & ((column < offset) | (column >= offset + tokens))
        at = slot[:, None] * D
        if MOVED and BRANCHED:
            at += tl.where(column >= 0, shift, 0)[:, None]
        k_at = keys + at + channel[None, :]
        keep = held[:, None] & half_in[None, :]
        k1 = tl.load(k_at, mask=keep, other=0.0)
        k2 = tl.load(k_at + TURN, mask=keep, other=0.0)
        v = tl.load(values + at + d[None, :], mask=held[:, None], other=0.0)
        allowed = held[None, :]
        if MOVED and MASKED:
            beside = live[:, None] & (held & (column >= 0))[None, :]
            seen = tl.load(mask + mask_row[:, None] + column[None, :], mask=beside, other=1)
            allowed = allowed & (seen != 0)
        scores = tl.where(allowed, _pair_scores(q1, q2, k1, k2, scale), float("-inf"))
        top, total, acc = _softmax_step(scores, v, top, total, acc)
    return top, total, acc


@jit
def _attend_new(
    q1, q2, new, position, keys, values, cos, sin, k_weight, mask, mask_row, t, fresh, live, tile_m,
    top, total, acc, eps, scale, length, offset, slots,
    H_KV: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, TURN: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Fold the new tokens, whose raw keys are at ``new [T]``, into the running softmax. The first tile of queries stores their keys and values, from slot
    ``length + offset`` on.
    """
    d, channel = tl.arange(0, D), first_of_pair(TURN, PAIRS)
    new_c, new_s = load_angles(position, fresh, cos, sin, TURN, PAIRS)
    k1, k2 = load_rotated(new, fresh, new_c, new_s, k_weight, eps, NORMED, D // 2, TURN, PAIRS)
    v = tl.load(new[:, None] + (H_KV * D + d)[None, :], mask=fresh[:, None], other=0.0)
    if tile_m == 0:
        slot = length + offset + t
        fits = fresh & (slot < slots)
        k_at = keys + slot[:, None] * D + channel[None, :]
        keep = fits[:, None] & (tl.arange(0, PAIRS) < D // 2)[None, :]
        tl.store(k_at, k1, mask=keep)
        tl.store(k_at + TURN, k2, mask=keep)
        tl.store(values + slot[:, None] * D + d[None, :], v, mask=fits[:, None])
    allowed = live[:, None] & fresh[None, :]
    if MASKED:
        seen = tl.load(mask + mask_row[:, None] + (offset + t)[None, :], mask=allowed, other=0)
        allowed = allowed & (seen != 0)
    scores = tl.where(allowed, _pair_scores(q1, q2, k1, k2, scale), float("-inf"))
    return _softmax_step(scores, v, top, total, acc)


@jit
def _load_window(
    prefixes, rows, write_rows, offsets, seq, kv, columns, slots,
    H_KV: tl.constexpr, D: tl.constexpr, MOVED: tl.constexpr, BRANCHED: tl.constexpr,
):  # fmt: skip
    """Of entry ``seq``: whether it is one, its prefix, the offset it writes at behind that, the slots it sees in the cache, and where its KV head is read
    and written.
    """
    row = tl.load(rows + seq)
    real = row >= 0
    row = tl.maximum(row, 0)
    length = tl.where(real, tl.load(prefixes + seq), 0).to(tl.int32)
    cached = (row * H_KV + kv).to(tl.int64) * slots * D
    written = cached
    if BRANCHED:
        written = (tl.load(write_rows + seq) * H_KV + kv).to(tl.int64) * slots * D
    offset, reach = 0, length
    if MOVED:
        offset = tl.load(offsets + seq).to(tl.int32)
        reach = tl.where(real, length + columns, 0)
    return real, length, offset, reach, cached, written


@jit
def _store_attended(
    top, total, acc, out, partial, softmax, vector, d, split, live, D: tl.constexpr, SPLITS: tl.constexpr
):
    """Store finished heads, or the parts of one split for `_merge_splits_kernel`."""
    if SPLITS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + vector[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])
    else:
        vector = vector * SPLITS + split
        tl.store(partial + vector[:, None] * D + d[None, :], acc, mask=live[:, None])
        tl.store(softmax + vector * 2, top, mask=live)
        tl.store(softmax + vector * 2 + 1, total, mask=live)


@jit
def _attend_split_kernel(
    qkv, out, keys, values, prefixes, rows, write_rows, offsets, positions, cos, sin, q_weight, k_weight, mask,
    partial, softmax, eps, scale, tokens, columns, slots, mask_stride, m_tiles,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, MOVED: tl.constexpr,
    BRANCHED: tl.constexpr, NORMED: tl.constexpr, TURN: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One (row, group of query rows, KV head, split). The last split takes the tokens of this forward, the others share
    what is seen in the cache (``MOVED``: the slots around the written ones too) by its length on the device; a single
    split takes both.
    """
    pid_m, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, tile_m = pid_m // m_tiles, pid_m % m_tiles
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    real, length, offset, reach, cached, written = _load_window(
        prefixes, rows, write_rows, offsets, seq, kv, columns, slots, H_KV, D, MOVED, BRANCHED
    )
    chunk, _ = _share(reach, BLOCK_S, SPLITS)
    local = split == SPLITS - 1
    first = split * chunk
    last = tl.minimum(first + chunk, reach)
    if SPLITS > 1:
        last = tl.where(local, 0, last)

    if local | (first < last):
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        live = m < tokens * G
        token = m // G
        head = kv * G + m % G
        position = tl.load(positions + seq * tokens + token, mask=live, other=0)
        c, s = load_angles(position, live, cos, sin, TURN, PAIRS)
        if OVERLAP:
            if D * keys.dtype.element_ty.primitive_bitwidth >= 1024:
                ahead = tl.minimum(first + tl.arange(0, BLOCK_S), tl.maximum(last - 1, 0))
                prefetch_rows(keys + cached, ahead, 0, D, D)
                prefetch_rows(values + cached, ahead, 0, D, D)
            tl.extra.cuda.gdc_wait()
        stride: tl.constexpr = (G + 2) * H_KV * D
        here = seq.to(tl.int64) * tokens
        q1, q2 = load_rotated(
            qkv + (here + token) * stride + head * D, live, c, s, q_weight, eps, NORMED, D // 2, TURN, PAIRS
        )

        d = tl.arange(0, D)
        mask_row = seq * mask_stride + token * columns
        top, total, acc = _attend_cache(
            q1, q2, keys + cached, values + cached, mask, mask_row, live, first, last, length, offset, written - cached, tokens,
            scale, D, TURN, PAIRS, MASKED, MOVED, BRANCHED, BLOCK_M, BLOCK_S,
        )  # fmt: skip
        if local:
            t = tl.arange(0, BLOCK_T)
            fresh = (t < tokens) & real
            new = qkv + (here + t) * stride + (G * H_KV + kv) * D
            new_position = tl.load(positions + seq * tokens + t, mask=fresh, other=0)
            top, total, acc = _attend_new(
                q1, q2, new, new_position, keys + written, values + written, cos, sin, k_weight, mask, mask_row,
                t, fresh, live, tile_m, top, total, acc, eps, scale, length, offset, slots,
                H_KV, D, MASKED, NORMED, TURN, PAIRS,
            )  # fmt: skip

        vector = (here + token) * G * H_KV + head
        _store_attended(top, total, acc, out, partial, softmax, vector, d, split, live, D, SPLITS)


@jit
def _merge_splits_kernel(
    partial, softmax, out, prefixes, rows, tokens, beside,
    H_KV: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One (token, KV head): its query heads' partial sums, weighed by their log-sum-exp."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq = token // tokens
    reach = tl.where(tl.load(rows + seq) >= 0, tl.load(prefixes + seq) + beside, 0).to(tl.int32)
    _, busy = _share(reach, BLOCK_S, SPLITS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    group, part, d = tl.arange(0, GROUP), tl.arange(0, PARTS), tl.arange(0, D)
    vector = (token * H_KV + kv) * G + group
    used = (group < G)[:, None] & ((part < busy) | (part == SPLITS - 1))[None, :]
    at = vector[:, None] * SPLITS + part[None, :]
    top = tl.load(softmax + at * 2, mask=used, other=float("-inf"))
    total = tl.load(softmax + at * 2 + 1, mask=used, other=0.0)
    acc = tl.load(partial + at[:, :, None] * D + d[None, None, :], mask=used[:, :, None], other=0.0)
    highest = tl.max(top, 1)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    total = tl.sum(total * weight, 1)
    result = tl.sum(acc * weight[:, :, None], 1) / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + vector[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=(group < G)[:, None])


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Tiles of split attention: query rows, keys a step, splits of one KV head (the last takes the new tokens)."""

    block_m: int
    block_s: int
    splits: int
    warps: int = 4
    stages: int = 2


def split_plan(batch: int, tokens: int, heads: Heads, slots: int) -> SplitPlan:
    """As many splits as fill a large GPU, twice that where prefixes can be long. It depends on shapes alone, as a
    captured graph must.
    """
    rows = tokens * heads.group
    block_m = min(pow2(rows, 16), 64)
    groups = batch * heads.kv * -(-rows // block_m)
    fill = (128 if slots <= 1024 else 256) // groups
    splits = min(pow2(-(-slots // 64)) * 2, 1 << max(fill, 1).bit_length() - 1, 32)
    return SplitPlan(block_m, 64, splits, stages=3)


def attend_split(
    qkv: Tensor,
    positions: Tensor,
    window: LayerWindow,
    heads: Heads,
    norm: QKNorm,
    local_mask: Tensor | None = None,
    *,
    plan: SplitPlan | None = None,
    overlap: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of a few new tokens over the cache -> ``[b * T, H * D]``; writes their keys and values on the way.

    ``qkv [b * T, width]`` are raw projections, ``positions [b, T]``. ``local_mask``: bool ``[T, W]`` or ``[b, T, W]`` over the W slots from the prefix on,
    the window's `columns` (None: all see all). The number of splits follows from the slots of the cache, the time from the lengths themselves.
    ``overlap``: launch before the kernel ahead has finished; that one must not write ``positions`` or the window's indices. It may write the cache.
    """
    batch, tokens = positions.shape
    assert qkv.shape == (batch * tokens, heads.width), f"qkv {list(qkv.shape)}, positions {list(positions.shape)}"
    assert all(t.is_contiguous() for t in (qkv, positions, window.keys, window.values))
    assert tokens <= SPLIT_TOKENS, f"{tokens} tokens a row; split attention serves at most {SPLIT_TOKENS}"
    plan = plan or split_plan(batch, tokens, heads, window.keys.shape[2])
    m_tiles = -(-tokens * heads.group // plan.block_m)
    if out is None:
        out = torch.empty(batch * tokens, heads.query * heads.dim, dtype=qkv.dtype, device=qkv.device)
    parts = batch * tokens * heads.query * plan.splits if plan.splits > 1 else 0
    partial, softmax = (qkv.new_empty(parts, size, dtype=torch.float32) for size in (heads.dim, 2))
    columns = window.columns(tokens)
    mask, mask_stride = _mask_bytes(local_mask, batch, tokens, columns)
    stage_bytes = 2 * plan.block_s * heads.dim * qkv.element_size()
    stages = min(plan.stages, max(1, (shared_memory(qkv.device) - (48 << 10)) // stage_bytes))
    _attend_split_kernel[(batch * m_tiles, heads.kv, plan.splits)](
        qkv, out, window.keys, window.values, window.prefixes, window.rows, window.write_rows, window.offsets,
        positions, norm.cos, norm.sin, norm.q_weight, norm.k_weight, mask, partial, softmax,
        norm.eps, heads.dim**-0.5 * _LOG2_E, tokens, columns, window.keys.shape[2], mask_stride, m_tiles,
        H_KV=heads.kv, G=heads.group, D=heads.dim, MASKED=mask is not None, **window.flags(), **norm.flags(heads),
        BLOCK_M=plan.block_m, BLOCK_T=pow2(tokens, 16), BLOCK_S=plan.block_s, SPLITS=plan.splits, OVERLAP=overlap,
        **launch_options(overlap, plan.warps, stages),
    )  # fmt: skip
    if plan.splits > 1:
        _merge_splits_kernel[(batch * tokens, heads.kv)](
            partial, softmax, out, window.prefixes, window.rows, tokens, 0 if window.offsets is None else columns,
            H_KV=heads.kv, G=heads.group, GROUP=pow2(heads.group), D=heads.dim,
            BLOCK_S=plan.block_s, SPLITS=plan.splits, PARTS=pow2(plan.splits), OVERLAP=overlap,
            **launch_options(overlap, 4, 1),
        )  # fmt: skip
    return out


def attend_split_naive(
    qkv: Tensor,
    positions: Tensor,
    window: LayerWindow,
    heads: Heads,
    norm: QKNorm,
    local_mask: Tensor | None = None,
    *,
    plan: SplitPlan | None = None,
    overlap: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    qkv = qkv.clone()
    rope_write_naive(qkv, positions, window, heads, norm)
    attended = attend_long_naive(qkv, window, heads, len(positions), local_mask)
    return attended if out is None else out.copy_(attended)


def _mask_bytes(local_mask: Tensor | None, batch: int, tokens: int, columns: int) -> tuple[Tensor | None, int]:
    """The mask as bytes, and the step from one row's mask to the next (0 when all rows share one)."""
    if local_mask is None:
        return None, 0
    shared = local_mask.dim() == 2
    assert local_mask.dtype == torch.bool, f"local_mask is {local_mask.dtype}; the kernels take bool masks"
    assert local_mask.shape == ((tokens, columns) if shared else (batch, tokens, columns)), list(local_mask.shape)
    return local_mask.contiguous().view(torch.uint8), 0 if shared else tokens * columns


@jit
def _attend_long_kernel(
    qkv, out, keys, values, prefixes, rows, write_rows, mask, extents,
    scale, tokens, columns, slots, mask_stride, extent_stride,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    BRANCHED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = G * H_KV
    tile_m = tl.num_programs(0) - 1 - tl.program_id(0)
    head, seq = tl.program_id(1), tl.program_id(2)
    kv = head // G
    row = tl.load(rows + seq)
    length = tl.load(prefixes + seq).to(tl.int32)
    t = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live = t < tokens
    d = tl.arange(0, D)
    here = seq.to(tl.int64) * tokens + t
    q = tl.load(qkv + here[:, None] * ((G + 2) * H_KV * D) + head * D + d[None, :], mask=live[:, None], other=0.0)
    clear, reach = columns, columns
    if MASKED:
        extent = extents + seq * extent_stride + tile_m * 2
        clear, reach = tl.load(extent), tl.load(extent + 1)
    stop = tl.where(row >= 0, length + reach, 0)
    clear = tl.minimum((length + clear) // BLOCK_S * BLOCK_S, stop)
    cached = (tl.maximum(row, 0) * H_KV + kv).to(tl.int64) * slots * D
    shift = 0
    if BRANCHED:
        shift = (tl.load(write_rows + seq) * H_KV + kv).to(tl.int64) * slots * D - cached
    s = tl.arange(0, BLOCK_S)
    k_at = keys + cached + s[:, None] * D + d[None, :]
    v_at = values + cached + s[:, None] * D + d[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for s0 in range(0, clear, BLOCK_S):
        at = s0 * D
        if BRANCHED:
            at += tl.where(s0 + s >= length, shift, 0)[:, None]
        k = tl.load(k_at + at)
        v = tl.load(v_at + at)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        top, total, acc = _softmax_step(scores, v, top, total, acc)
    for s0 in range(clear, stop, BLOCK_S):
        held = s0 + s < stop
        at = s0 * D
        if BRANCHED:
            at += tl.where(s0 + s >= length, shift, 0)[:, None]
        k = tl.load(k_at + at, mask=held[:, None], other=0.0)
        v = tl.load(v_at + at, mask=held[:, None], other=0.0)
        column = s0 + s - length
        allowed = live[:, None] & held[None, :]
        if MASKED:
            new = allowed & (column >= 0)[None, :]
            seen = tl.load(mask + seq * mask_stride + t[:, None] * columns + column[None, :], mask=new, other=1)
            allowed = allowed & (seen != 0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(allowed, scores, float("-inf"))
        top, total, acc = _softmax_step(scores, v, top, total, acc)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + (here * H + head)[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])


def tile_extents(local_mask: Tensor, block: int) -> Tensor:
    """For each ``block`` query rows of ``local_mask [..., T, W]``: how many leading columns all of them see, and one
    past the last column any of them sees. Int32 ``[..., tiles, 2]``: up to the first nothing is masked, from the second
    on everything is skipped.
    """
    spare = -local_mask.shape[-2] % block
    every = F.pad(local_mask, (0, 0, 0, spare), value=True).unflatten(-2, (-1, block)).all(-2)
    some = F.pad(local_mask, (0, 0, 0, spare), value=False).unflatten(-2, (-1, block)).any(-2)
    past = torch.arange(1, local_mask.shape[-1] + 1, device=local_mask.device)
    clear = every.to(torch.int32).cumprod(-1).sum(-1)
    reach = (some * past).amax(-1)
    return torch.stack([clear, reach], -1).to(torch.int32)


def _long_blocks(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Query rows, keys a step, warps and stages: float32, which serves exactness, needs smaller tiles."""
    return (128, 64, 8, 3) if dtype == torch.bfloat16 else (32, 32, 4, 1)


def long_extents(local_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`tile_extents` as `attend_long` wants them; the same for every layer of a forward."""
    return tile_extents(local_mask, _long_blocks(dtype)[0])


def attend_long(
    qkv: Tensor,
    window: LayerWindow,
    heads: Heads,
    batch: int,
    local_mask: Tensor | None = None,
    extents: Tensor | None = None,
) -> Tensor:
    """Attention of many new tokens, after `rope_write`, over the cache -> ``[b * T, H * D]``.

    Any ``local_mask`` (see `attend_split`); its empty tiles cost nothing. ``extents``: `long_extents` of it.
    """
    tokens = qkv.shape[0] // batch
    out = torch.empty(batch * tokens, heads.query * heads.dim, dtype=qkv.dtype, device=qkv.device)
    columns = window.columns(tokens)
    mask, mask_stride = _mask_bytes(local_mask, batch, tokens, columns)
    if mask is not None and extents is None:
        extents = long_extents(local_mask, qkv.dtype)
    block_m, block_s, warps, stages = _long_blocks(qkv.dtype)
    _attend_long_kernel[(triton.cdiv(tokens, block_m), heads.query, batch)](
        qkv, out, window.keys, window.values, window.prefixes, window.rows, window.write_rows, mask, extents,
        heads.dim**-0.5 * _LOG2_E, tokens, columns, window.keys.shape[2], mask_stride,
        0 if mask is None or local_mask.dim() == 2 else extents.stride(0),
        H_KV=heads.kv, G=heads.group, D=heads.dim, MASKED=mask is not None,
        BRANCHED=window.write_rows is not None, BLOCK_M=block_m, BLOCK_S=block_s, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def attend_long_naive(
    qkv: Tensor,
    window: LayerWindow,
    heads: Heads,
    batch: int,
    local_mask: Tensor | None = None,
    extents: Tensor | None = None,
) -> Tensor:
    tokens = qkv.shape[0] // batch
    queries = qkv.view(batch, tokens, -1, heads.dim)[:, :, : heads.query].double()
    out = torch.zeros_like(queries)
    write_rows = window.rows if window.write_rows is None else window.write_rows
    for i, (row, write_row, prefix) in enumerate(zip(window.rows, write_rows, window.prefixes, strict=True)):
        if row >= 0:
            reach = prefix + window.columns(tokens)
            keys, values = (
                torch.cat([t[row, :, :prefix], t[write_row, :, prefix:reach]], 1)
                .double()
                .repeat_interleave(heads.group, 0)
                for t in (window.keys, window.values)
            )
            scores = torch.einsum("thd,hsd->hts", queries[i], keys) * heads.dim**-0.5
            if local_mask is not None:
                local = local_mask if local_mask.dim() == 2 else local_mask[i]
                scores[:, :, prefix:] = scores[:, :, prefix:].masked_fill(~local, float("-inf"))
            out[i] = torch.einsum("hts,hsd->thd", scores.softmax(-1).nan_to_num(0.0), values)  # no key seen: zeros
    return out.to(qkv.dtype).view(batch * tokens, -1)
