"""The objective of LLaDA2: what is corrupted, what carries loss, and how expert load is evened out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from train.balance import RATE, LoadBalance
from train.block_diffusion import BlockDiffusion, add_noise
from train.data import Batch
from train.editing import MOST_RANDOM, EditedBlockDiffusion
from train.optim import Muon, optimizers

MASK = 30


def small_model() -> LLaDA2MoeModelLM:
    torch.manual_seed(0)
    return LLaDA2MoeModelLM(
        LLaDA2MoeConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, use_bias=False, num_experts=8, num_experts_per_tok=2, num_shared_experts=1,
            moe_intermediate_size=8, first_k_dense_replace=1, n_group=4, topk_group=2, mask_token_id=MASK,
        )
    )  # fmt: skip


def batch_of(rows: int = 64, length: int = 64, first: int = 11) -> Batch:
    tokens = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, torch.arange(length).expand(rows, -1) >= first)


def objective() -> EditedBlockDiffusion:
    return EditedBlockDiffusion(MASK, 0, torch.device("cpu"))


def test_corruption_spares_prompt_and_masks():
    batch, edited = batch_of(), objective()
    noisy, masked = add_noise(batch, 16, MASK, edited.generator)
    wrong = edited.corrupt(batch, noisy)
    changed = wrong != noisy
    assert not (changed & (masked | ~batch.trained)).any()
    assert (wrong[masked] == MASK).all()
    assert (wrong[~masked] != MASK).all()
    # A row's share is U(0, .15), and one draw in thirty hits the right token: .0725 on average.
    share = changed.sum() / (batch.trained & ~masked).sum()
    assert share == pytest.approx(MOST_RANDOM / 2 * 29 / 30, abs=0.015)


def test_own_drafts_follow_the_model():
    """A model that is sure of token 7 fills a share of the masks with it, and changes nothing else."""
    batch, edited = batch_of(), objective()
    noisy, masked = add_noise(batch, 16, MASK, edited.generator)
    sure = lambda ids, *_, logits_at: 30.0 * F.one_hot(torch.full(ids[:, logits_at].shape, 7), 32)  # noqa: E731
    filled = edited.fill_in(sure, batch, noisy, torch.ones(128, 128, dtype=torch.bool))
    changed = filled != noisy
    assert not (changed & ~masked).any()
    assert (filled[changed] == 7).all()
    assert changed.sum() / masked.sum() == pytest.approx(0.5, abs=0.1)


def test_the_mask_token_is_never_drafted():
    batch, edited = batch_of(), objective()
    noisy = torch.full_like(batch.tokens, MASK)
    loves_masks = lambda ids, *_, logits_at: 30.0 * F.one_hot(torch.full(ids[:, logits_at].shape, MASK), 32)  # noqa: E731
    filled = edited.fill_in(loves_masks, batch, noisy, torch.ones(128, 128, dtype=torch.bool))
    assert filled[filled != MASK].unique().numel() > 20, "all others are equally likely"


def test_blocks_of_one_are_plain_block_diffusion(monkeypatch):
    monkeypatch.setattr("train.block_diffusion.BLOCK_WEIGHTS", {1: 1.0})
    model, batch = small_model(), batch_of(rows=2)
    losses = [kind(MASK, 0, torch.device("cpu"))(model, batch) for kind in (BlockDiffusion, EditedBlockDiffusion)]
    assert torch.equal(*losses)


def test_a_few_steps_learn_to_keep_and_to_repair():
    """Texts that repeat one token: a model trained for 80 steps copies it over a mask and over a wrong token."""
    model = small_model()
    tokens = torch.randint(0, MASK, (32, 1), generator=torch.Generator().manual_seed(2)).expand(-1, 64)
    batch, edited, balance = Batch(tokens, torch.arange(64).expand(32, -1) >= 8), objective(), LoadBalance(model)
    steppers = optimizers(model)
    for _ in range(80):
        balance.step()
        edited(model, batch).backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
    noisy = tokens.clone()
    noisy[:, 40], noisy[:, 50] = MASK, (tokens[:, 50] + 5) % MASK
    said = model(noisy, torch.arange(64).expand(32, -1)).argmax(-1)
    for place in (40, 45, 50):
        assert (said[:, place] == tokens[:, place]).float().mean() > 0.9, place


def test_balance_moves_biases_against_the_load():
    model = small_model()
    balance, router = LoadBalance(model), model.model.layers[1].mlp.gate
    with torch.no_grad():
        router.expert_bias[:] = torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0])  # everyone goes to the first group
        before = router.expert_bias.clone()
        model(torch.arange(8)[None], torch.arange(8)[None])
    assert balance.loads[0].sum() == 0, "forwards without gradients are not training"
    model(torch.arange(8)[None], torch.arange(8)[None])
    assert balance.loads[0].tolist() == [8, 8, 0, 0, 0, 0, 0, 0]
    balance.step()
    want = RATE * torch.tensor([-1.0, -1, 1, 1, 1, 1, 1, 1])
    assert torch.allclose(router.expert_bias - before, want, atol=1e-5)
    assert balance.loads[0].sum() == 0


def test_muon_treats_a_stack_as_its_matrices():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(3, 8, 6, generator=generator)
    stack, single = torch.nn.Parameter(torch.zeros(3, 8, 6)), [torch.nn.Parameter(torch.zeros(8, 6)) for _ in range(3)]
    stack.grad = gradient
    for parameter, part in zip(single, gradient, strict=True):
        parameter.grad = part
    Muon([stack]).step()
    Muon(single).step()
    assert torch.allclose(stack, torch.stack(single), atol=1e-6)


def test_routers_are_left_to_adam():
    model = small_model()
    muon, adam = ({id(p) for group in o.param_groups for p in group["params"]} for o in optimizers(model))
    block = model.model.layers[1].mlp
    assert id(block.experts.gate_proj) in muon
    assert id(block.gate.weight) in adam - muon
    assert len(muon) + len(adam) == len(list(model.parameters()))
