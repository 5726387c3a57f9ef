"""Attention masks for blocks that are counted from the end of each row's prompt: bool ``[B, T, T]``, True = may attend.

``first [B]`` is where a row's answer begins, ``stop [B]`` where what is trained of it ends. The prompt attends to itself alone, in both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def answers(trained: Tensor) -> tuple[Tensor, Tensor]:
    """``(first [B], stop [B])`` of ``trained [B, T]``, one span a row."""
    first = trained.long().argmax(1)
    return first, first + trained.sum(1)


def block_of(first: Tensor, length: int, block_length: int) -> Tensor:
    """``[B, T]``: the number of the block each position belongs to, -1 in the prompt."""
    after_prompt = torch.arange(length, device=first.device) - first[:, None]
    return after_prompt.div(block_length, rounding_mode="floor").clamp(min=-1)


def both_ways(stop: Tensor, length: int) -> Tensor:
    """Everything before ``stop``: the padding after it is not there when a model decodes."""
    return (torch.arange(length, device=stop.device) < stop[:, None])[:, None].expand(-1, length, -1)


def block_causal(first: Tensor, length: int, block_length: int) -> Tensor:
    """The prompt, earlier blocks and the own one. A block length of 1 is token-causal."""
    block = block_of(first, length, block_length)
    return block[:, None] <= block[:, :, None]


def cut(first: Tensor, length: int, at: Tensor, before: int, after: int) -> Tensor:
    """Block-causal, in blocks of ``before`` in the rows ahead of position ``at [B]`` and of ``after`` from there on."""
    ahead = torch.arange(length, device=first.device) < at[:, None]
    return torch.where(ahead[:, :, None], block_causal(first, length, before), block_causal(first, length, after))


def verify(clean: Tensor, first: Tensor) -> Tensor:
    """``[B, 2T, 2T]`` over ``[masks | clean]``: a mask of the answer sees itself and the clean tokens before its place, the clean half ``clean [B, T, T]``."""
    rows, length = clean.shape[:2]
    own = torch.eye(length, dtype=torch.bool, device=clean.device).expand(rows, -1, -1)
    place = block_of(first, length, 1)
    earlier = place[:, None] < place[:, :, None]
    return torch.cat([torch.cat([own, earlier], 2), torch.cat([torch.zeros_like(own), clean], 2)], 1)
