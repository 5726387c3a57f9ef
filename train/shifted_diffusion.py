"""Shifted block diffusion with complementary masks, the objective of Fast-dLLM v2 (Wu et al. 2025).

The layout is that of `train.block_diffusion`: ``[noisy | clean]``, a noisy block sees itself and the clean tokens of earlier blocks. But row ``t``
predicts token ``t + 1``, as in the autoregressive network this family starts from, so each half has something to learn: the noisy rows
the masked tokens of their own block, the clean rows the token that comes next, which is the first of the next block and, with a
token-causal clean half, every token. That half is the verifier of S2D2.
"""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.block_diffusion import IGNORED, two_copy_train
from train.data import Batch

BLOCK_WEIGHTS = {4: 0.10, 8: 0.15, 16: 0.25, 32: 0.50}
CAUSAL_SHARE = 0.6


def complementary_noise(
    batch: Batch, block_length: int, mask_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noisy tokens ``[2B, T]`` and what is masked in them: every row twice, masked where the other is not.

    Each block draws its own ratio from U(0, 1). Only trained positions are masked, and never the first of a block: decoding knows it already.
    """
    rows, length = batch.tokens.shape
    count, device = -(-length // block_length), batch.tokens.device
    ratio = torch.rand(rows, count, device=device, generator=generator).repeat_interleave(block_length, 1)[:, :length]
    drawn = torch.rand(rows, length, device=device, generator=generator) < ratio
    free = batch.trained & (torch.arange(length, device=device) % block_length != 0)
    masked = torch.cat([drawn, ~drawn]) & free.repeat(2, 1)
    return batch.tokens.repeat(2, 1).masked_fill(masked, mask_id), masked


def next_token_targets(tokens: Tensor, wanted: Tensor) -> Tensor:
    """``[B, T]``: at ``t`` the token at ``t + 1`` where that is ``wanted``, else `IGNORED`."""
    return F.pad(tokens.masked_fill(~wanted, IGNORED)[:, 1:], (0, 1), value=IGNORED)


def mean_loss(logits: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of ``logits [B, T, V]`` averaged over the ``wanted`` tokens; 0 where there are none (short answers in long blocks)."""
    target = next_token_targets(tokens, wanted)
    total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)


def objective(model: nn.Module, mask_id: int, seed: int) -> ShiftedDiffusion:
    """For `shared.family.Training`."""
    return ShiftedDiffusion(mask_id, seed, model.device)


class ShiftedDiffusion:
    """The loss of one batch: a block length and the visibility of the clean half are drawn, the rest follows."""

    def __init__(self, mask_id: int, seed: int, device: torch.device):
        self.mask_id = mask_id
        self.random = Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the masked tokens plus that over the tokens the clean half may not see."""
        block_length = self.random.choices(list(BLOCK_WEIGHTS), list(BLOCK_WEIGHTS.values()))[0]
        causal_clean = self.random.random() < CAUSAL_SHARE
        length, device = batch.tokens.shape[1], batch.tokens.device
        noisy, masked = complementary_noise(batch, block_length, self.mask_id, self.generator)
        clean = batch.tokens.repeat(2, 1)
        positions = torch.arange(length, device=device).repeat(2).expand(len(noisy), -1)
        seen = two_copy_train(length, block_length, causal_clean, device)
        logits = model(torch.cat([noisy, clean], 1), positions, None, seen).float()
        first = torch.arange(length, device=device) % block_length == 0
        unseen = batch.trained if causal_clean else batch.trained & first
        half = len(batch.tokens)
        return mean_loss(logits[:, :length], clean, masked) + mean_loss(logits[:half, length:], batch.tokens, unseen)
