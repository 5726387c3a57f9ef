"""One attention function, several backends behind it.

``attend(q, k, v, mask)`` with a bool mask (True = may attend), an additive float mask, or none. Grouped-query heads are
handled here. ``sdpa`` runs everywhere; ``reference`` is the definition, in float32, and the only one that adds float masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from shared.errors import unknown_name


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention. Float masks are refused: some of its kernels drop or reinterpret them."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError("the sdpa backend takes bool masks; additive masks need backend='reference'")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) v, every step in float32."""
    grouped = rearrange(q.float(), "b (kv g) t d -> b kv g t d", kv=k.shape[1])
    scores = einsum(grouped, k.float(), "b kv g t d, b kv s d -> b kv g t s") * scale
    if mask is not None:
        mask = mask[:, :, None]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    out = einsum(scores.softmax(-1), v.float(), "b kv g t s, b kv s d -> b kv g t d")
    return rearrange(out, "b kv g t d -> b (kv g) t d").to(q.dtype)


BACKENDS = {"sdpa": attend_sdpa, "reference": attend_reference}


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None, backend: str = "sdpa"
) -> Tensor:
    """Attention of ``q [B, H, T, D]`` over ``k, v [B, H_kv, S, D]`` -> ``[B, H, T, D]``.

    ``mask``, ``[T, S]``, ``[B, T, S]`` or what broadcasts to ``[B, 1, T, S]``, is bool (True = may attend), additive float (reference backend), or
    None (all see all).
    ``scale`` defaults to ``D ** -0.5``.
    """
    if backend not in BACKENDS:
        raise unknown_name("attention backend", backend, BACKENDS)
    if mask is not None and mask.dim() < 4:
        mask = mask[None, None] if mask.dim() == 2 else mask[:, None]
    return BACKENDS[backend](q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
