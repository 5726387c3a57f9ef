"""The objective of SDAR: who sees whom, what is noised, what carries loss."""

from __future__ import annotations

import pytest
import torch

from sdar import SDARConfig, SDARForCausalLM
from shared.network.masks import block_causal, token_causal
from train.block_diffusion import BLOCK_WEIGHTS, BlockDiffusion, add_noise, two_copy_train
from train.data import Batch

MASK = 30


def _model() -> SDARForCausalLM:
    torch.manual_seed(0)
    return SDARForCausalLM(
        SDARConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            mask_token_id=MASK,
        )
    )


def _batch(rows: int = 3, length: int = 64, first: int = 11) -> Batch:
    tokens = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(1))
    trained = torch.arange(length).expand(rows, -1) >= first
    return Batch(tokens, trained)


def test_mask_by_hand():
    """Four tokens in blocks of two: rows and columns are noisy 0-3, then clean 0-3."""
    want = [
        "11000000",
        "11000000",
        "00111100",
        "00111100",
        "00001100",
        "00001100",
        "00001111",
        "00001111",
    ]
    assert ["".join("01"[bool(v)] for v in row) for row in two_copy_train(4, 2, False)] == want
    causal = ["00001000", "00001100", "00001110", "00001111"]
    assert ["".join("01"[bool(v)] for v in row) for row in two_copy_train(4, 2, True)] == want[:4] + causal


@pytest.mark.parametrize("block_length", list(BLOCK_WEIGHTS))
@pytest.mark.parametrize("causal_clean", [False, True])
def test_clean_never_sees_noisy(block_length, causal_clean):
    mask = two_copy_train(64, block_length, causal_clean)
    assert not mask[64:, :64].any()
    assert mask.any(1).all()


@pytest.mark.parametrize("block_length", [1, 4, 16, 32])
def test_noise_only_where_trained(block_length):
    batch = _batch()
    noisy, masked = add_noise(batch, block_length, MASK, torch.Generator().manual_seed(0))
    assert not (masked & ~batch.trained).any()
    assert (noisy[masked] == MASK).all()
    assert torch.equal(noisy[~masked], batch.tokens[~masked])
    if block_length == 1:
        assert torch.equal(masked, batch.trained)


def test_noise_ratio_is_uniform_per_block():
    """With ratios from U(1/16, 1) a block of 16 has about 8.5 masks, and full and nearly empty blocks both occur."""
    batch = _batch(rows=2000, length=16, first=0)
    _, masked = add_noise(batch, 16, MASK, torch.Generator().manual_seed(0))
    counts = masked.sum(1)
    assert 8.2 < counts.float().mean() < 8.8
    assert (counts == 16).float().mean() > 0.03
    assert (counts <= 2).float().mean() > 0.05


@pytest.mark.parametrize(("block_length", "causal_clean"), [(1, True), (8, False), (8, True), (16, False)])
def test_noisy_logits_are_those_of_decoding(block_length, causal_clean):
    """Each noisy block gets the logits it would get in a forward over [clean earlier tokens | noisy block]."""
    model, batch, length = _model(), _batch(), 64
    noisy, _ = add_noise(batch, block_length, MASK, torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(2).expand(3, -1)
    mask = two_copy_train(length, block_length, causal_clean)
    both = torch.cat([noisy, batch.tokens], 1)
    got = model(both, positions, None, mask, logits_at=slice(0, length))
    for start in range(0, length, block_length):
        end = start + block_length
        canvas = torch.cat([batch.tokens[:, :start], noisy[:, start:end]], 1)
        local = token_causal(end) if causal_clean else block_causal(end, block_length)
        local[start:] = True
        want = model(canvas, torch.arange(end).expand(3, -1), None, local, logits_at=slice(start, end))
        torch.testing.assert_close(got[:, start:end], want, atol=1e-5, rtol=1e-4)


def test_loss_ignores_what_is_not_trained():
    """Tokens after the trained part change nothing: no block that carries loss sees them."""
    model, batch = _model(), _batch()
    trained = batch.trained & (torch.arange(64) < 32)
    other = torch.where(torch.arange(64) < 32, batch.tokens, (batch.tokens + 1) % MASK)
    losses = []
    for tokens in (batch.tokens, other):
        torch.manual_seed(0)
        objective = BlockDiffusion(MASK, seed=3, device=torch.device("cpu"))
        losses.append([objective(model, Batch(tokens, trained)).item() for _ in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_same_seed_same_loss():
    model, batch = _model(), _batch()
    losses = [BlockDiffusion(MASK, 5, torch.device("cpu"))(model, batch).item() for _ in range(2)]
    assert losses[0] == losses[1]
