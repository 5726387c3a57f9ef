"""Log-probabilities of given text under a block-diffusion model at block size one, all in one forward.

`block_size_one_scores` is for networks that predict the token at its own position, by the layout of `masks.span_verify`; `next_token_scores` for those that
predict the token after it, whose block size one is a causal forward. `whole_prompt_scores` is for those that see a prompt whole: tokens of a context see all
of it, whichever of the two ways they predict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.network import masks

Texts = Sequence[tuple[list[int], list[int]]]


@torch.inference_mode()
def block_size_one_scores(
    model, texts: Texts, mask_id: int, *, whole_context: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """For every ``(context, continuation)`` of token ids ``(log_probs [M], greedy [M])`` of its ``M`` continuation tokens.

    ``log_probs`` are those of block-size-one decoding: each token given all before it, the mask token ruled out; ``greedy``: is it the likeliest one?
    The forward is over [text | one mask query per continuation token]; texts are padded on the right, which nobody looks at. ``whole_context``: tokens of a
    context see all of it, not only what came before.
    """
    ids = [context + continuation for context, continuation in texts]
    tokens, count = max(map(len, ids)), max(len(c) for _, c in texts)
    clean = torch.tensor([row + [mask_id] * (tokens - len(row)) for row in ids], device=model.device)
    first = torch.tensor([len(context) for context, _ in texts], device=model.device)
    queries = (first[:, None] + torch.arange(count, device=model.device)).clamp(max=tokens - 1)
    layout = torch.cat([clean, torch.full_like(queries, mask_id)], 1)
    positions = torch.cat([torch.arange(tokens, device=model.device).expand_as(clean), queries], 1)
    local = masks.span_verify(queries, tokens)
    if whole_context:
        local = local | _inside(first, local.shape[-1])
    logits = model(layout, positions, None, local, logits_at=slice(tokens, None))
    return _scores(logits, clean.gather(1, queries), mask_id, texts)


@torch.inference_mode()
def next_token_scores(model, texts: Texts, mask_id: int, *, whole_context: bool = False) -> list[tuple[Tensor, Tensor]]:
    """The same for a network whose row ``t`` predicts the token at ``t + 1``. No context may be empty: nothing predicts the first token."""
    ids = [context + continuation for context, continuation in texts]
    tokens, count = max(map(len, ids)), max(len(c) for _, c in texts)
    clean = torch.tensor([row + [mask_id] * (tokens - len(row)) for row in ids], device=model.device)
    first = torch.tensor([len(context) for context, _ in texts], device=model.device)
    at = (first[:, None] + torch.arange(count, device=model.device)).clamp(max=tokens - 1)
    positions = torch.arange(tokens, device=model.device).expand_as(clean)
    local = masks.token_causal(tokens, model.device)
    if whole_context:
        local = local | _inside(first, tokens)
    logits = model(clean, positions, None, local, logits_at=at - 1)
    return _scores(logits, clean.gather(1, at), mask_id, texts)


def whole_prompt_scores(model, texts: Texts, mask_id: int) -> list[tuple[Tensor, Tensor]]:
    """The same where a prompt is encoded as one block (LLaDA, Dream, D2F), whichever token a row of ``model`` predicts (``predicts_next``)."""
    scores = next_token_scores if model.predicts_next else block_size_one_scores
    return scores(model, texts, mask_id, whole_context=True)


def _inside(first: Tensor, length: int) -> Tensor:
    """``[B, length, length]``: both before ``first [B]``."""
    before = torch.arange(length, device=first.device) < first[:, None]
    return before[:, None] & before[:, :, None]


def _scores(logits: Tensor, truth: Tensor, mask_id: int, texts) -> list[tuple[Tensor, Tensor]]:
    """``(log_probs [M], greedy [M])`` of every text from ``logits [B, K, V]`` of the tokens ``truth [B, K]``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits[..., mask_id] = float("-inf")
    scores = logits.log_softmax(-1).gather(-1, truth[..., None])[..., 0]
    greedy = logits.argmax(-1) == truth
    return [(s[: len(c)], g[: len(c)]) for s, g, (_, c) in zip(scores, greedy, texts, strict=True)]
