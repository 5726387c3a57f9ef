"""Dream checkpoints (Ye et al. 2025), whose row ``t`` of the logits predicts token ``t + 1``."""

from __future__ import annotations

from typing import Any

import torch

from mdlm_dvd.adapters.llada_adapter import llada_generate, llada_tokenize, state_of

dream_tokenize = llada_tokenize


def load_dream_model(
    model_id: str, device: str = "auto", dtype: str = "auto", chat: str | bool = "auto"
) -> dict[str, Any]:
    """As `mdlm_dvd.adapters.llada_adapter.load_llada_model`."""
    from shared.network.dream import DreamModel

    return state_of(DreamModel, model_id, device, dtype, chat, cache=False)


class _Unshifted:
    """Dream's network as one whose row ``t`` predicts token ``t``; row 0 is that of token 1."""

    def __init__(self, model):
        self.model, self.device = model, model.device

    def __call__(self, *inputs, logits_at: slice) -> torch.Tensor:
        logits = self.model(*inputs)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1)[:, logits_at]


def dream_generate(
    tensors, state, initialize=False, gen_length=None, mask_id=151666, prompt_len=None
) -> dict[str, Any]:
    """As `mdlm_dvd.adapters.llada_adapter.llada_generate`."""
    unshifted = {**state, "model": _Unshifted(state["model"])}
    return llada_generate(tensors, unshifted, initialize, gen_length, mask_id, prompt_len)
