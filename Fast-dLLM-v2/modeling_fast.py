"""The Fast-dLLM v2 network: Qwen2.5 whose caller supplies the mask (Wu et al. 2025, Fast-dLLM v2).

Written for inference with a preallocated cache; parameter names are those of the released checkpoints. As in an autoregressive model, row
``t`` of the logits predicts the token at position ``t + 1``; `previous_row` is the one place that knows it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fast_dllm_v2.configuration_fast import Fast_dLLM_QwenConfig
from shared.network.attention import attend
from shared.network.kv_cache import BlockCache, Window
from shared.network.loading import CheckpointModel, special_ids
from shared.network.rotary import rotary_tables, rotate


def previous_row(place: Tensor) -> Tensor:
    """The row of a forward that predicts the token at ``place``, an index into the same forward.

    The token before the first is not in the forward, so place 0 gets row 0, which predicts another token; decoders know place 0 already.
    """
    return (place - 1).clamp(min=0)


class Fast_dLLM_QwenRMSNorm(nn.Module):
    """``x / rms(x)`` in float32, cast back, then times ``weight``."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Fast_dLLM_QwenAttention(nn.Module):
    def __init__(self, config: Fast_dLLM_QwenConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=True)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], window: Window | None, mask: Tensor | None, backend: str):
        """``x [B, T, hidden]`` -> ``[B, T, hidden]``; ``mask [B, 1, T, S]`` over everything in reach, or None."""
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b h t d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if window is not None:
            k, v = window.update(self.layer, k, v)
        return self.o_proj(rearrange(attend(q, k, v, mask, backend=backend), "b h t d -> b t (h d)"))


class Fast_dLLM_QwenMLP(nn.Module):
    def __init__(self, config: Fast_dLLM_QwenConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Fast_dLLM_QwenDecoderLayer(nn.Module):
    def __init__(self, config: Fast_dLLM_QwenConfig, layer: int):
        super().__init__()
        self.self_attn = Fast_dLLM_QwenAttention(config, layer)
        self.mlp = Fast_dLLM_QwenMLP(config)
        self.input_layernorm = Fast_dLLM_QwenRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Fast_dLLM_QwenRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, window: Window | None, mask: Tensor | None, backend: str) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, window, mask, backend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Fast_dLLM_QwenModel(nn.Module):
    def __init__(self, config: Fast_dLLM_QwenConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Fast_dLLM_QwenDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Fast_dLLM_QwenRMSNorm(config.hidden_size, config.rms_norm_eps)


class Fast_dLLM_QwenForCausalLM(CheckpointModel):
    """The network with its head. ``Fast_dLLM_QwenForCausalLM.from_pretrained(path_or_hub_id)`` loads a released checkpoint."""

    config_class = Fast_dLLM_QwenConfig

    def __init__(self, config: Fast_dLLM_QwenConfig):
        super().__init__()
        if config.rope_scaling:
            raise ValueError(f"rope_scaling {config.rope_scaling!r} is not supported; released checkpoints have null")
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; released checkpoints have 'silu'")
        if config.use_sliding_window:
            raise ValueError("use_sliding_window is true, which is not supported; released checkpoints have false")
        self.config = config
        self.backend = "sdpa"
        self.model = Fast_dLLM_QwenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def special_ids(self, mask_id: int | None = None, stop_ids=None, tokenizer=None) -> tuple[int, tuple[int, ...]]:
        """``(mask id, stop ids)``: those given, else the checkpoint's, else the released family's; checked against the vocabulary."""
        return special_ids(
            vocab_size=self.config.vocab_size,
            mask_id=mask_id,
            stop_ids=stop_ids,
            config=self.config,
            folder=self.folder,
            tokenizer=tokenizer,
            family_mask=151665,
            family_stop=(151645,),
        )

    def new_cache(self, rows: int, slots: int) -> BlockCache:
        """An empty cache for ``rows`` sequences of at most ``slots`` tokens, on the model's device and in its dtype."""
        c = self.config
        return BlockCache(
            c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim, dtype=self.dtype, device=self.device
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: Window | None = None,
        local_mask: Tensor | None = None,
        *,
        logits_at: slice | Tensor | None = None,
        logit_rows: int | None = None,
    ) -> Tensor:
        """Logits ``[B, T, V]`` for ``input_ids [B, T]`` at ``position_ids [B, T]``; row ``t`` predicts the token after it.

        ``cache``: the `Window` this forward writes to and reads from (None: the tokens see only each other).
        ``local_mask``: None (all T see each other), bool ``[T, W]`` or ``[B, T, W]`` (True = may attend), or additive float (reference
        backend only). ``logits_at`` limits which rows reach the head: a slice of T, or indices ``[B, K]`` -> ``[B, K, V]``.
        ``logit_rows``: only this many first entries of the batch reach it (default: all).
        """
        x = self.model.embed_tokens(input_ids)
        rope = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = local_mask
        if cache is not None:
            mask = cache.mask(local_mask)
        elif mask is not None:
            mask = (mask if mask.dim() == 3 else mask[None])[:, None]
        for layer in self.model.layers:
            x = layer(x, rope, cache, mask, self.backend)
        x = x[:logit_rows]
        if isinstance(logits_at, slice):
            x = x[:, logits_at]
        elif logits_at is not None:
            x = x.gather(1, logits_at[..., None].expand(-1, -1, x.shape[-1]))
        return self.lm_head(self.model.norm(x))
