"""RMSNorm and the elementwise steps between matrix products, each beside its naive twin.

A naive twin takes the same arguments and does the same to them, in float64, rounded where the kernel stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.gpu.launch import Workspace, jit, launch_options, pow2, tl, triton


@dataclass(frozen=True, slots=True)
class Norm:
    """The RMSNorm after a residual stream: its weight ``[hidden]``, and a buffer ``[T, hidden]`` for ``x * weight``, not yet divided by the rms."""

    weight: Tensor
    normed: Tensor

    def prepare_naive(self, x: Tensor, work: Workspace) -> None:
        """Fill the buffer and the sums of squares for ``x [T, hidden]``, as the kernels that make ``x`` do."""
        self.normed.copy_(x.double() * self.weight.double())
        work.squares[0, : len(x)] = x.double().square().sum(-1)
        work.square_parts = 1


@jit
def _embed_kernel(ids, table, x, weight, normed, squares, hidden, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    row = tl.load(table + tl.load(ids + token) * hidden + column, mask=inside, other=0.0)
    value = row.to(tl.float32)
    scaled = value * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + token * hidden + column, row, mask=inside)
    tl.store(normed + token * hidden + column, scaled.to(normed.dtype.element_ty), mask=inside)
    tl.store(squares + token, tl.sum(value * value))


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


def embed_naive(ids: Tensor, table: Tensor, norm: Norm, work: Workspace, *, overlap: bool = False) -> Tensor:
    x = table[ids]
    norm.prepare_naive(x, work)
    return x


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


def add_rms_norm_naive(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, overlap: bool = False) -> Tensor:
    if delta is not None:
        x.copy_(x.double() + delta.double())
    return rms_norm_naive(x, weight, eps)


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` of ``x [..., hidden]``, in float64, cast once."""
    return (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)


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


def silu_mul_naive(gate_up: Tensor, *, overlap: bool = False) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)
