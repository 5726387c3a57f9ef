"""D2F's objective: noise, layouts, loss, and that nothing is learned from a token that decoding would not show."""

from __future__ import annotations

import pytest
import torch

from tests.train.d2f_models import LENGTH, MASK, NAMES, batch, network
from train import answer_masks, distillation
from train.answer_masks import answers, block_of
from train.distillation import LEAST, MOST, Distillation, Options, in_flight_ratios, published_ratios, verifier_logits
from train.lora import Lora, adapt, adapted, optimizers
from train.masked_diffusion import positions

CPU = torch.device("cpu")


def student(name: str):
    """A network whose adapter says something."""
    model = network(name)
    adapt(model, Lora(lora_r=4), 0)
    for module in adapted(model).values():
        module.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return model


def test_published_noise_never_falls_and_never_passes_the_limit():
    blocks = torch.arange(1, 9).repeat(50)
    ratios = published_ratios(blocks, 8, torch.Generator().manual_seed(0))
    assert ratios.shape == (400, 8)
    assert ratios.min() >= LEAST
    assert ratios.max() <= MOST
    assert (ratios.diff() >= 0).all()
    assert ratios[:, 0].std() > 0.1, "U(0.2, 0.7) has 0.144"
    of_eight = ratios[blocks == 8]
    share = (of_eight[:, -1] - of_eight[:, 0]) / (MOST - of_eight[:, 0])
    assert share.mean().item() == pytest.approx(0.5, abs=0.1), "seven rises of half a seventh"


def test_noise_in_flight_rises_from_the_first_block_that_is_not_clean():
    clean = torch.tensor([0, 1, 3]).repeat(200)
    ratios = in_flight_ratios(clean, 4, 8, torch.Generator().manual_seed(0))
    ready = torch.arange(4) < clean[:, None]
    assert (ratios[ready] == 0).all()
    assert ratios[~ready].min() >= 1 / 8
    assert ratios.max() <= 1
    assert (ratios.diff() >= 0).all()
    first = ratios.gather(1, clean[:, None])
    assert first.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("block_length", [8, 16, 32])
def test_drafts_are_noisy_after_the_clean_blocks_alone(block_length):
    """Clean blocks lie ahead of noisy ones; what a row sees is one of the three layouts, and each of them is drawn."""
    given, loss, layouts = batch(), Distillation(MASK, 0, CPU), set()
    first, stop = answers(given.trained)
    block = block_of(first, LENGTH, block_length)
    for _ in range(60):
        noisy, masked, ratio, seen = loss.draw_draft(given, block_length)
        assert torch.equal(noisy == MASK, masked)
        assert not (masked & ~given.trained).any()
        assert (ratio[masked] > 0).all()
        clean = ((ratio == 0) & (block >= 0)).sum(1)
        assert (ratio.where(block >= 0, 0).diff() >= 0).all()
        assert (first + clean < stop).all(), "some block is in flight in every row"
        cut = first + clean
        options = {
            "block": answer_masks.block_causal(first, LENGTH, block_length),
            "token": answer_masks.cut(first, LENGTH, cut, 1, block_length),
        }
        found = {name for name, mask in options.items() if torch.equal(mask, seen)}
        assert found
        layouts |= found if len(found) == 1 else set()
    assert layouts == {"block", "token"}


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_sees_no_later_block(name):
    """Other tokens in later blocks change nothing; in earlier ones they do."""
    model, given, loss = student(name), batch(), Distillation(MASK, 0, CPU)
    for _ in range(6):
        noisy, _, _, seen = loss.draw_draft(given, 16)
        before = model(noisy, positions(noisy), None, seen)
        block = block_of(answers(given.trained)[0], LENGTH, 16)
        changed = model(((noisy + 1) % MASK).where(block >= 1, noisy), positions(noisy), None, seen)
        assert torch.equal(before[block < 1], changed[block < 1])
        assert not torch.allclose(before[block == 1], changed[block == 1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [1, 16])
def test_the_verifier_sees_no_token_it_predicts_nor_a_later_one(name, before):
    model, given = student(name), batch()
    first, _ = answers(given.trained)
    cached = torch.tensor([16, 32, 0])
    seen = answer_masks.cut(first, LENGTH, first + cached, before, 1)
    said = verifier_logits(model, given, seen, MASK)
    ends = (first + cached)[:, None]
    for ahead in (0, 3):  # the token at this place from the end of the cache, and all after it, become others
        at = ends + ahead
        tokens = ((given.tokens + 1) % MASK).where(positions(given.tokens) >= at, given.tokens)
        other = verifier_logits(model, type(given)(tokens, given.trained), seen, MASK)
        place = positions(given.tokens) + (name == "dream")  # of the token a row predicts
        learned = (place >= ends) & (place < LENGTH)
        same = learned & (place <= at)
        assert torch.allclose(said[same], other[same], atol=1e-5)
        assert not torch.allclose(said[learned & (place == at + 1)], other[learned & (place == at + 1)], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("self_align", [True, False])
def test_draft_loss_by_definition(name, self_align):
    """CE with the teacher, which sees all of the row, or with the tokens; by the ratio of the block, averaged over masked tokens."""
    model, plain, given = student(name), network(name), batch()
    got = Distillation(MASK, 5, CPU, self_align).draft_loss(model, given, 16)
    noisy, masked, ratio, seen = Distillation(MASK, 5, CPU).draw_draft(given, 16)
    shift, total = int(name == "dream"), 0.0
    said = model(noisy, positions(noisy), None, seen).log_softmax(-1)
    for row in range(3):
        stop = int(given.trained[row].nonzero().max()) + 1
        teacher = plain(noisy[row : row + 1, :stop], torch.arange(stop)[None])[0].softmax(-1)
        for t in masked[row].nonzero()[:, 0].tolist():
            wanted = teacher[t - shift] if self_align else torch.eye(teacher.shape[1])[given.tokens[row, t]]
            total -= (wanted * said[row, t - shift]).sum().item() / ratio[row, t].item()
    assert got.item() == pytest.approx(total / int(masked.sum()), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_verifier_loss_by_definition(monkeypatch, name):
    """With a token-causal cache: the tokens of the answer one by one, each given all before it and, for llada, a mask in its place."""
    monkeypatch.setattr(distillation, "BLOCK_CACHE_SHARE", 0.0)
    model, given, total = student(name), batch(), 0.0
    got = Distillation(MASK, 0, CPU).verifier_loss(model, given)
    for row in range(3):
        picked = given.trained[row].nonzero()[:, 0].tolist()
        for t in picked[:: len(picked) - 1]:  # the first and the last are enough beside the mean below
            ids = given.tokens[row : row + 1, :t]
            ids = ids if name == "dream" else torch.cat([ids, torch.tensor([[MASK]])], 1)
            seen = answer_masks.block_causal(torch.tensor([picked[0]]), ids.shape[1], 1)
            alone = model(ids, positions(ids), None, seen)[0, -1].log_softmax(-1)
            whole = verifier_logits(model, given, answer_masks.block_causal(answers(given.trained)[0], LENGTH, 1), MASK)
            assert torch.allclose(whole[row, t - (name == "dream")].log_softmax(-1), alone, atol=1e-5)
        said = whole[row].log_softmax(-1)
        total -= sum(said[t - (name == "dream"), given.tokens[row, t]].item() for t in picked)
    assert got.item() == pytest.approx(total / int(given.trained.sum()), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_learns_and_the_base_stays(name):
    """The teacher gives no gradient: with the student's own path cut, nothing asks for one."""
    model, given = network(name), batch()
    options = Options.from_flat({"lora_r": 4, "lr": 1e-2})
    adapt(model, options.lora, 0)
    loss = distillation.objective(model, MASK, 0, options)
    assert not loss.teach(model, given, given.tokens).requires_grad
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learned == {f"{n}.lora_{half}" for n in adapted(model) for half in "AB"}
    assert len(adapted(model)) == 8, "four in each of two layers"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps = optimizers(model, options.lora)
    for _ in range(3):
        for part in (loss.verifier_loss(model, given), loss.draft_loss(model, given, 16)):
            part.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if n not in learned)
        steps[0].step()
        steps[0].zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == learned


def test_block_lengths_are_drawn_by_weight():
    loss, drawn = Distillation(MASK, 0, CPU), []
    loss.verifier_loss = lambda *_: drawn.append(1)
    loss.draft_loss = lambda model, batch, block_length: drawn.append(block_length)
    for _ in range(2000):
        loss(None, None)
    for block_length, weight in {1: 0.3, 8: 0.2, 16: 0.3, 32: 0.2}.items():
        assert drawn.count(block_length) / 2000 == pytest.approx(weight, abs=0.05)
