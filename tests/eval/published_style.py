"""A decoder with the published signature and habits, to test ``--vs``: an HF-style forward, a growing cache, one text, 0/1 masks."""

from __future__ import annotations

import torch
from transformers import DynamicCache


@torch.no_grad()
def generate(model, input_ids, mask_id=255, gen_length=16, block_length=4, **kwargs):
    """Greedy block diffusion, the most confident token of the block at each step. Returns ids ``[1, P + N]`` in whole blocks."""
    prompt = input_ids.shape[1]
    total = -(-(prompt + gen_length) // block_length) * block_length
    x = torch.full((1, total), mask_id, dtype=torch.long, device=input_ids.device)
    x[:, :prompt] = input_ids
    place = torch.arange(total, device=x.device)
    mask = ((place[None, :] // block_length) <= (place[:, None] // block_length)).float()[None]
    cache, done = DynamicCache(), prompt // block_length * block_length
    if done:
        model(
            x[:, :done],
            attention_mask=mask[:, :done, :done],
            position_ids=place[None, :done],
            past_key_values=cache,
            use_cache=True,
            store_kv=True,
        )
    for start in range(done, total, block_length):
        span = slice(start, start + block_length)
        call = {
            "attention_mask": mask[:, span, : span.stop],
            "position_ids": place[None, span],
            "past_key_values": cache,
            "use_cache": True,
        }
        while (x[:, span] == mask_id).any():
            logits = model(x[:, span], **call, store_kv=False).logits
            confidence, token = logits.float().softmax(-1).max(-1)
            best = confidence.masked_fill(x[:, span] != mask_id, -1).argmax(-1)
            x[0, start + best] = token[0, best]
        model(x[:, span], **call, store_kv=True)
    return x
