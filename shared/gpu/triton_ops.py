"""Triton kernels of the fast forwards, each behind a thin wrapper.

Two ways through a layer use them. The *narrow* way, for at most `NARROW_TOKENS` tokens, is bound by reading the weights
once: every elementwise step is folded into a matrix product or into attention, and each launch asks for its weights
before the launch ahead of it has finished (programmatic dependent launch). The *wide* way leaves the matrix products to
cuBLAS and keeps the elementwise steps as kernels of their own.

RMSNorm in the narrow way: ``norm(x) @ W.T == (x * weight) @ W.T / rms(x)``, so the product that makes ``x`` also stores
``x * weight`` and the sums of squares of its own columns, and the product that reads it divides its result.

The module imports without triton; `available` says whether the kernels can run. Float16 is not served: the unscaled
``x * weight`` could overflow.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_LOG2_E = 1.4426950408889634
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NARROW_TOKENS = 32
SPLIT_TOKENS = 64
jit = triton.jit if triton is not None else (lambda function: function)


def available(device: torch.device | str) -> bool:
    """Whether the kernels can run on ``device``."""
    return triton is not None and (torch.device(device).type == "cuda" or _INTERPRET)


def overlapping_launch(device: torch.device | str) -> bool:
    """Whether ``device`` can start a kernel before the one ahead of it has finished (capability 9 and later)."""
    on_gpu = torch.device(device).type == "cuda" and not _INTERPRET
    return on_gpu and torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may take."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def pow2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def launch_options(overlap: bool, warps: int, stages: int) -> dict:
    """Keywords of a kernel launch; ``overlap``: it may start before the one ahead has finished."""
    options = {"num_warps": warps, "num_stages": stages}
    return options | {"launch_pdl": True} if overlap else options


class Workspace:
    """Scratch memory of one stream of kernels: arrival counters, which every kernel leaves at zero, and partial sums of
    squares ``[parts, NARROW_TOKENS]`` of the residual stream. Never share one between streams.
    """

    COUNTERS = 1 << 16
    PARTS = 1024

    def __init__(self, device: torch.device | str):
        self.counters = torch.zeros(self.COUNTERS, dtype=torch.int32, device=device)
        self.squares = torch.empty(self.PARTS, NARROW_TOKENS, dtype=torch.float32, device=device)
        self.square_parts = 0


# Narrow matrix products


@dataclass(frozen=True, slots=True)
class Plan:
    """Tile sizes of a narrow product. ``prefetch``: weights per row asked for before the launch ahead has finished."""

    block_n: int
    block_k: int
    split: int = 1
    stages: int = 4
    warps: int = 4
    prefetch: int = 0


@jit
def _prefetch_rows(weight, rows, start, depth, COUNT: tl.constexpr):
    """Ask the L2 cache for ``COUNT`` elements from column ``start`` of each row; nothing waits for them."""
    line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    column = start + tl.arange(0, COUNT // line) * line
    where = (weight + rows.to(tl.int64)[:, None] * depth + column[None, :]).to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [where], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def _finish_product(
    acc, gate, squares, before, norm_weight, bias, out, normed, next_squares, n, token, pid_n, tokens, n_out, depth, eps,
    SCALED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIASED: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a narrow product, on ``acc [BLOCK_N, BLOCK_T]`` (and ``gate``, of the same shape)."""
    keep = (n < n_out)[:, None] & (token < tokens)[None, :]
    where = token[None, :] * n_out + n[:, None]
    if SCALED:
        scale = tl.rsqrt(tl.sum(squares, 0) / depth + eps)[None, :]
        acc = acc * scale
        if GATED:
            gate = gate * scale
    if GATED:
        acc = acc * gate * tl.sigmoid(gate)
    if BIASED:
        acc = acc + bias.to(tl.float32)[:, None]
    if RESIDUAL:
        acc = (acc + before.to(tl.float32)).to(out.dtype.element_ty).to(tl.float32)
        acc = tl.where(keep, acc, 0.0)
        scaled = acc * norm_weight.to(tl.float32)[:, None]
        tl.store(normed + where, scaled.to(normed.dtype.element_ty), mask=keep)
        tl.store(next_squares + pid_n * STRIDE + token, tl.sum(acc * acc, 0), mask=token < tokens)
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=keep)


@jit
def _narrow_matmul_kernel(
    x, weight, bias, out, picked, squares, next_weight, normed, next_squares, partial, counters,
    tokens, n_out, depth, eps, square_parts, picks, tokens_per_row,
    SCALED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIASED: tl.constexpr,
    PICKED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr,
    STRIDE: tl.constexpr, PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``out.T [n, t]`` tile by tile: the weight tile is the left operand, so few tokens still fill the matrix units."""
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    span = tl.cdiv(depth, BLOCK_K * SPLIT) * BLOCK_K
    start = pid_k * span
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = tl.minimum(n, n_out - 1)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            _prefetch_rows(weight, weight_row, start, depth, PREFETCH)
            if GATED:
                _prefetch_rows(weight, weight_row + n_out, start, depth, PREFETCH)
        tl.extra.cuda.gdc_wait()

    token = tl.arange(0, BLOCK_T)
    source = tl.minimum(token, tokens - 1)
    if PICKED:
        source = (source // picks) * tokens_per_row + tl.load(picked + source).to(tl.int32)
    # What the epilogue needs is asked for here, so that nothing waits for it after the loop.
    row_squares, before, norm_weight, row_bias = 0.0, 0.0, 0.0, 0.0
    if BIASED:
        row_bias = tl.load(bias + n, mask=n < n_out, other=0.0)
    if SCALED:
        part = tl.arange(0, PARTS)
        row_squares = tl.load(
            squares + part[:, None] * STRIDE + source[None, :], mask=part[:, None] < square_parts, other=0.0
        )
    if RESIDUAL:
        before = tl.load(out + source[None, :] * n_out + n[:, None], mask=(n < n_out)[:, None], other=0.0)
        norm_weight = tl.load(next_weight + n, mask=n < n_out, other=0.0)

    k = tl.arange(0, BLOCK_K)
    weight_at = weight + weight_row.to(tl.int64)[:, None] * depth + (start + k)[None, :]
    gate_at = weight_at
    weight_at += (n_out.to(tl.int64) * depth) if GATED else 0
    x_at = x + source[None, :] * depth + (start + k)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    gate = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for step in range(0, tl.minimum(span, depth - start), BLOCK_K):
        if EVEN_K:
            w = tl.load(weight_at + step, eviction_policy="evict_first")
            xs = tl.load(x_at + step)
        else:
            inside = start + step + k < depth
            w = tl.load(weight_at + step, mask=inside[None, :], other=0.0)
            xs = tl.load(x_at + step, mask=inside[:, None], other=0.0)
        acc = tl.dot(w, xs, acc, input_precision="ieee")
        if GATED:
            if EVEN_K:
                w = tl.load(gate_at + step, eviction_policy="evict_first")
            else:
                w = tl.load(gate_at + step, mask=inside[None, :], other=0.0)
            gate = tl.dot(w, xs, gate, input_precision="ieee")

    if SPLIT == 1:
        _finish_product(
            acc, gate, row_squares, before, norm_weight, row_bias, out, normed, next_squares, n, token, pid_n, tokens,
            n_out, depth, eps,
            SCALED, GATED, RESIDUAL, BIASED, STRIDE,
        )  # fmt: skip
    else:
        tile: tl.constexpr = BLOCK_N * BLOCK_T
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + token[None, :]
        copies: tl.constexpr = 2 if GATED else 1
        mine = partial + (pid_n * SPLIT + pid_k) * tile * copies
        tl.store(mine + at, acc)
        if GATED:
            tl.store(mine + tile + at, gate)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + pid_n, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            # The last to arrive adds all parts in their order, its own among them: who is last changes nothing.
            acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            gate = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for part_k in tl.static_range(SPLIT):
                theirs = partial + (pid_n * SPLIT + part_k) * tile * copies
                acc += tl.load(theirs + at, cache_modifier=".cg")
                if GATED:
                    gate += tl.load(theirs + tile + at, cache_modifier=".cg")
            tl.store(counters + pid_n, 0)
            _finish_product(
                acc, gate, row_squares, before, norm_weight, row_bias, out, normed, next_squares, n, token, pid_n, tokens,
                n_out, depth, eps,
                SCALED, GATED, RESIDUAL, BIASED, STRIDE,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Norm:
    """The RMSNorm after a residual stream: its weight ``[hidden]``, and a buffer ``[T, hidden]`` for ``x * weight``."""

    weight: Tensor
    normed: Tensor


def narrow_matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    plan: Plan,
    work: Workspace,
    *,
    scale_eps: float | None = None,
    gated: bool = False,
    residual: Norm | None = None,
    bias: Tensor | None = None,
    picked: Tensor | None = None,
    tokens_per_row: int = 0,
    overlap: bool = False,
) -> Tensor:
    """``out [T, N] = x [T, K] @ weight [N, K].T`` for ``T <= NARROW_TOKENS``; returns ``out``.

    ``scale_eps``: x is an unscaled norm (`Norm.normed`); divide the product by the rms kept in ``work``.
    ``gated``: weight is ``[2 N, K]``, gate above up; ``out = silu(gate) * up``.
    ``residual``: ``out += product`` instead, and prepare the norm that follows.
    ``bias [N]``: added to the product; not with ``gated``.
    ``picked [b, P]``: only these of the ``tokens_per_row`` tokens of each row of x; ``out`` is then ``[b * P, N]``.
    ``overlap``: launch before the kernel ahead has finished. Weights must not be written by that kernel.
    """
    tokens, n_out = out.shape
    depth = x.shape[1]
    assert tokens <= NARROW_TOKENS, f"{tokens} tokens; narrow products serve at most {NARROW_TOKENS}"
    assert weight.shape == (n_out * (2 if gated else 1), depth), f"weight {list(weight.shape)}, out {list(out.shape)}"
    assert all(t.is_contiguous() for t in (x, weight, out))
    block_t, tiles = pow2(tokens, 16), triton.cdiv(n_out, plan.block_n)
    assert bias is None or not gated, "a gated product has no bias"
    assert residual is None or tiles <= Workspace.PARTS
    partial = work.squares
    if plan.split > 1:
        size = tiles * plan.split * plan.block_n * block_t * (2 if gated else 1)
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    stage_bytes = (plan.block_n * (2 if gated else 1) + block_t) * plan.block_k * x.element_size()
    stages = min(plan.stages, max(1, shared_memory(x.device) // stage_bytes))
    prefetch = plan.prefetch if plan.prefetch * plan.split <= depth and plan.prefetch * x.element_size() >= 128 else 0
    _narrow_matmul_kernel[(tiles, plan.split)](
        x, weight, bias, out, picked, work.squares,
        residual.weight if residual else None, residual.normed if residual else None, work.squares,
        partial, work.counters,
        tokens, n_out, depth, scale_eps or 0.0, work.square_parts,
        picked.shape[-1] if picked is not None else 1, tokens_per_row,
        SCALED=scale_eps is not None, GATED=gated, RESIDUAL=residual is not None,
        BIASED=bias is not None, PICKED=picked is not None,
        EVEN_K=depth % (plan.block_k * plan.split) == 0,
        BLOCK_T=block_t, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, SPLIT=plan.split,
        PARTS=pow2(work.square_parts) if scale_eps is not None else 1, STRIDE=NARROW_TOKENS,
        PREFETCH=prefetch, OVERLAP=overlap,
        **launch_options(overlap, plan.warps, stages),
    )  # fmt: skip
    if residual:
        work.square_parts = tiles
    return out


def narrow_plan(tokens: int, weight: Tensor, gated: bool = False) -> Plan:
    """Tiles for ``weight [N, K]``, as measured on an H200 (132 multiprocessors). Each of those must get the same share
    of the weights: an uneven last wave costs more than any tile size gains.
    """
    n_out, depth = weight.shape
    if weight.dtype != torch.bfloat16:
        return Plan(32, 32, stages=2)
    if gated:
        return Plan(32, 128, stages=4, prefetch=128)
    if n_out > 1 << 16:
        return Plan(128, 128, stages=3 if tokens <= 16 else 4, warps=8, prefetch=128)
    tiles, split = -(-n_out // 64), 1
    while tiles * split < 96 and depth // split >= 1024:
        split *= 2
    if split == 1 and tokens <= 16 and depth >= 4096:
        return Plan(64, 128, split=4, stages=3, prefetch=128)
    return Plan(64, 128, split, stages=6, prefetch=128)


@jit
def _embed_kernel(ids, table, x, weight, normed, squares, hidden, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    row = tl.load(table + tl.load(ids + token) * hidden + column, mask=inside, other=0.0)
    wide = row.to(tl.float32)
    scaled = wide * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + token * hidden + column, row, mask=inside)
    tl.store(normed + token * hidden + column, scaled.to(normed.dtype.element_ty), mask=inside)
    tl.store(squares + token, tl.sum(wide * wide))


def embed(ids: Tensor, table: Tensor, norm: Norm, work: Workspace, *, overlap: bool = False) -> Tensor:
    """The residual stream ``[T, hidden]`` of token ``ids [T]``, with the norm that follows prepared."""
    hidden = table.shape[1]
    x = torch.empty(ids.numel(), hidden, dtype=table.dtype, device=table.device)
    _embed_kernel[(ids.numel(),)](
        ids, table, x, norm.weight, norm.normed, work.squares, hidden,
        BLOCK=pow2(hidden), OVERLAP=overlap, num_warps=8,
    )  # fmt: skip
    work.square_parts = 1
    return x


# Elementwise steps of the wide way


@jit
def _add_rms_norm_kernel(
    x, delta, weight, out, hidden, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    norm_weight = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / hidden + eps) * norm_weight
    tl.store(out + row + column, value.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, overlap: bool = False) -> Tensor:
    """``x [M, hidden] += delta`` in place (when given); returns ``x / rms(x) * weight``, cast once."""
    out = torch.empty_like(x)
    hidden = x.shape[1]
    _add_rms_norm_kernel[(x.shape[0],)](
        x, delta, weight, out, hidden, eps, ADD=delta is not None, BLOCK=pow2(hidden), OVERLAP=overlap,
        **launch_options(overlap, 8, 1),
    )  # fmt: skip
    return out


@jit
def _silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, *, overlap: bool = False) -> Tensor:
    """``silu(gate) * up`` of ``gate_up [M, 2 I]`` -> ``[M, I]``."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, pow2(width))
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](
        gate_up, out, width, BLOCK=block, OVERLAP=overlap, **launch_options(overlap, 4, 1)
    )
    return out


# Attention over the cache


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
        return {"NORMED": self.q_weight is not None, "TURN": self.cos.shape[1], "WIDE": max(16, heads.dim // 2)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer reads and writes: its cache ``[B, H_kv, S, D]``; per entry of the forward ``prefixes [b]``, how many cached tokens it sees, and its
    ``rows [b]`` (-1: padding).

    An entry of T tokens writes at ``[prefix, prefix + T)`` and sees these besides its prefix. With ``offsets [b]`` it writes at ``[prefix + offset, + T)``
    and sees the ``width`` slots from its prefix on: those it does not write itself as they are in the cache.
    """

    keys: Tensor
    values: Tensor
    prefixes: Tensor
    rows: Tensor
    offsets: Tensor | None = None
    width: int = 0

    def columns(self, tokens: int) -> int:
        """How many slots from the prefix on a query may see: the columns of a local mask."""
        return tokens if self.offsets is None else self.width


@jit
def _load_angles(position, live, cos, sin, TURN: tl.constexpr, WIDE: tl.constexpr):
    """cos and sin ``[R, WIDE]`` of ``position [R]``; pairs from ``TURN`` on are not rotated."""
    pair = tl.arange(0, WIDE)
    at = position[:, None] * TURN + pair[None, :]
    keep = live[:, None] & (pair < TURN)[None, :]
    return tl.load(cos + at, mask=keep, other=1.0), tl.load(sin + at, mask=keep, other=0.0)


@jit
def _first_of_pair(TURN: tl.constexpr, WIDE: tl.constexpr):
    """The channel that pair ``i`` of a head begins with, ``[WIDE]``; the other is ``TURN`` further. All pairs cover all
    channels, the rotated ones first.
    """
    first = tl.arange(0, WIDE)
    if WIDE > TURN:
        first += first // TURN * TURN
    return first


@jit
def _load_rotated(
    base, live, c, s, weight, eps, NORMED: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr
):
    """Head vectors at ``base [R]``, normed and rotated: both channels of each pair, ``[R, WIDE]``, in the buffer's dtype."""
    dtype = base.dtype.element_ty
    first = _first_of_pair(TURN, WIDE)
    inside = tl.arange(0, WIDE) < HALF
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
    q1, q2, keys, values, mask, mask_row, live, first, last, length, offset, tokens, scale,
    D: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, MOVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The running softmax of queries over the slots ``[first, last)`` of a head's ``keys`` and ``values``. ``MOVED``: without the
    ``tokens`` slots that this forward writes, and from ``length`` on under the mask at ``mask_row [M]``.
    """
    d, channel = tl.arange(0, D), _first_of_pair(TURN, WIDE)
    half_in = tl.arange(0, WIDE) < D // 2
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for s0 in range(first, last, BLOCK_S):
        slot = s0 + tl.arange(0, BLOCK_S)
        held = slot < last
        if MOVED:
            column = slot - length
            held = held & ((column < offset) | (column >= offset + tokens))
        k_at = keys + slot[:, None] * D + channel[None, :]
        keep = held[:, None] & half_in[None, :]
        k1 = tl.load(k_at, mask=keep, other=0.0)
        k2 = tl.load(k_at + TURN, mask=keep, other=0.0)
        v = tl.load(values + slot[:, None] * D + d[None, :], mask=held[:, None], other=0.0)
        allowed = held[None, :]
        if MOVED and MASKED:
            beside = live[:, None] & (held & (column >= 0))[None, :]
            seen = tl.load(mask + mask_row[:, None] + column[None, :], mask=beside, other=1)
            allowed = allowed & (seen != 0)
        scores = tl.where(allowed, _pair_scores(q1, q2, k1, k2, scale), float("-inf"))
        top, total, acc = _softmax_step(scores, v, top, total, acc)
    return top, total, acc


@jit
def _attend_split_kernel(
    qkv, out, keys, values, prefixes, rows, offsets, positions, cos, sin, q_weight, k_weight, mask, partial, softmax,
    eps, scale, tokens, columns, slots, mask_stride, m_tiles,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, MOVED: tl.constexpr,
    NORMED: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One (row, group of query rows, KV head, split). The last split takes the tokens of this forward, the others share
    what is seen in the cache (``MOVED``: the slots around the written ones too) by its length on the device; a single
    split takes both.
    """
    HALF: tl.constexpr = D // 2
    pid_m, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, tile_m = pid_m // m_tiles, pid_m % m_tiles
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows + seq)
    real = row >= 0
    row = tl.maximum(row, 0)
    length = tl.where(real, tl.load(prefixes + seq), 0).to(tl.int32)
    cached = (row * H_KV + kv).to(tl.int64) * slots * D
    offset, reach = 0, length
    if MOVED:
        offset = tl.load(offsets + seq).to(tl.int32)
        reach = tl.where(real, length + columns, 0)
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
        c, s = _load_angles(position, live, cos, sin, TURN, WIDE)
        if OVERLAP:
            if D * keys.dtype.element_ty.primitive_bitwidth >= 1024:
                ahead = tl.minimum(first + tl.arange(0, BLOCK_S), tl.maximum(last - 1, 0))
                _prefetch_rows(keys + cached, ahead, 0, D, D)
                _prefetch_rows(values + cached, ahead, 0, D, D)
            tl.extra.cuda.gdc_wait()
        stride: tl.constexpr = (G + 2) * H_KV * D
        here = seq.to(tl.int64) * tokens
        q1, q2 = _load_rotated(
            qkv + (here + token) * stride + head * D, live, c, s, q_weight, eps, NORMED, HALF, TURN, WIDE
        )

        d, channel = tl.arange(0, D), _first_of_pair(TURN, WIDE)
        half_in = tl.arange(0, WIDE) < HALF
        mask_row = seq * mask_stride + token * columns
        top, total, acc = _attend_cache(
            q1, q2, keys + cached, values + cached, mask, mask_row, live, first, last, length, offset, tokens, scale,
            D, TURN, WIDE, MASKED, MOVED, BLOCK_M, BLOCK_S,
        )  # fmt: skip

        if local:
            t = tl.arange(0, BLOCK_T)
            fresh = (t < tokens) & real
            new = qkv + (here + t) * stride + (G * H_KV + kv) * D
            new_position = tl.load(positions + seq * tokens + t, mask=fresh, other=0)
            new_c, new_s = _load_angles(new_position, fresh, cos, sin, TURN, WIDE)
            k1, k2 = _load_rotated(new, fresh, new_c, new_s, k_weight, eps, NORMED, HALF, TURN, WIDE)
            v = tl.load(new[:, None] + (H_KV * D + d)[None, :], mask=fresh[:, None], other=0.0)
            if tile_m == 0:
                slot = length + offset + t
                fits = fresh & (slot < slots)
                k_at = keys + cached + slot[:, None] * D + channel[None, :]
                keep = fits[:, None] & half_in[None, :]
                tl.store(k_at, k1, mask=keep)
                tl.store(k_at + TURN, k2, mask=keep)
                tl.store(values + cached + slot[:, None] * D + d[None, :], v, mask=fits[:, None])
            allowed = live[:, None] & fresh[None, :]
            if MASKED:
                seen = tl.load(mask + mask_row[:, None] + (offset + t)[None, :], mask=allowed, other=0)
                allowed = allowed & (seen != 0)
            scores = tl.where(allowed, _pair_scores(q1, q2, k1, k2, scale), float("-inf"))
            top, total, acc = _softmax_step(scores, v, top, total, acc)

        vector = (here + token) * G * H_KV + head
        if SPLITS == 1:
            acc = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out + vector[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])
        else:
            vector = vector * SPLITS + split
            tl.store(partial + vector[:, None] * D + d[None, :], acc, mask=live[:, None])
            tl.store(softmax + vector * 2, top, mask=live)
            tl.store(softmax + vector * 2 + 1, total, mask=live)


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
    place: Place,
    heads: Heads,
    norm: QKNorm,
    local_mask: Tensor | None = None,
    *,
    slots: int | None = None,
    plan: SplitPlan | None = None,
    overlap: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of a few new tokens over the cache -> ``[b * T, H * D]``; writes their keys and values on the way.

    ``qkv [b * T, width]`` are raw projections, ``positions [b, T]``. Entry ``i`` writes and sees what ``place`` says, the
    W slots from its prefix on (its own tokens, W = T, unless ``place`` has a width) under ``local_mask`` (bool ``[T, W]``
    or ``[b, T, W]``). A padding row writes nothing and gets zeros. ``slots``: about how long prefixes can be; it decides
    the splits, while the time follows the lengths themselves.
    ``overlap``: launch before the kernel ahead has finished; that one must not write ``positions``, ``rows``,
    ``prefixes``. It may write the cache: prefixes are read after it has finished.
    """
    batch, tokens = positions.shape
    assert qkv.shape == (batch * tokens, heads.width), f"qkv {list(qkv.shape)}, positions {list(positions.shape)}"
    assert all(t.is_contiguous() for t in (qkv, positions, place.keys, place.values))
    assert tokens <= SPLIT_TOKENS, f"{tokens} tokens a row; split attention serves at most {SPLIT_TOKENS}"
    plan = plan or split_plan(batch, tokens, heads, slots or place.keys.shape[2])
    m_tiles = -(-tokens * heads.group // plan.block_m)
    if out is None:
        out = torch.empty(batch * tokens, heads.query * heads.dim, dtype=qkv.dtype, device=qkv.device)
    parts = batch * tokens * heads.query * plan.splits if plan.splits > 1 else 0
    partial, softmax = (qkv.new_empty(parts, size, dtype=torch.float32) for size in (heads.dim, 2))
    columns, moved = place.columns(tokens), place.offsets is not None
    mask, mask_stride = _mask_bytes(local_mask, batch, tokens, columns)
    stage_bytes = 2 * plan.block_s * heads.dim * qkv.element_size()
    stages = min(plan.stages, max(1, (shared_memory(qkv.device) - (48 << 10)) // stage_bytes))
    _attend_split_kernel[(batch * m_tiles, heads.kv, plan.splits)](
        qkv, out, place.keys, place.values, place.prefixes, place.rows, place.offsets, positions, norm.cos, norm.sin,
        norm.q_weight, norm.k_weight, mask, partial, softmax,
        norm.eps, heads.dim**-0.5 * _LOG2_E, tokens, columns, place.keys.shape[2], mask_stride, m_tiles,
        H_KV=heads.kv, G=heads.group, D=heads.dim, MASKED=mask is not None, MOVED=moved, **norm.flags(heads),
        BLOCK_M=plan.block_m, BLOCK_T=pow2(tokens, 16), BLOCK_S=plan.block_s, SPLITS=plan.splits, OVERLAP=overlap,
        **launch_options(overlap, plan.warps, stages),
    )  # fmt: skip
    if plan.splits > 1:
        _merge_splits_kernel[(batch * tokens, heads.kv)](
            partial, softmax, out, place.prefixes, place.rows, tokens, columns if moved else 0,
            H_KV=heads.kv, G=heads.group, GROUP=pow2(heads.group), D=heads.dim,
            BLOCK_S=plan.block_s, SPLITS=plan.splits, PARTS=pow2(plan.splits), OVERLAP=overlap,
            **launch_options(overlap, 4, 1),
        )  # fmt: skip
    return out


def _mask_bytes(local_mask: Tensor | None, batch: int, tokens: int, columns: int) -> tuple[Tensor | None, int]:
    """The mask as bytes, and the step from one row's mask to the next (0 when all rows share one)."""
    if local_mask is None:
        return None, 0
    shared = local_mask.dim() == 2
    assert local_mask.dtype == torch.bool, f"local_mask is {local_mask.dtype}; the kernels take bool masks"
    assert local_mask.shape == ((tokens, columns) if shared else (batch, tokens, columns)), list(local_mask.shape)
    return local_mask.contiguous().view(torch.uint8), 0 if shared else tokens * columns


@jit
def _rope_write_kernel(
    qkv, keys, values, prefixes, rows, offsets, positions, cos, sin, q_weight, k_weight, eps, tokens, slots,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MOVED: tl.constexpr,
    NORMED: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    H: tl.constexpr = G * H_KV
    seq, head = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < tokens
    channel, half_in = _first_of_pair(TURN, WIDE), tl.arange(0, WIDE) < HALF
    base = qkv + (seq.to(tl.int64) * tokens + t) * ((G + 2) * H_KV * D) + head * D
    position = tl.load(positions + seq * tokens + t, mask=live, other=0)
    c, s = _load_angles(position, live, cos, sin, TURN, WIDE)
    if head < H:
        a, b = _load_rotated(base, live, c, s, q_weight, eps, NORMED, HALF, TURN, WIDE)
        keep = live[:, None] & half_in[None, :]
        tl.store(base[:, None] + channel[None, :], a, mask=keep)
        tl.store(base[:, None] + (TURN + channel)[None, :], b, mask=keep)
    else:
        row = tl.load(rows + seq)
        length = tl.load(prefixes + seq).to(tl.int32)
        slot = length + t
        if MOVED:
            slot += tl.load(offsets + seq).to(tl.int32)
        fits = live & (row >= 0) & (slot < slots)
        if head < H + H_KV:
            a, b = _load_rotated(base, live, c, s, k_weight, eps, NORMED, HALF, TURN, WIDE)
            k_at = keys + (row * H_KV + head - H).to(tl.int64) * slots * D + slot[:, None] * D + channel[None, :]
            k_keep = fits[:, None] & half_in[None, :]
            tl.store(k_at, a, mask=k_keep)
            tl.store(k_at + TURN, b, mask=k_keep)
        else:
            d = tl.arange(0, D)
            v = tl.load(base[:, None] + d[None, :], mask=live[:, None], other=0.0)
            v_at = values + (row * H_KV + head - H - H_KV).to(tl.int64) * slots * D + slot[:, None] * D + d[None, :]
            tl.store(v_at, v, mask=fits[:, None])


def rope_write(qkv: Tensor, positions: Tensor, place: Place, heads: Heads, norm: QKNorm) -> None:
    """Norm and rotate the queries of ``qkv [b * T, width]`` in place; write keys, normed and rotated, and values to the
    cache.
    """
    batch, tokens = positions.shape
    _rope_write_kernel[(triton.cdiv(tokens, 16), batch, heads.query + 2 * heads.kv)](
        qkv, place.keys, place.values, place.prefixes, place.rows, place.offsets, positions, norm.cos, norm.sin,
        norm.q_weight, norm.k_weight, norm.eps, tokens, place.keys.shape[2],
        H_KV=heads.kv, G=heads.group, D=heads.dim, MOVED=place.offsets is not None, **norm.flags(heads),
        BLOCK_T=16, num_warps=4,
    )  # fmt: skip


@jit
def _attend_long_kernel(
    qkv, out, keys, values, prefixes, rows, mask, extents, scale, tokens, columns, slots, mask_stride, extent_stride,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
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
    s = tl.arange(0, BLOCK_S)
    k_at = keys + cached + s[:, None] * D + d[None, :]
    v_at = values + cached + s[:, None] * D + d[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for s0 in range(0, clear, BLOCK_S):
        k = tl.load(k_at + s0 * D)
        v = tl.load(v_at + s0 * D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        top, total, acc = _softmax_step(scores, v, top, total, acc)
    for s0 in range(clear, stop, BLOCK_S):
        held = s0 + s < stop
        k = tl.load(k_at + s0 * D, mask=held[:, None], other=0.0)
        v = tl.load(v_at + s0 * D, mask=held[:, None], other=0.0)
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
    place: Place,
    heads: Heads,
    batch: int,
    local_mask: Tensor | None = None,
    extents: Tensor | None = None,
) -> Tensor:
    """Attention of many new tokens, after `rope_write`, over the cache -> ``[b * T, H * D]``.

    Any ``local_mask`` (``[T, W]`` or ``[b, T, W]``, see `attend_split`); its empty tiles cost nothing. ``extents``: `long_extents` of it.
    """
    tokens = qkv.shape[0] // batch
    out = torch.empty(batch * tokens, heads.query * heads.dim, dtype=qkv.dtype, device=qkv.device)
    columns = place.columns(tokens)
    mask, mask_stride = _mask_bytes(local_mask, batch, tokens, columns)
    if mask is not None and extents is None:
        extents = long_extents(local_mask, qkv.dtype)
    block_m, block_s, warps, stages = _long_blocks(qkv.dtype)
    _attend_long_kernel[(triton.cdiv(tokens, block_m), heads.query, batch)](
        qkv, out, place.keys, place.values, place.prefixes, place.rows, mask, extents,
        heads.dim**-0.5 * _LOG2_E, tokens, columns, place.keys.shape[2], mask_stride,
        0 if mask is None or local_mask.dim() == 2 else extents.stride(0),
        H_KV=heads.kv, G=heads.group, D=heads.dim, MASKED=mask is not None,
        BLOCK_M=block_m, BLOCK_S=block_s, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
