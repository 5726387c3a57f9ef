"""Log-probabilities of given text under a block-diffusion model at block size one, all in one forward (the layout of `masks.span_verify`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared import masks


@torch.inference_mode()
def block_size_one_scores(
    model, texts: Sequence[tuple[list[int], list[int]]], mask_id: int
) -> list[tuple[Tensor, Tensor]]:
    """For every ``(context, continuation)`` of token ids ``(log_probs [M], greedy [M])`` of its ``M`` continuation tokens.

    ``log_probs`` are those of block-size-one decoding: each token given all before it, the mask token ruled out; ``greedy``: is it the likeliest one?
    The forward is over [text | one mask query per continuation token]; texts are padded on the right, which nobody looks at.
    """
    ids = [context + continuation for context, continuation in texts]
    tokens, count = max(map(len, ids)), max(len(c) for _, c in texts)
    clean = torch.tensor([row + [mask_id] * (tokens - len(row)) for row in ids], device=model.device)
    first = torch.tensor([len(context) for context, _ in texts], device=model.device)
    queries = (first[:, None] + torch.arange(count, device=model.device)).clamp(max=tokens - 1)
    layout = torch.cat([clean, torch.full_like(queries, mask_id)], 1)
    positions = torch.cat([torch.arange(tokens, device=model.device).expand_as(clean), queries], 1)
    local = masks.span_verify(queries, tokens)
    logits = model(layout, positions, None, local, logits_at=slice(tokens, None))
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    logits[..., mask_id] = float("-inf")
    truth = clean.gather(1, queries)
    scores = logits.log_softmax(-1).gather(-1, truth[..., None])[..., 0]
    greedy = logits.argmax(-1) == truth
    return [(s[: len(c)], g[: len(c)]) for s, g, (_, c) in zip(scores, greedy, texts, strict=True)]
