"""Block diffusion with token editing, the objective of LLaDA2.1 (Bie et al. 2026): masked tokens are filled in, wrong ones repaired.

Some unmasked tokens of the noisy copy are wrong: drawn at random, or taken from the model's own drafts, as in decoding. Every trained
position carries loss, so the model learns which tokens to keep as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.balance import LoadBalance
from train.block_diffusion import BlockDiffusion, add_noise
from train.data import Batch
from train.loop import Objective

MOST_RANDOM = 0.15  # of a row's unmasked tokens: each row draws its share from U(0, MOST_RANDOM)
OWN_DRAFTS = 0.5  # of the batches


def objective(model: nn.Module, mask_id: int, seed: int) -> Objective:
    """For `shared.family.Training`; the load of the network's experts is kept even."""
    diffusion, balance = EditedBlockDiffusion(mask_id, seed, model.device), LoadBalance(model)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        balance.step()
        return diffusion(model, batch)

    return loss


class EditedBlockDiffusion(BlockDiffusion):
    """The loss of one batch. Blocks of one token, the verifier's mode, are all masks and leave nothing to edit."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy over all trained positions of the noisy copy, per position that is masked or wrong."""
        block_length, mask = self.draw(batch)
        noisy, masked = add_noise(batch, block_length, self.mask_id, self.generator)
        if block_length == 1:
            return self.loss(self.logits(model, batch, noisy, mask), batch.tokens, masked)
        if self.random.random() < OWN_DRAFTS:
            noisy = self.fill_in(model, batch, noisy, mask)
        noisy = self.corrupt(batch, noisy)
        total = self.loss(self.logits(model, batch, noisy, mask), batch.tokens, batch.trained, reduction="sum")
        return total / (noisy != batch.tokens).sum().clamp(min=1)

    def rand(self, *shape: int, like: Tensor) -> Tensor:
        return torch.rand(*shape, device=like.device, generator=self.generator)

    @torch.no_grad()
    def fill_in(self, model: nn.Module, batch: Batch, noisy: Tensor, mask: Tensor) -> Tensor:
        """``noisy [B, T]`` with a share of each row's masks, U(0, 1), replaced by tokens the model draws there."""
        logits = self.logits(model, batch, noisy, mask).float()
        logits[..., self.mask_id] = float("-inf")
        drawn = (logits - (-self.rand(*logits.shape, like=noisy).log()).log()).argmax(-1)
        share = self.rand(len(noisy), 1, like=noisy)
        filled = (noisy == self.mask_id) & (self.rand(*noisy.shape, like=noisy) < share)
        return torch.where(filled, drawn, noisy)

    def corrupt(self, batch: Batch, noisy: Tensor) -> Tensor:
        """``noisy [B, T]`` with some unmasked trained tokens replaced by any token below the mask's id."""
        share = MOST_RANDOM * self.rand(len(noisy), 1, like=noisy)
        wrong = batch.trained & (noisy != self.mask_id) & (self.rand(*noisy.shape, like=noisy) < share)
        drawn = (self.rand(*noisy.shape, like=noisy) * self.mask_id).long()
        return torch.where(wrong, drawn, noisy)
