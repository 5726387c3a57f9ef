"""Rotary position embedding, half-split convention (Su et al. 2021, as laid out in GPT-NeoX and Qwen), with scaled frequencies."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def scaling_kind(rope_scaling: dict | None) -> str:
    """The ``rope_type`` of a config's ``rope_scaling``, ``type`` in old ones; ``default`` where nothing is scaled."""
    return rope_scaling.get("rope_type", rope_scaling.get("type")) if rope_scaling else "default"


class Rotary:
    """``Rotary.of(config).tables(position_ids, dtype)``: cos and sin of the first ``dim`` channels of every head.

    ``scaled``: a config whose ``rope_scaling`` is not the default (None: plain frequencies ``theta ** (-2i / dim)``). ``full_precision``: tables, and
    with them the rotation, are at least float32 whatever the dtype of the model, as LLaDA does it.
    """

    def __init__(self, dim: int, theta: float, *, scaled=None, full_precision: bool = False):
        self.dim, self.theta, self.scaled, self.full_precision = dim, theta, scaled, full_precision
        self._known: dict[torch.device, tuple[Tensor, float]] = {}

    @classmethod
    def of(cls, config) -> Rotary:
        """Reads ``head_dim, rope_theta, rope_scaling``, and ``partial_rotary_factor`` and ``rope_full_precision`` where the config has them."""
        dim = int(config.head_dim * getattr(config, "partial_rotary_factor", 1.0))
        scaled = None if scaling_kind(config.rope_scaling) == "default" else config
        full_precision = getattr(config, "rope_full_precision", False)
        return cls(dim, config.rope_theta, scaled=scaled, full_precision=full_precision)

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Radians per position ``[dim / 2]``, float32, and the factor of cos and sin (yarn's attention factor, else 1)."""
        if device not in self._known:
            # Made on first use: a model is built on ``meta``. Kept out of inference mode, because training may follow.
            with torch.inference_mode(False), torch.device(device):
                self._known[device] = self._frequencies(device)
        return self._known[device]

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        if self.scaled is not None:
            return ROPE_INIT_FUNCTIONS[scaling_kind(self.scaled.rope_scaling)](self.scaled, device)
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        return self.theta**-exponent, 1.0

    def tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each ``[B, 1, T, dim]``, for ``position_ids [B, T]``; computed in float32, then cast."""
        frequency, factor = self.frequencies(position_ids.device)
        angle = position_ids.float()[:, None, :, None] * frequency
        angle = torch.cat([angle, angle], dim=-1)
        dtype = torch.promote_types(dtype, torch.float32) if self.full_precision else dtype
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``d`` channels of ``x [B, H, T, D]``, ``d`` being the width of the tables; pairs are ``(i, i + d/2)``.

    Computed in the wider dtype of ``x`` and the tables, returned in that of ``x``.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    half = width // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
