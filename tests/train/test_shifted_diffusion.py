"""The objective of Fast-dLLM v2: complementary masks, shifted targets, and what each half may see."""

from __future__ import annotations

import pytest
import torch

from fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from train.block_diffusion import IGNORED
from train.data import Batch
from train.shifted_diffusion import BLOCK_WEIGHTS, ShiftedDiffusion, complementary_noise, mean_loss, next_token_targets

MASK = 30


def _batch(rows: int = 3, length: int = 64, first: int = 11) -> Batch:
    tokens = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, torch.arange(length).expand(rows, -1) >= first)


@pytest.mark.parametrize("block_length", list(BLOCK_WEIGHTS))
def test_two_copies_mask_every_token_once(block_length):
    """All trained tokens but the first of each block are masked in exactly one of the two copies."""
    batch = _batch()
    noisy, masked = complementary_noise(batch, block_length, MASK, torch.Generator().manual_seed(0))
    one, other = masked.chunk(2)
    assert not (one & other).any()
    assert torch.equal(one | other, batch.trained & (torch.arange(64) % block_length != 0))
    assert (noisy[masked] == MASK).all()
    assert torch.equal(noisy[~masked], batch.tokens.repeat(2, 1)[~masked])


def test_targets_are_the_next_token():
    tokens = torch.tensor([[5, 6, 7, 8]])
    wanted = torch.tensor([[True, False, True, True]])
    assert next_token_targets(tokens, wanted).tolist() == [[IGNORED, 7, 8, IGNORED]]


class _Cheat(torch.nn.Module):
    """Predicts the next token from whatever it may look at, and fails where it may not look: the loss shows what leaks."""

    def forward(self, ids, positions, cache, seen):
        length = ids.shape[1]
        same_place = positions[0][None, :] == positions[0][:, None] + 1
        shown = torch.zeros(len(ids), length, MASK + 1)
        for row in range(length):
            for k in (same_place[row] & seen[row]).nonzero()[:, 0].tolist():
                known = ids[:, k] != MASK
                shown[known, row, ids[known, k]] = 50.0
        return shown


def test_no_target_is_in_sight():
    """A model that copies the next token wherever the mask lets it see one does no better than chance."""
    objective = ShiftedDiffusion(MASK, seed=3, device=torch.device("cpu"))
    for _ in range(6):
        loss = objective(_Cheat(), _batch(rows=1))
        assert loss.item() == pytest.approx(2 * torch.tensor(MASK + 1.0).log().item(), rel=1e-5)


def test_nothing_to_learn_is_no_loss():
    """An answer inside one block leaves a block-causal clean half without targets; that is 0, not a division by zero."""
    logits, tokens = torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.long)
    assert mean_loss(logits, tokens, torch.zeros(1, 4, dtype=torch.bool)) == 0


def test_same_seed_same_loss():
    torch.manual_seed(0)
    config = Fast_dLLM_QwenConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model, batch = Fast_dLLM_QwenForCausalLM(config), _batch()
    losses = [ShiftedDiffusion(MASK, 5, torch.device("cpu"))(model, batch).item() for _ in range(2)]
    assert losses[0] == losses[1]
