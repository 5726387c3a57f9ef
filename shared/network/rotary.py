"""Rotary position embedding, half-split convention (Su et al. 2021, as laid out in GPT-NeoX and Qwen)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(position_ids: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each ``[B, 1, T, dim]``, for ``position_ids [B, T]``; angles in float32, then cast."""
    exponent = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim
    angle = position_ids.float()[:, None, :, None] * (theta**-exponent)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``d`` channels of ``x [B, H, T, D]``, ``d`` being the width of the tables; pairs are ``(i, i + d/2)``."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    half = width // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin
