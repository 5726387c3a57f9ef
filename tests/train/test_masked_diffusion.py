"""LLaDA's objective: its noise, its loss against the definition token by token, and what the network sees."""

from __future__ import annotations

import pytest
import torch

from shared.network.scoring import whole_prompt_scores
from tests.train.d2f_models import LENGTH, MASK, NAMES, batch, network
from train import answer_masks
from train.data import Batch
from train.masked_diffusion import EPS, MaskedDiffusion, Options, add_noise, objective


def test_noise_is_spread_evenly_and_spares_the_prompt():
    tokens = torch.randint(0, MASK, (100, 400), generator=torch.Generator().manual_seed(1))
    given = Batch(tokens, (torch.arange(400) >= 50).expand(100, -1))
    noisy, masked, ratio = add_noise(given, MASK, torch.Generator().manual_seed(0))
    assert torch.equal(noisy == MASK, masked)
    assert torch.equal(noisy[~masked], tokens[~masked])
    assert not masked[:, :50].any()
    steps = ratio.sort().values.diff()
    assert steps.min() > 0.9 * (1 - EPS) / 100, "low discrepancy: one in every hundredth"
    assert ratio.min() >= EPS
    assert (masked[:, 50:].float().mean(1) - ratio).abs().max() < 0.1, "four deviations of 350 draws"


@pytest.mark.parametrize("name", NAMES)
def test_loss_by_definition(name):
    """For each row: -log p(token) / p over its masked tokens, by the length of the answer; Dream reads the row before."""
    model, given, loss = network(name), batch(), MaskedDiffusion(MASK, 3, torch.device("cpu"))
    got = loss(model, given)
    noisy, masked, ratio = add_noise(given, MASK, torch.Generator().manual_seed(3))
    rows = []
    for row in range(3):
        stop = int(given.trained[row].nonzero().max()) + 1
        logits = model(noisy[row : row + 1, :stop], torch.arange(stop)[None])[0].log_softmax(-1)
        picked = masked[row].nonzero()[:, 0].tolist()
        said = [logits[t - (name == "dream"), given.tokens[row, t]] for t in picked]
        rows.append(-sum(said) / ratio[row] / given.trained[row].sum())
    assert got.item() == pytest.approx((sum(rows) / 3).item(), rel=1e-5)


def test_share_of_block_causal_batches():
    model, (first, stop) = network("llada"), answer_masks.answers(batch().trained)
    whole = answer_masks.both_ways(stop, LENGTH)
    blocks = [answer_masks.block_causal(first, LENGTH, b) for b in (8, 16, 32)]
    drawn = [objective(model, MASK, 0, Options()).draw_mask(batch()) for _ in range(8)]
    assert all(torch.equal(mask, whole) for mask in drawn)
    always = objective(model, MASK, 0, Options.from_flat({"block_causal_share": 1.0}))
    drawn = [always.draw_mask(batch()) for _ in range(20)]
    found = [[torch.equal(mask, b) for b in blocks] for mask in drawn]
    assert all(sum(row) == 1 for row in found)
    assert all(any(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_token_causal_batches_learn_each_token_from_those_before_it(name):
    model, given = network(name), batch()
    always = objective(model, MASK, 0, Options.from_flat({"token_causal_share": 1.0}))
    said = []
    for row in range(3):
        ids = given.tokens[row].tolist()
        first = int(given.trained[row].nonzero().min())
        stop = int(given.trained[row].nonzero().max()) + 1
        ((scores, _),) = whole_prompt_scores(model, [(ids[:first], ids[first:stop])], MASK)
        said += scores.tolist()
    assert always(model, given).item() == pytest.approx(-sum(said) / len(said), rel=0.05)
