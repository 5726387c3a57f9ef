"""Block diffusion, the objective of SDAR (Arriola et al. 2025; Cheng et al. 2025).

A sequence enters twice, as ``[noisy | clean]``. A noisy block sees itself and the clean tokens of earlier blocks, so
one forward trains every block at once; the logits of its masked positions are compared with the tokens themselves.
Blocks start at absolute multiples of their length, as in decoding, so the end of a prompt shares a block with the start
of the solution.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.network.masks import block_causal, token_causal
from train.data import Batch

BLOCK_WEIGHTS = {1: 0.30, 4: 0.10, 8: 0.15, 16: 0.30, 32: 0.15}
IGNORED = -100


@lru_cache(maxsize=64)
def two_copy_train(length: int, block_length: int, causal_clean: bool, device: torch.device | str = "cpu") -> Tensor:
    """``[2T, 2T]`` mask over ``[noisy | clean]`` copies of ``length`` tokens, True = may attend.

    A noisy token sees its own noisy block and the clean tokens of earlier blocks. A clean token sees clean tokens
    alone: its own block and earlier ones, or with ``causal_clean`` itself and earlier tokens (as
    ``cache_ver`` commits them).
    """
    block = torch.arange(length, device=device) // block_length
    own, earlier = block[:, None] == block, block[:, None] > block
    clean = token_causal(length, device) if causal_clean else block_causal(length, block_length, device)
    return torch.cat([torch.cat([own, earlier], 1), torch.cat([torch.zeros_like(own), clean], 1)], 0)


def add_noise(batch: Batch, block_length: int, mask_id: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy tokens ``[B, T]`` and the positions that were masked ``[B, T]``; only trained positions ever are.

    Each block draws its own ratio from U(1/block_length, 1). Blocks of one token are always masked.
    """
    rows, length = batch.tokens.shape
    count, device = -(-length // block_length), batch.tokens.device
    least = 1 / block_length
    ratio = least + (1 - least) * torch.rand(rows, count, device=device, generator=generator)
    ratio = ratio.repeat_interleave(block_length, dim=1)[:, :length]
    masked = batch.trained & (torch.rand(rows, length, device=device, generator=generator) < ratio)
    return batch.tokens.masked_fill(masked, mask_id), masked


def objective(model: nn.Module, mask_id: int, seed: int) -> BlockDiffusion:
    """For `shared.family.Training`."""
    return BlockDiffusion(mask_id, seed, model.device)


class BlockDiffusion:
    """The loss of one batch: a block length and the visibility of the clean copy are drawn, the rest follows."""

    def __init__(self, mask_id: int, seed: int, device: torch.device):
        self.mask_id = mask_id
        self.random = Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the masked positions of the noisy copy."""
        block_length, mask = self.draw(batch)
        noisy, masked = add_noise(batch, block_length, self.mask_id, self.generator)
        return self.loss(self.logits(model, batch, noisy, mask), batch.tokens, masked)

    def draw(self, batch: Batch) -> tuple[int, Tensor]:
        """The batch's block length and its two-copy mask."""
        block_length = self.random.choices(list(BLOCK_WEIGHTS), list(BLOCK_WEIGHTS.values()))[0]
        causal_clean = self.random.random() < 0.5
        return block_length, two_copy_train(batch.tokens.shape[1], block_length, causal_clean, batch.tokens.device)

    def logits(self, model: nn.Module, batch: Batch, noisy: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, V]``: what the model says at each position of the noisy copy."""
        length = batch.tokens.shape[1]
        positions = torch.arange(length, device=noisy.device).repeat(2).expand(len(noisy), -1)
        return model(torch.cat([noisy, batch.tokens], 1), positions, None, mask, logits_at=slice(0, length))

    def loss(self, logits: Tensor, tokens: Tensor, learned: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of ``logits [B, T, V]`` with ``tokens [B, T]`` where ``learned [B, T]``."""
        target = tokens.masked_fill(~learned, IGNORED)
        return F.cross_entropy(
            logits.float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction=reduction
        )
