"""A model of this repository behind the forward that published decoders call.

They expect ``model(input_ids, attention_mask=, position_ids=, past_key_values=, use_cache=, store_kv=) -> output with
.logits`` and a transformers ``DynamicCache`` that only grows. This runs their code on our weights, to compare decoders
on equal terms.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import DynamicCache


class _GrowingWindow:
    """The window interface of `shared.network.kv_cache.Window` over a cache that grows by concatenation."""

    def __init__(self, past: DynamicCache | None, store: bool, mask: Tensor | None):
        self.past, self.store, self.full_mask = past, store, mask

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.past is None:
            return keys, values
        if self.store:
            return self.past.update(keys, values, layer)
        if len(self.past.key_cache) <= layer:
            return keys, values
        return (
            torch.cat([self.past.key_cache[layer], keys], -2),
            torch.cat([self.past.value_cache[layer], values], -2),
        )

    def mask(self, local_mask: Tensor | None) -> Tensor | None:
        return self.full_mask


class HFStyle(nn.Module):
    """``HFStyle(model)`` has the published forward, ``config``, ``device`` and ``dtype``."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config
        self.device, self.dtype = model.device, model.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = True,
        store_kv: bool = True,
        **unused,
    ) -> SimpleNamespace:
        """``attention_mask [1, T, S]``: bool or 0/1, True = may attend, over cached and current tokens (None: all)."""
        past = past_key_values if use_cache else None
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            position_ids = position_ids + (past.get_seq_length() if past is not None else 0)
        mask = None
        if attention_mask is not None and not attention_mask.bool().all():
            mask = attention_mask.bool().view(-1, 1, *attention_mask.shape[-2:])
        logits = self.inner(input_ids, position_ids, _GrowingWindow(past, store_kv, mask))
        return SimpleNamespace(logits=logits, past_key_values=past)
