"""Prompts as lists of token ids, whatever shape they arrive in."""

from __future__ import annotations

import torch

from shared.errors import UserError


def as_prompts(input_ids, attention_mask=None) -> list[list[int]]:
    """``[P]`` or ``[B, P]`` ids (tensor or list), or a list of id lists of any lengths -> one list of ids per prompt.

    ``attention_mask [B, P]`` (1 = token, 0 = padding) removes padding on either side.
    """
    rows = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    if rows and not isinstance(rows[0], (list, tuple, torch.Tensor)):
        rows = [rows]
    rows = [r.tolist() if isinstance(r, torch.Tensor) else list(r) for r in rows]
    if attention_mask is None:
        return rows
    keep = attention_mask.tolist() if isinstance(attention_mask, torch.Tensor) else list(attention_mask)
    keep = keep if keep and isinstance(keep[0], (list, tuple)) else [keep]
    if [len(k) for k in keep] != [len(r) for r in rows]:
        raise UserError("attention_mask has another shape than input_ids")
    return [[t for t, here in zip(r, k, strict=True) if here] for r, k in zip(rows, keep, strict=True)]
