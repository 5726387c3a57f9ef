"""Matrix products of a few tokens, beside their naive twin (see `shared.gpu.norm`).

Such a product is bound by reading the weights once, so the elementwise steps around it are folded into it, and each launch asks for its weights before the
launch ahead of it has finished (programmatic dependent launch).

RMSNorm is folded in by ``norm(x) @ W.T == (x * weight) @ W.T / rms(x)``: the product that makes ``x`` also stores ``x * weight`` and the sums of squares of
its own columns, and the product that reads it divides its result. Float16 is not served: the undivided ``x * weight`` could overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.gpu.launch import (
    SMALL_BATCH_TOKENS,
    Workspace,
    jit,
    launch_options,
    pow2,
    prefetch_rows,
    shared_memory,
    tl,
    triton,
)
from shared.gpu.norm import Norm


@dataclass(frozen=True, slots=True)
class Plan:
    """Tile sizes of a small-batch product. ``prefetch``: weights per row asked for before the launch ahead has finished."""

    block_n: int
    block_k: int
    split: int = 1
    stages: int = 4
    warps: int = 4
    prefetch: int = 0


@jit
def _multiply(
    x, weight, source, weight_row, start, span, n_out, depth,
    GATED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products ``[BLOCK_N, BLOCK_T]`` over the depth ``[start, start + span)``: of the weights (``GATED``: of the up half), and of the gate half."""
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
    return acc, gate


@jit
def _store_part(
    acc, gate, partial, counters, pid_n, pid_k, at,
    GATED: tl.constexpr, TILE: tl.constexpr, COPIES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Leave this program's part of a split product where the last to arrive will add them up; how many arrived before."""
    mine = partial + (pid_n * SPLIT + pid_k) * TILE * COPIES
    tl.store(mine + at, acc)
    if GATED:
        tl.store(mine + TILE + at, gate)
    tl.debug_barrier()
    return tl.atomic_add(counters + pid_n, 1, sem="acq_rel")


@jit
def _add_parts(
    partial, counters, pid_n, at,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    TILE: tl.constexpr, COPIES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The sum of all parts in their order, the last to arrive's own among them: who is last changes nothing."""
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    gate = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for part_k in tl.static_range(SPLIT):
        theirs = partial + (pid_n * SPLIT + part_k) * TILE * COPIES
        acc += tl.load(theirs + at, cache_modifier=".cg")
        if GATED:
            gate += tl.load(theirs + TILE + at, cache_modifier=".cg")
    tl.store(counters + pid_n, 0)
    return acc, gate


@jit
def _finish_product(
    acc, gate, squares, before, norm_weight, bias, out, normed, next_squares, n, token, pid_n, tokens, n_out, depth, eps,
    SCALED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIASED: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a small-batch product, on ``acc [BLOCK_N, BLOCK_T]`` (and ``gate``, of the same shape)."""
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
def _small_batch_matmul_kernel(
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
            prefetch_rows(weight, weight_row, start, depth, PREFETCH)
            if GATED:
                prefetch_rows(weight, weight_row + n_out, start, depth, PREFETCH)
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

    acc, gate = _multiply(
        x, weight, source, weight_row, start, span, n_out, depth, GATED, EVEN_K, BLOCK_T, BLOCK_N, BLOCK_K
    )
    tile: tl.constexpr = BLOCK_N * BLOCK_T
    copies: tl.constexpr = 2 if GATED else 1
    at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + token[None, :]
    arrived = SPLIT - 1
    if SPLIT > 1:
        arrived = _store_part(acc, gate, partial, counters, pid_n, pid_k, at, GATED, tile, copies, SPLIT)
    if arrived == SPLIT - 1:
        if SPLIT > 1:
            acc, gate = _add_parts(partial, counters, pid_n, at, GATED, BLOCK_N, BLOCK_T, tile, copies, SPLIT)
        _finish_product(
            acc, gate, row_squares, before, norm_weight, row_bias, out, normed, next_squares, n, token, pid_n, tokens,
            n_out, depth, eps,
            SCALED, GATED, RESIDUAL, BIASED, STRIDE,
        )  # fmt: skip


def small_batch_matmul(
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
    """``out [T, N] = x [T, K] @ weight [N, K].T`` for ``T <= SMALL_BATCH_TOKENS``; returns ``out``.

    ``scale_eps``: x is `Norm.normed`; divide the product by the rms, from the sums of squares in ``work``. ``gated``: weight is ``[2 N, K]``, gate above up;
    ``out = silu(gate) * up``. ``residual``: ``out += product`` instead, and prepare the norm that follows. ``bias [N]``: added to the product; not with
    ``gated``. ``picked [b, P]``: only these of the ``tokens_per_row`` tokens of each row of x; ``out`` is then ``[b * P, N]``.
    ``overlap``: launch before the kernel ahead has finished. Weights must not be written by that kernel.
    """
    tokens, n_out = out.shape
    depth = x.shape[1]
    block_t, tiles = pow2(tokens, 16), triton.cdiv(n_out, plan.block_n)
    assert tokens <= SMALL_BATCH_TOKENS, f"{tokens} tokens; small-batch products serve at most {SMALL_BATCH_TOKENS}"
    assert weight.shape == (n_out * (2 if gated else 1), depth), f"weight {list(weight.shape)}, out {list(out.shape)}"
    assert all(t.is_contiguous() for t in (x, weight, out))
    assert bias is None or not gated, "a gated product has no bias"
    assert residual is None or tiles <= Workspace.PARTS
    partial = work.squares
    if plan.split > 1:
        size = tiles * plan.split * plan.block_n * block_t * (2 if gated else 1)
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    stages, prefetch = _fitted(plan, x, block_t, gated)
    _small_batch_matmul_kernel[(tiles, plan.split)](
        x, weight, bias, out, picked, work.squares,
        residual.weight if residual else None, residual.normed if residual else None, work.squares,
        partial, work.counters,
        tokens, n_out, depth, scale_eps or 0.0, work.square_parts,
        picked.shape[-1] if picked is not None else 1, tokens_per_row,
        SCALED=scale_eps is not None, GATED=gated, RESIDUAL=residual is not None,
        BIASED=bias is not None, PICKED=picked is not None,
        EVEN_K=depth % (plan.block_k * plan.split) == 0,
        BLOCK_T=block_t, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, SPLIT=plan.split,
        PARTS=pow2(work.square_parts) if scale_eps is not None else 1, STRIDE=SMALL_BATCH_TOKENS,
        PREFETCH=prefetch, OVERLAP=overlap,
        **launch_options(overlap, plan.warps, stages),
    )  # fmt: skip
    if residual:
        work.square_parts = tiles
    return out


def small_batch_matmul_naive(
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
    squares = work.squares[: work.square_parts].double().sum(0)[: len(x), None]
    if picked is not None:
        rows = (torch.arange(len(picked), device=x.device)[:, None] * tokens_per_row + picked).flatten()
        x, squares = x[rows], squares[rows]
    product = x.double() @ weight.double().T
    if scale_eps is not None:
        product *= torch.rsqrt(squares / x.shape[1] + scale_eps)
    if gated:
        gate, up = product.chunk(2, -1)
        product = F.silu(gate) * up
    if bias is not None:
        product += bias.double()
    if residual is None:
        return out.copy_(product)
    out.copy_(out.double() + product)
    residual.prepare_naive(out, work)
    return out


def _fitted(plan: Plan, x: Tensor, block_t: int, gated: bool) -> tuple[int, int]:
    """The plan's stages as far as they fit in shared memory, and its prefetch, where a program's share of a row and a cache line hold that."""
    stage_bytes = (plan.block_n * (2 if gated else 1) + block_t) * plan.block_k * x.element_size()
    fits = plan.prefetch * plan.split <= x.shape[1] and plan.prefetch * x.element_size() >= 128
    return min(plan.stages, max(1, shared_memory(x.device) // stage_bytes)), plan.prefetch if fits else 0


def small_batch_plan(tokens: int, weight: Tensor, gated: bool = False) -> Plan:
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
