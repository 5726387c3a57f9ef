"""The attention training uses on a GPU: a fused kernel that takes the two-copy mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.network.attention import BACKENDS

REPEATED = "sdpa_repeated"


def attend_repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA over repeated key-value heads: with a mask, ``enable_gqa`` would fall back to the slow kernel."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=scale)


@contextmanager
def fused_attention(model) -> Iterator[None]:
    """Within it, a model on a GPU uses `attend_repeated` and the memory-efficient kernel; elsewhere nothing changes."""
    if model.device.type != "cuda":
        yield
        return
    before, model.backend = model.backend, REPEATED
    BACKENDS[REPEATED] = attend_repeated
    try:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            yield
    finally:
        model.backend = before
        del BACKENDS[REPEATED]
