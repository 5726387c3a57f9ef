"""Masked diffusion, the objective of LLaDA and Dream (Nie et al. 2025; Ye et al. 2025).

Each row draws ``t ~ U(0, 1)``, and each token of its answer is masked with probability ``p = (1 - eps) t + eps``; the prompt never is. The network sees
everything, in both directions, and is told neither ``t`` nor which tokens were masked. The loss of a masked token counts ``1 / p``. Where row ``t`` of the
logits predicts token ``t + 1`` (Dream), it is compared with that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from shared.options import FlatOptions, Group, check, option
from train.answer_masks import answers, block_causal, block_of, both_ways, verify
from train.data import Batch

EPS = 1e-3
BLOCK_LENGTHS = (8, 16, 32)  # of the batches that attend block-causally


@dataclass(frozen=True, slots=True)
class Attention(Group):
    block_causal_share: float = option(
        0.0, "share of batches whose answers attend block-causally, in blocks of 8, 16 or 32", low=0.0, high=1.0
    )
    token_causal_share: float = option(
        0.0, "share of batches that learn each token from those before it, as the verifier sees them", low=0.0, high=1.0
    )

    def __post_init__(self):
        check(self)
        if self.block_causal_share + self.token_causal_share > 1:
            raise UserError(
                f"token_causal_share is {self.token_causal_share}. Allowed: what block_causal_share ({self.block_causal_share}) leaves"
            )


@dataclass(frozen=True, slots=True)
class Noise(Group):
    left_to_right_share: float = option(
        0.0, "share of rows that are clean up to a block of 8, 16 or 32 and masked behind it", low=0.0, high=1.0
    )


@dataclass(frozen=True, slots=True)
class Options(FlatOptions):
    """What may differ from the published objective."""

    attention: Attention = field(default_factory=Attention)
    noise: Noise = field(default_factory=Noise)


def add_noise(batch: Batch, mask_id: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy tokens ``[B, T]``, what is masked in them ``[B, T]``, and each row's ratio ``p [B]``. The rows' ``t`` are spread evenly over (0, 1)."""
    rows, device = len(batch.tokens), batch.tokens.device
    shift = torch.rand(1, device=device, generator=generator)
    ratio = (1 - EPS) * ((shift + torch.arange(rows, device=device) / rows) % 1) + EPS
    drawn = torch.rand(batch.tokens.shape, device=device, generator=generator) < ratio[:, None]
    masked = batch.trained & drawn
    return batch.tokens.masked_fill(masked, mask_id), masked, ratio


def left_to_right(batch: Batch, masked: Tensor, ratio: Tensor, block_length: int, at: Tensor) -> tuple[Tensor, Tensor]:
    """What semi-autoregressive decoding sees: one block of each answer keeps the noise ``masked [B, T]`` of `add_noise`, all before it is clean and all
    behind it masked. ``at [B]`` in [0, 1) says which block of ``block_length``. Returns what is masked, and the weight of each loss ``[B, T]``: the block's
    masked tokens count by ``ratio`` and by the block's length, those behind it nothing."""
    first, stop = answers(batch.trained)
    block = block_of(first, masked.shape[1], block_length)
    blocks = (stop - first + block_length - 1).div(block_length, rounding_mode="floor")
    chosen = (at * blocks).long()[:, None]
    here, behind = batch.trained & (block == chosen), batch.trained & (block > chosen)
    weight = (here & masked) / (ratio * here.sum(1).clamp(min=1))[:, None]
    return (here & masked) | behind, weight


def predicting(values: Tensor, predicts_next: bool) -> Tensor:
    """``values [B, T]`` of tokens, each at the row of the logits that predicts the token. (The last row then has those of token 0, in the prompt.)"""
    return values.roll(-1, 1) if predicts_next else values


def positions(tokens: Tensor) -> Tensor:
    """``[B, T]``: 0, 1, ... in every row."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def token_losses(logits: Tensor, tokens: Tensor, predicts_next: bool) -> Tensor:
    """Cross-entropy ``[B, T]`` of each row of ``logits [B, T, V]`` with the token it predicts."""
    target = predicting(tokens, predicts_next)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def objective(model: nn.Module, mask_id: int, seed: int, options: Options) -> MaskedDiffusion:
    """For `shared.family.Training`."""
    return MaskedDiffusion(mask_id, seed, model.device, options.attention, options.noise)


class MaskedDiffusion:
    """The loss of one batch. In some of the batches the answers attend as D2F's drafts or its verifier do."""

    def __init__(
        self,
        mask_id: int,
        seed: int,
        device: torch.device,
        attention: Attention | None = None,
        noise: Noise | None = None,
    ):
        self.mask_id, self.attention, self.noise = mask_id, attention or Attention(), noise or Noise()
        self.random = Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy over ``p`` of the masked tokens, divided by the length of the answer, averaged over rows."""
        if self.random.random() < self.attention.token_causal_share:
            return self.token_causal_loss(model, batch)
        noisy, masked, ratio = add_noise(batch, self.mask_id, self.generator)
        weight = masked / (ratio * batch.trained.sum(1))[:, None]
        if self.noise.left_to_right_share > 0:
            masked, weight = self.some_left_to_right(batch, masked, ratio, weight)
            noisy = batch.tokens.masked_fill(masked, self.mask_id)
        logits = model(noisy, positions(noisy), None, self.draw_mask(batch))
        losses = token_losses(logits, batch.tokens, model.predicts_next)
        return (losses * predicting(weight, model.predicts_next)).sum() / len(noisy)

    def some_left_to_right(self, batch: Batch, masked: Tensor, ratio: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``masked`` and ``weight [B, T]``, those of `left_to_right` in a share of the rows."""
        drawn = torch.rand(2, len(masked), device=masked.device, generator=self.generator)
        there = left_to_right(batch, masked, ratio, self.random.choice(BLOCK_LENGTHS), drawn[1])
        rows = (drawn[0] < self.noise.left_to_right_share)[:, None]
        return torch.where(rows, there[0], masked), torch.where(rows, there[1], weight)

    def draw_mask(self, batch: Batch) -> Tensor:
        """``[B, T, T]``: both ways, or block-causal."""
        (first, stop), length = answers(batch.trained), batch.tokens.shape[1]
        if self.random.random() < self.attention.block_causal_share / (1 - self.attention.token_causal_share):
            return block_causal(first, length, self.random.choice(BLOCK_LENGTHS))
        return both_ways(stop, length)

    def token_causal_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the tokens of the answers, each from those before it."""
        seen = block_causal(answers(batch.trained)[0], batch.tokens.shape[1], 1)
        losses = token_losses(verifier_logits(model, batch, seen, self.mask_id), batch.tokens, model.predicts_next)
        return (losses * predicting(batch.trained, model.predicts_next)).sum() / batch.trained.sum()


def verifier_logits(model: nn.Module, batch: Batch, seen: Tensor, mask_id: int) -> Tensor:
    """``[B, T, V]`` at block size one over clean tokens that see ``seen [B, T, T]``: the rows of the clean tokens where they predict the next one, else of
    masks that stand where the answer does."""
    tokens, length = batch.tokens, batch.tokens.shape[1]
    if model.predicts_next:
        return model(tokens, positions(tokens), None, seen)
    layout = torch.cat([tokens.masked_fill(batch.trained, mask_id), tokens], 1)
    local = verify(seen, answers(batch.trained)[0])
    return model(layout, positions(tokens).repeat(1, 2), None, local, logits_at=slice(0, length))
