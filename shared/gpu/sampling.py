"""The likeliest token of every row of logits, and how likely it is, in one pass over them, beside its naive twin."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.gpu.launch import available, jit, pow2, tl, triton

_BLOCK = 2048  # logits a program looks at a time
_PROGRAMS = 264  # two for each processor of a large GPU


def serves(logits: Tensor) -> bool:
    """Can the kernels take these ``logits [..., V]``?"""
    return logits.dtype in (torch.bfloat16, torch.float32) and logits.is_contiguous() and available(logits.device)


@jit
def _likeliest_part_kernel(logits, best, at, total, vocabulary, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    high, where, mass = float("-inf"), 0, 0.0
    for step in range(STEPS):
        column = (part * STEPS + step) * BLOCK + lane
        x = tl.load(logits + row * vocabulary + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        top, index = tl.max(x, 0, return_indices=True)
        where = tl.where(top > high, (part * STEPS + step) * BLOCK + index, where)
        higher = tl.maximum(high, top)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(high - level) + tl.sum(tl.exp(x - level), 0)
        high = higher
    tl.store(best + row * parts + part, high)
    tl.store(at + row * parts + part, where)
    tl.store(total + row * parts + part, mass)


@jit
def _likeliest_kernel(best, at, total, ids, probs, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    high = tl.load(best + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    mass = tl.load(total + row * PARTS + part, mask=part < PARTS, other=0.0)
    top, index = tl.max(high, 0, return_indices=True)
    level = tl.where(top == float("-inf"), 0.0, top)
    tl.store(ids + row, tl.load(at + row * PARTS + index).to(tl.int64))
    tl.store(probs + row, 1.0 / tl.sum(mass * tl.exp(high - level), 0))


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``(ids [...], probability of each [...])`` of the most likely tokens of ``logits [..., V]``, the smallest id on ties, in float32.

    A probability is not a finite number where logits are not numbers.
    """
    *shape, vocabulary = logits.shape
    rows = logits.numel() // vocabulary
    blocks = triton.cdiv(vocabulary, _BLOCK)
    steps = triton.cdiv(blocks, min(triton.cdiv(_PROGRAMS, max(rows, 1)), blocks))
    parts = triton.cdiv(blocks, steps)
    best, total = logits.new_empty(2, rows, parts, dtype=torch.float32)
    at = logits.new_empty(rows, parts, dtype=torch.int32)
    ids, probs = logits.new_empty(shape, dtype=torch.long), logits.new_empty(shape, dtype=torch.float32)
    if rows:
        _likeliest_part_kernel[(rows, parts)](
            logits, best, at, total, vocabulary, STEPS=steps, BLOCK=_BLOCK, num_warps=8
        )
        _likeliest_kernel[(rows,)](best, at, total, ids, probs, PARTS=parts, BLOCK=pow2(parts))
    return ids, probs


def greedy_naive(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch's own operations, for any logits on any device."""
    logits = logits.float()
    best, ids = logits.max(-1)
    return ids, (best - logits.logsumexp(-1)).exp()
