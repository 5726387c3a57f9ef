"""Asymmetric distillation, the objective of D2F (Wang et al. 2025): a network that sees everything teaches the same network with an adapter, whose answers
attend block-causally. Blocks are counted from the end of the prompt.

A batch draws its block length B. With B > 1 some answers are noisy from the start, as published. In the others the blocks before a random one are clean,
as those are that a decode has cached, and the rest is in flight. With B = 1 the student learns to be the verifier: the token at every place from the tokens
before it. See train/README.md for the shares and for what differs from the publication.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor, nn

from shared.options import FlatOptions, Group, option
from train import answer_masks
from train.answer_masks import answers, block_of
from train.data import Batch
from train.lora import Lora, adapter_off
from train.masked_diffusion import positions, predicting, token_losses, verifier_logits

BLOCK_WEIGHTS = {1: 0.3, 8: 0.2, 16: 0.3, 32: 0.2}
LEAST, MOST = 0.2, 0.7  # of the published noise
PUBLISHED_SHARE = 0.3  # of the batches with B > 1
CAUSAL_SHARE = 0.5  # of the others: clean blocks attend token-causally, as `cache_ver` caches them
BLOCK_CACHE_SHARE = 0.25  # of the batches with B = 1: the cache is block-causal up to a random place


@dataclass(frozen=True, slots=True)
class Loss(Group):
    self_align: bool = option(True, "learn what the teacher says of masked tokens; false: the tokens themselves")


@dataclass(frozen=True, slots=True)
class Options(FlatOptions):
    """The objective's, and those of the adapter it trains."""

    loss: Loss = field(default_factory=Loss)
    lora: Lora = field(default_factory=Lora)


def published_ratios(blocks: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """``[B, most]``: how much of each block is masked, for rows of ``blocks [B]`` blocks. It never falls from block to block and never passes `MOST`."""
    draw = torch.rand(len(blocks), most, device=blocks.device, generator=generator)
    first = LEAST + (MOST - LEAST) * draw[:, :1]
    rises = draw[:, 1:] * (MOST - first) / (blocks[:, None] - 1).clamp(min=1)
    return torch.cat([first, first + rises.cumsum(1)], 1).clamp(max=MOST)


def in_flight_ratios(clean: Tensor, most: int, block_length: int, generator: torch.Generator) -> Tensor:
    """``[B, most]``: 0 in the first ``clean [B]`` blocks of a row. The next has a ratio of U(0, 1), at least one token's, and each after it goes a random
    part of the way from there to 1."""
    draw = torch.rand(len(clean), most, device=clean.device, generator=generator)
    ready = torch.arange(most, device=clean.device) < clean[:, None]
    ratio = 1 - draw.masked_fill(ready, 1.0).cumprod(1)
    return ratio.clamp(min=1 / block_length).masked_fill(ready, 0.0)


def objective(model: nn.Module, mask_id: int, seed: int, options: Options) -> Distillation:
    """For `shared.family.Training`; the model has its adapter (`train.lora.adapt`)."""
    return Distillation(mask_id, seed, model.device, options.loss.self_align)


class Distillation:
    """The loss of one batch: a block length and a layout are drawn, the rest follows."""

    def __init__(self, mask_id: int, seed: int, device: torch.device, self_align: bool = True):
        self.mask_id, self.self_align = mask_id, self_align
        self.random = Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        block_length = self.random.choices(list(BLOCK_WEIGHTS), list(BLOCK_WEIGHTS.values()))[0]
        return self.verifier_loss(model, batch) if block_length == 1 else self.draft_loss(model, batch, block_length)

    def draft_loss(self, model: nn.Module, batch: Batch, block_length: int) -> Tensor:
        """Cross-entropy with the teacher over the ratio of the token's block, averaged over the masked tokens."""
        noisy, masked, ratio, seen = self.draw_draft(batch, block_length)
        logits = model(noisy, positions(noisy), None, seen)
        if self.self_align:
            losses = -(self.teach(model, batch, noisy) * logits.float().log_softmax(-1)).sum(-1)
        else:
            losses = token_losses(logits, batch.tokens, model.predicts_next)
        weight = torch.where(masked, 1 / ratio, 0.0)
        return (losses * predicting(weight, model.predicts_next)).sum() / masked.sum().clamp(min=1)

    def draw_draft(self, batch: Batch, block_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy tokens, what is masked in them, the ratio of each token's block, all ``[B, T]``, and what the student sees ``[B, T, T]``."""
        (first, stop), length = answers(batch.trained), batch.tokens.shape[1]
        blocks, most = (stop - first + block_length - 1) // block_length, -(-length // block_length)
        if self.random.random() < PUBLISHED_SHARE:
            ratios = published_ratios(blocks, most, self.generator)
            seen = answer_masks.block_causal(first, length, block_length)
        else:
            clean = self.some_of(blocks)
            ratios = in_flight_ratios(clean, most, block_length, self.generator)
            before = 1 if self.random.random() < CAUSAL_SHARE else block_length
            seen = answer_masks.cut(first, length, first + clean * block_length, before, block_length)
        ratio = ratios.gather(1, block_of(first, length, block_length).clamp(min=0))
        drawn = torch.rand(batch.tokens.shape, device=ratio.device, generator=self.generator)
        masked = batch.trained & (drawn < ratio)
        return batch.tokens.masked_fill(masked, self.mask_id), masked, ratio, seen

    def some_of(self, blocks: Tensor) -> Tensor:
        """``[B]``: of each row's ``blocks [B]`` any number but all."""
        return (torch.rand(len(blocks), device=blocks.device, generator=self.generator) * blocks).long()

    @torch.no_grad()
    def teach(self, model: nn.Module, batch: Batch, noisy: Tensor) -> Tensor:
        """``[B, T, V]``: the probabilities of the base, which sees all of ``noisy [B, T]``."""
        seen = answer_masks.both_ways(answers(batch.trained)[1], noisy.shape[1])
        with adapter_off(model):
            return model(noisy, positions(noisy), None, seen).float().softmax(-1)

    def verifier_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy with the tokens of the answer, from the place on where the cache ends."""
        (first, stop), length = answers(batch.trained), batch.tokens.shape[1]
        before, cached = 1, torch.zeros_like(first)
        if self.random.random() < BLOCK_CACHE_SHARE:
            before = self.random.choice([b for b in BLOCK_WEIGHTS if b > 1])
            cached = before * self.some_of((stop - first + before - 1) // before)
        seen = answer_masks.cut(first, length, first + cached, before, 1)
        learned = batch.trained & (positions(batch.tokens) >= (first + cached)[:, None])
        logits = verifier_logits(model, batch, seen, self.mask_id)
        losses = token_losses(logits, batch.tokens, model.predicts_next)
        return (losses * predicting(learned, model.predicts_next)).sum() / learned.sum()
