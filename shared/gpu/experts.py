"""Triton kernels of a mixture-of-experts layer: route, bucket, two grouped products, combine.

The naive twin of `route` is `shared.network.experts.group_limited_top_k`, that of the products `mix_chosen` beside it; the others stand here.

Which experts run is decided and used on the device: no host read, the same launches whatever the routing, and therefore fit for CUDA graphs. Sums have
a fixed order, so a replay repeats an eager forward bit for bit. E experts of width m, N tokens of K experts each; a *pair* is a token and
one of its experts, ``pair = token * K + rank``, the rank being the expert's among the token's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.gpu.launch import jit, launch_options, pow2, shared_memory, tl, triton
from shared.gpu.norm import rms_norm_naive


@jit
def _route_kernel(
    logits, bias, experts, weights, squares, row_scale, square_parts, hidden, eps, scale, count, per_group,
    TOP_K: tl.constexpr, TOP_GROUPS: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token: its scores as ``[BLOCK_G, BLOCK_E]``, a row a group."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    group, member = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E)
    index = group[:, None] * per_group + member[None, :]
    real = (group < GROUPS)[:, None] & (member < per_group)[None, :]
    offset = tl.load(bias + index, mask=real, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if SCALED:
        part = tl.arange(0, PARTS)
        total = tl.sum(tl.load(squares + part * STRIDE + token, mask=part < square_parts, other=0.0))
        tl.store(row_scale + token, tl.rsqrt(total / hidden + eps))
    score = tl.sigmoid(tl.load(logits + token * count + index, mask=real, other=0.0))
    choice = tl.where(real, score + offset, float("-inf"))

    best = tl.max(choice, 1)
    at = tl.min(tl.where(choice == best[:, None], member[None, :], BLOCK_E), 1)
    pair_sum = best + tl.max(tl.where(member[None, :] == at[:, None], float("-inf"), choice), 1)
    kept = group < 0
    for _ in tl.static_range(TOP_GROUPS):
        rest = tl.where(kept | (group >= GROUPS), float("-inf"), pair_sum)
        kept = kept | (group == tl.min(tl.where(rest == tl.max(rest, 0), group, BLOCK_G), 0))
    choice = tl.where(kept[:, None], choice, float("-inf"))

    rank = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    share = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(TOP_K):
        top = tl.max(tl.max(choice, 1), 0)
        expert = tl.min(tl.min(tl.where(choice == top, index, count), 1), 0)
        mine = index == expert
        chosen = tl.where(rank == k, expert, chosen)
        share = tl.where(rank == k, tl.sum(tl.sum(tl.where(mine & real, score, 0.0), 1), 0), share)
        choice = tl.where(mine, float("-inf"), choice)
    if TOP_K > 1:
        share = share / (tl.sum(share, 0) + 1e-20)
    where = token * TOP_K + rank
    # Where a score is no number nothing equals the best: any expert will do, as long as it exists.
    tl.store(experts + where, tl.minimum(chosen, count - 1), mask=rank < TOP_K)
    tl.store(weights + where, share * scale, mask=rank < TOP_K)


@dataclass(frozen=True, slots=True)
class Router:
    """What `shared.network.experts.group_limited_top_k` takes besides the scores; ``bias [E]`` is float32."""

    bias: Tensor
    top_k: int
    groups: int
    top_groups: int
    scale: float


@dataclass(frozen=True, slots=True)
class Unscaled:
    """Sums of squares ``[parts, stride]`` of the rows whose norm has not been divided yet (see `shared.gpu.matmul`), and the norm's sizes."""

    squares: Tensor
    parts: int
    hidden: int
    eps: float


def route(
    logits: Tensor, router: Router, unscaled: Unscaled | None = None, *, overlap: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(experts [N, K] int32, weights [N, K] float32, row_scale [N] or None)`` for float32 router ``logits [N, E]``.

    The choice of `shared.network.experts.group_limited_top_k` over ``sigmoid(logits)``; of equal scores the first expert wins. ``row_scale`` is ``1 / rms``
    of the rows of ``unscaled``.
    """
    tokens, count = logits.shape
    experts = torch.empty(tokens, router.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, router.top_k, dtype=torch.float32, device=logits.device)
    row_scale = None if unscaled is None else torch.empty(tokens, dtype=torch.float32, device=logits.device)
    _route_kernel[(tokens,)](
        logits, router.bias, experts, weights, unscaled and unscaled.squares, row_scale,
        unscaled.parts if unscaled else 0, unscaled.hidden if unscaled else 1, unscaled.eps if unscaled else 0.0,
        router.scale, count, count // router.groups,
        TOP_K=router.top_k, TOP_GROUPS=router.top_groups, SCALED=unscaled is not None,
        PARTS=pow2(unscaled.parts) if unscaled else 1, STRIDE=unscaled.squares.shape[1] if unscaled else 1,
        GROUPS=router.groups, BLOCK_G=pow2(router.groups), BLOCK_E=pow2(count // router.groups),
        BLOCK_K=pow2(router.top_k), OVERLAP=overlap,
        **launch_options(overlap, 2, 1),
    )  # fmt: skip
    return experts, weights, row_scale


@jit
def _bucket_kernel(experts, order, starts, pairs, CHUNK: tl.constexpr, OVERLAP: tl.constexpr):
    """One expert: how many pairs go to those before it, then its own pairs in their order."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    step = tl.arange(0, CHUNK)
    before = tl.zeros([CHUNK], tl.int32)
    for first in range(0, pairs, CHUNK):
        theirs = tl.load(experts + first + step, mask=first + step < pairs, other=1 << 30)
        before += (theirs < expert).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(starts + expert, start)
    tl.store(starts + expert + 1, pairs, mask=expert == tl.num_programs(0) - 1)
    for first in range(0, pairs, CHUNK):
        theirs = tl.load(experts + first + step, mask=first + step < pairs, other=1 << 30)
        mine = theirs == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order + start + rank - 1, first + step, mask=mine)
        start += tl.sum(mine.to(tl.int32), 0)


def bucket(experts: Tensor, count: int, *, overlap: bool = False) -> tuple[Tensor, Tensor]:
    """``(order [N * K], starts [E + 1])``: the pairs of expert ``e`` are ``order[starts[e] : starts[e + 1]]``, in ascending order."""
    pairs = experts.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=experts.device)
    starts = torch.empty(count + 1, dtype=torch.int32, device=experts.device)
    _bucket_kernel[(count,)](
        experts,
        order,
        starts,
        pairs,
        CHUNK=min(pow2(pairs, 16), 2048),
        OVERLAP=overlap,
        **launch_options(overlap, 4, 1),
    )
    return order, starts


def bucket_naive(experts: Tensor, count: int, *, overlap: bool = False) -> tuple[Tensor, Tensor]:
    flat = experts.flatten()
    ends = torch.bincount(flat, minlength=count).cumsum(0)
    return flat.sort(stable=True).indices.int(), F.pad(ends, (1, 0)).int()


@jit
def _grouped_kernel(
    x, gate, weight, out, order, starts, row_scale, n_out, depth,
    TOP_K: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's output columns, for all its pairs. ``GATED``: x rows by token, out rows in bucket order;
    else x rows in bucket order, out rows by pair.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(1)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = (expert.to(tl.int64) * n_out + tl.minimum(n, n_out - 1)) * depth
    weight_at = weight + row[:, None] + k[None, :]
    gate_at = gate + row[:, None] + k[None, :]
    for tile in range(first, last, BLOCK_T):
        slot = tile + tl.arange(0, BLOCK_T)
        live = slot < last
        pair = tl.load(order + slot, mask=live, other=0)
        token = pair // TOP_K
        source = token if GATED else slot
        x_at = x + source[None, :] * depth + k[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        gate_acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for step in range(0, depth, BLOCK_K):
            if EVEN_K:
                w = tl.load(weight_at + step)
                xs = tl.load(x_at + step, mask=live[None, :], other=0.0)
            else:
                inside = step + k < depth
                w = tl.load(weight_at + step, mask=inside[None, :], other=0.0)
                xs = tl.load(x_at + step, mask=live[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(w, xs, acc, input_precision="ieee")
            if GATED:
                w = tl.load(gate_at + step) if EVEN_K else tl.load(gate_at + step, mask=inside[None, :], other=0.0)
                gate_acc = tl.dot(w, xs, gate_acc, input_precision="ieee")
        if SCALED:
            scale = tl.load(row_scale + token, mask=live, other=0.0)[None, :]
            acc, gate_acc = acc * scale, gate_acc * scale
        if GATED:
            acc = acc * gate_acc * tl.sigmoid(gate_acc)
        target = slot if GATED else pair
        keep = (n < n_out)[:, None] & live[None, :]
        tl.store(out + target[None, :].to(tl.int64) * n_out + n[:, None], acc.to(out.dtype.element_ty), mask=keep)


@dataclass(frozen=True, slots=True)
class GroupedPlan:
    """Tiles of a grouped product: output columns, depth and pairs a step."""

    block_n: int
    block_k: int
    block_t: int
    stages: int = 4
    warps: int = 4


@dataclass(frozen=True, slots=True)
class Buckets:
    """What `bucket` returns, with K."""

    order: Tensor
    starts: Tensor
    top_k: int


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    buckets: Buckets,
    plan: GroupedPlan,
    *,
    gate: Tensor | None = None,
    row_scale: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """Each pair's row through its expert's ``weight [E, n, d]``; the weights of an expert without pairs are not read.

    With ``gate [E, n, d]``: ``silu(gate x) * (weight x)`` of ``x [N, d]`` (times ``row_scale [N]`` where given) -> ``[N * K, n]`` in the order of the
    buckets. Without: ``weight x`` of such rows ``x [N * K, d]`` -> ``[N * K, n]`` by pair.
    """
    count, n_out, depth = weight.shape
    pairs = buckets.order.numel()
    assert x.shape == (pairs // buckets.top_k if gate is not None else pairs, depth), list(x.shape)
    assert all(t is None or t.is_contiguous() for t in (x, weight, gate))
    out = torch.empty(pairs, n_out, dtype=x.dtype, device=x.device)
    stage_bytes = (plan.block_n * (1 if gate is None else 2) + plan.block_t) * plan.block_k * x.element_size()
    _grouped_kernel[(triton.cdiv(n_out, plan.block_n), count)](
        x, weight if gate is None else gate, weight, out, buckets.order, buckets.starts, row_scale, n_out, depth,
        TOP_K=buckets.top_k, GATED=gate is not None, SCALED=row_scale is not None, EVEN_K=depth % plan.block_k == 0,
        BLOCK_T=plan.block_t, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, OVERLAP=overlap,
        **launch_options(overlap, plan.warps, min(plan.stages, max(1, shared_memory(x.device) // stage_bytes))),
    )  # fmt: skip
    return out


def grouped_plan(tokens: int, top_k: int, weight: Tensor, gated: bool = False) -> GroupedPlan:
    """Tiles for ``weight [E, n, d]`` as measured on an H200: of so many pairs that the weights of most experts are read once."""
    mean = tokens * top_k / len(weight)
    if weight.dtype != torch.bfloat16:
        return GroupedPlan(32, 32, 16, stages=2)
    if mean <= 4:
        return GroupedPlan(64, 128, 16, stages=4 if gated else 3)
    if mean <= 16:
        return GroupedPlan(64, 128, 64, stages=4 if gated else 3)
    if mean <= 48:
        return GroupedPlan(128, 64, 128 if gated else 64, stages=4, warps=8)
    return GroupedPlan(64, 64, 128, stages=6) if gated else GroupedPlan(128, 64, 128, stages=3, warps=8)


@jit
def _combine_kernel(
    parts, weights, shared, x, norm_weight, normed, squares, hidden, eps,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token: what its experts returned, weighed and summed in their order, into the residual stream and its norm."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    next_weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    dtype = x.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        part = tl.load(parts + pair * hidden + column, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(weights + pair)
    total = total.to(dtype).to(tl.float32)
    if SHARED:
        total += tl.load(shared + token * hidden + column, mask=inside, other=0.0).to(tl.float32)
        total = total.to(dtype).to(tl.float32)
    total += tl.load(x + token * hidden + column, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(dtype)
    tl.store(x + token * hidden + column, rounded, mask=inside)
    total = rounded.to(tl.float32)
    square = tl.sum(total * total, 0)
    if SCALED:
        total = total * tl.rsqrt(square / hidden + eps)
    else:
        tl.store(squares + token, square)
    tl.store(normed + token * hidden + column, (total * next_weight).to(dtype), mask=inside)


def combine(
    parts: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    x: Tensor,
    norm_weight: Tensor,
    *,
    eps: float | None = None,
    squares: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """``x [N, H] += sum over K of weights * parts + shared`` in place; returns the norm after it, ``[N, H]``.

    ``parts [N * K, H]`` by pair, ``weights [N, K]`` float32, ``shared [N, H]`` or None. With ``eps`` the norm is finished; with ``squares`` its
    division is left to the product that reads it, and the rows' sums of squares go there.
    """
    tokens, hidden = x.shape
    normed = torch.empty_like(x)
    _combine_kernel[(tokens,)](
        parts, weights, shared, x, norm_weight, normed, squares, hidden, eps or 0.0,
        TOP_K=weights.shape[1], SHARED=shared is not None, SCALED=squares is None, BLOCK=pow2(hidden), OVERLAP=overlap,
        **launch_options(overlap, 8, 1),
    )  # fmt: skip
    return normed


def combine_naive(
    parts: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    x: Tensor,
    norm_weight: Tensor,
    *,
    eps: float | None = None,
    squares: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    total = (parts.view(*weights.shape, -1).double() * weights[..., None]).sum(1).to(x.dtype)
    if shared is not None:
        total = (total.double() + shared.double()).to(x.dtype)
    x.copy_(x.double() + total.double())
    if squares is None:
        return rms_norm_naive(x, norm_weight, eps)
    squares[0, : len(x)] = x.double().square().sum(-1)
    return (x.double() * norm_weight.double()).to(x.dtype)
