"""From a fused projection to the cache: the layout of heads, norm and rotation of queries and keys, and where a layer reads and writes.

`rope_write` does it for many tokens; for few, `shared.gpu.attention.attend_split` does it on the way. A naive twin takes the same arguments and does the same
to them (see `shared.gpu.norm`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.gpu.launch import jit, tl, triton
from shared.gpu.norm import rms_norm_naive


@dataclass(frozen=True, slots=True)
class Heads:
    """Layout of a fused projection row: ``query`` heads, ``kv`` key heads, then ``kv`` value heads, of ``dim`` each."""

    query: int
    kv: int
    dim: int

    @property
    def group(self) -> int:
        return self.query // self.kv

    @property
    def width(self) -> int:
        return (self.query + 2 * self.kv) * self.dim


@dataclass(frozen=True, slots=True)
class QKNorm:
    """What turns projected heads into attention operands: per-head norm weights ``[D]`` (None: no norm), and ``cos`` and
    ``sin`` tables ``[positions, R / 2]`` that rotate the first R channels; R divides D.
    """

    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor
    sin: Tensor
    eps: float

    def flags(self, heads: Heads) -> dict:
        """The compile-time constants of a kernel that norms and rotates."""
        return {"NORMED": self.q_weight is not None, "TURN": self.cos.shape[1], "PAIRS": max(16, heads.dim // 2)}


@dataclass(frozen=True, slots=True)
class LayerWindow:
    """One layer's part of a forward's `Window`: where each of its ``b`` entries of T tokens reads and writes in ``keys, values [B, H_kv, S, D]``.

    Entry ``i`` reads the prefix ``[0, prefixes[i])`` of row ``rows[i]`` (-1: padding, which writes nothing and gets zeros). It writes its tokens to row
    ``write_rows[i]`` (None: the same row) at ``[prefix, prefix + T)`` and sees them besides its prefix. With ``offsets [b]`` it writes at
    ``[prefix + offset, + T)`` and sees the ``width`` slots of that row from the prefix on: those it does not write itself as they are in the cache.
    """

    keys: Tensor
    values: Tensor
    prefixes: Tensor
    rows: Tensor
    offsets: Tensor | None = None
    width: int = 0
    write_rows: Tensor | None = None

    def columns(self, tokens: int) -> int:
        """How many slots from the prefix on a query may see: the columns of a local mask."""
        return tokens if self.offsets is None else self.width

    def part(self, entries: slice) -> LayerWindow:
        """The window of some of the entries."""
        offsets, write_rows = (None if t is None else t[entries] for t in (self.offsets, self.write_rows))
        return replace(
            self, prefixes=self.prefixes[entries], rows=self.rows[entries], offsets=offsets, write_rows=write_rows
        )

    def flags(self) -> dict:
        """The compile-time constants of a kernel that reads or writes here."""
        return {"MOVED": self.offsets is not None, "BRANCHED": self.write_rows is not None}


@jit
def load_angles(position, live, cos, sin, TURN: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin ``[R, PAIRS]`` of ``position [R]``; pairs from ``TURN`` on are not rotated."""
    pair = tl.arange(0, PAIRS)
    at = position[:, None] * TURN + pair[None, :]
    keep = live[:, None] & (pair < TURN)[None, :]
    return tl.load(cos + at, mask=keep, other=1.0), tl.load(sin + at, mask=keep, other=0.0)


@jit
def first_of_pair(TURN: tl.constexpr, PAIRS: tl.constexpr):
    """The channel that pair ``i`` of a head begins with, ``[PAIRS]``; the other is ``TURN`` further. All pairs cover all
    channels, the rotated ones first.
    """
    first = tl.arange(0, PAIRS)
    if PAIRS > TURN:
        first += first // TURN * TURN
    return first


@jit
def load_rotated(
    base, live, c, s, weight, eps, NORMED: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, PAIRS: tl.constexpr
):
    """Head vectors at ``base [R]``, normed and rotated: both channels of each pair, ``[R, PAIRS]``, in the buffer's dtype."""
    dtype = base.dtype.element_ty
    first = first_of_pair(TURN, PAIRS)
    inside = tl.arange(0, PAIRS) < HALF
    keep = live[:, None] & inside[None, :]
    a = tl.load(base[:, None] + first[None, :], mask=keep, other=0.0).to(tl.float32)
    b = tl.load(base[:, None] + (TURN + first)[None, :], mask=keep, other=0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        a = a * scale * tl.load(weight + first, mask=inside, other=0.0).to(tl.float32)[None, :]
        b = b * scale * tl.load(weight + TURN + first, mask=inside, other=0.0).to(tl.float32)[None, :]
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    c, s = c.to(tl.float32), s.to(tl.float32)
    return (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)


@jit
def _rope_write_kernel(
    qkv, keys, values, prefixes, rows, write_rows, offsets, positions, cos, sin, q_weight, k_weight, eps, tokens, slots,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MOVED: tl.constexpr,
    BRANCHED: tl.constexpr, NORMED: tl.constexpr, TURN: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    H: tl.constexpr = G * H_KV
    seq, head = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < tokens
    channel, half_in = first_of_pair(TURN, PAIRS), tl.arange(0, PAIRS) < HALF
    base = qkv + (seq.to(tl.int64) * tokens + t) * ((G + 2) * H_KV * D) + head * D
    position = tl.load(positions + seq * tokens + t, mask=live, other=0)
    c, s = load_angles(position, live, cos, sin, TURN, PAIRS)
    if head < H:
        a, b = load_rotated(base, live, c, s, q_weight, eps, NORMED, HALF, TURN, PAIRS)
        keep = live[:, None] & half_in[None, :]
        tl.store(base[:, None] + channel[None, :], a, mask=keep)
        tl.store(base[:, None] + (TURN + channel)[None, :], b, mask=keep)
    else:
        row = tl.load(rows + seq)
        if BRANCHED:
            row = tl.where(row >= 0, tl.load(write_rows + seq), -1)
        length = tl.load(prefixes + seq).to(tl.int32)
        slot = length + t
        if MOVED:
            slot += tl.load(offsets + seq).to(tl.int32)
        fits = live & (row >= 0) & (slot < slots)
        if head < H + H_KV:
            a, b = load_rotated(base, live, c, s, k_weight, eps, NORMED, HALF, TURN, PAIRS)
            k_at = keys + (row * H_KV + head - H).to(tl.int64) * slots * D + slot[:, None] * D + channel[None, :]
            k_keep = fits[:, None] & half_in[None, :]
            tl.store(k_at, a, mask=k_keep)
            tl.store(k_at + TURN, b, mask=k_keep)
        else:
            d = tl.arange(0, D)
            v = tl.load(base[:, None] + d[None, :], mask=live[:, None], other=0.0)
            v_at = values + (row * H_KV + head - H - H_KV).to(tl.int64) * slots * D + slot[:, None] * D + d[None, :]
            tl.store(v_at, v, mask=fits[:, None])


def rope_write(qkv: Tensor, positions: Tensor, window: LayerWindow, heads: Heads, norm: QKNorm) -> None:
    """Norm and rotate the queries of ``qkv [b * T, width]`` in place; write keys, normed and rotated, and values to the
    cache.
    """
    batch, tokens = positions.shape
    _rope_write_kernel[(triton.cdiv(tokens, 16), batch, heads.query + 2 * heads.kv)](
        qkv, window.keys, window.values, window.prefixes, window.rows, window.write_rows, window.offsets,
        positions, norm.cos, norm.sin, norm.q_weight, norm.k_weight, norm.eps, tokens, window.keys.shape[2],
        H_KV=heads.kv, G=heads.group, D=heads.dim, **window.flags(), **norm.flags(heads),
        BLOCK_T=16, num_warps=4,
    )  # fmt: skip


def rope_write_naive(qkv: Tensor, positions: Tensor, window: LayerWindow, heads: Heads, norm: QKNorm) -> None:
    queries, keys, values = qkv.view(*positions.shape, -1, heads.dim).split([heads.query, heads.kv, heads.kv], 2)
    queries.copy_(_rotated_naive(queries, norm.q_weight, positions, norm))
    keys = _rotated_naive(keys, norm.k_weight, positions, norm)
    first = window.prefixes if window.offsets is None else window.prefixes + window.offsets
    slot = first[:, None] + torch.arange(positions.shape[1], device=qkv.device)
    entry, token = ((window.rows >= 0)[:, None] & (slot < window.keys.shape[2])).nonzero(as_tuple=True)
    row = (window.rows if window.write_rows is None else window.write_rows)[entry]
    window.keys[row, :, slot[entry, token]] = keys[entry, token]
    window.values[row, :, slot[entry, token]] = values[entry, token]


def _rotated_naive(x: Tensor, weight: Tensor | None, positions: Tensor, norm: QKNorm) -> Tensor:
    """Heads ``x [b, T, h, D]`` at ``positions [b, T]``, normed and rotated."""
    if weight is not None:
        x = rms_norm_naive(x, weight, norm.eps)
    cos, sin = (table[positions].double()[:, :, None] for table in (norm.cos, norm.sin))
    turned = 2 * cos.shape[-1]
    a, b = x[..., :turned].double().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., turned:]], -1).to(x.dtype)
