"""The probe's editing loop on a scripted model."""

from __future__ import annotations

import torch

from train.probe import WIDTH, Canvas, decode_blocks, run_decoder

MASK, RIGHT, WRONG, STOP = 0, 1, 2, 3


class ChangesItsMind:
    """Sure of WRONG at a block's first position while all of the block is masked, of RIGHT afterwards; the last token of a block is STOP, and comes last."""

    def __call__(self, ids, positions, cache, mask, *, logits_at):
        block = ids[:, logits_at]
        fresh = (block == MASK).all(1)
        logits = torch.zeros(*block.shape, 4)
        logits[..., RIGHT] = 2.0
        logits[:, 0, WRONG] = torch.where(fresh, 9.0, 0.0)
        logits[:, 0, RIGHT] = torch.where(fresh, 0.0, 6.0)
        logits[:, -1, STOP] = 2.5
        logits[:, -1, RIGHT] = 2.2
        return logits


def decoded(decode) -> list[int]:
    """The first block of the answer; the prompt fills the block before it."""
    tokens = torch.full((1, WIDTH), MASK)
    tokens[0, :4] = WRONG
    canvas = Canvas(tokens, torch.tensor([4]), torch.zeros(1, dtype=torch.long), MASK, torch.tensor([STOP]))
    decode(canvas)
    assert (canvas.tokens[0, :4] == WRONG).all(), "the prompt is never edited"
    return canvas.tokens[0, 4:8].tolist()


def test_editing_repairs_a_token_the_model_no_longer_believes():
    model = ChangesItsMind()
    assert decoded(lambda c: decode_blocks(model, c, 4, None)) == [WRONG, RIGHT, RIGHT, STOP]
    assert decoded(lambda c: run_decoder(model, c, "edited 4 0.99 0.9")) == [RIGHT, RIGHT, RIGHT, STOP]
    assert decoded(lambda c: run_decoder(model, c, "edited 4 0.99 0.9999")) == [WRONG, RIGHT, RIGHT, STOP]
    assert decoded(lambda c: run_decoder(model, c, "dynamic 4 0.99")) == [WRONG, RIGHT, RIGHT, STOP]
