"""The SDAR network: a Qwen3-style pre-norm decoder whose caller supplies the mask (Cheng et al. 2025, SDAR).

Written for inference with a preallocated cache; parameter names are those of the released checkpoints. It differs from
transformers' Qwen3 in the mask, in logits that predict the token at their own position (no shift), and in the norm, which
multiplies by its weight in float32 before the one cast back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdar.configuration_sdar import SDARConfig
from shared.network.attention import attend
from shared.network.kv_cache import BlockCache, Window
from shared.network.loading import CheckpointModel, special_ids
from shared.network.rotary import rotary_tables, rotate


class SDARRMSNorm(nn.Module):
    """``x / rms(x) * weight``, all of it in float32, cast back once."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class SDARAttention(nn.Module):
    def __init__(self, config: SDARConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias)
        self.q_norm = SDARRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = SDARRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], window: Window | None, mask: Tensor | None, backend: str):
        """``x [B, T, hidden]`` -> ``[B, T, hidden]``; ``mask [B, 1, T, S]`` over everything in reach, or None."""
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b h t d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if window is not None:
            k, v = window.update(self.layer, k, v)
        return self.o_proj(rearrange(attend(q, k, v, mask, backend=backend), "b h t d -> b t (h d)"))


class SDARMLP(nn.Module):
    def __init__(self, config: SDARConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SDARDecoderLayer(nn.Module):
    def __init__(self, config: SDARConfig, layer: int):
        super().__init__()
        self.self_attn = SDARAttention(config, layer)
        self.mlp = SDARMLP(config)
        self.input_layernorm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, window: Window | None, mask: Tensor | None, backend: str) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, window, mask, backend)
        return x + self.mlp(self.post_attention_layernorm(x))


class SDARModel(nn.Module):
    def __init__(self, config: SDARConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SDARDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)


class SDARForCausalLM(CheckpointModel):
    """The network with its head. ``SDARForCausalLM.from_pretrained(path_or_hub_id)`` loads a released checkpoint."""

    config_class = SDARConfig

    def __init__(self, config: SDARConfig):
        super().__init__()
        if config.rope_scaling:
            raise ValueError(
                f"rope_scaling {config.rope_scaling!r} is not supported; released SDAR checkpoints have null"
            )
        if config.hidden_act != "silu":
            raise ValueError(
                f"hidden_act {config.hidden_act!r} is not supported; released SDAR checkpoints have 'silu'"
            )
        if config.use_sliding_window:
            raise ValueError("use_sliding_window is true, which is not supported; released checkpoints have false")
        self.config = config
        self.backend = "sdpa"
        self.model = SDARModel(config)
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
            family_mask=151669,
            family_stop=(151645, 151643),
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
        """Logits ``[B, T, V]`` for ``input_ids [B, T]`` at ``position_ids [B, T]``; row ``t`` predicts the token at its own position.

        ``cache``: the `Window` this forward writes to and reads from (None: the tokens see only each other).
        ``local_mask``: None (all T see each other), bool ``[T, T]`` or ``[B, T, T]`` (True = may attend), or additive float (reference
        backend only). ``logits_at`` limits which positions reach the head: a slice of T, or indices ``[B, K]`` -> ``[B, K, V]``.
        ``logit_rows``: only this many first entries of the batch reach it (default: all).
        """
        x = self.model.embed_tokens(input_ids)
        rope = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        if cache is not None:
            mask = cache.mask(local_mask)
        else:
            mask = (
                local_mask
                if local_mask is None
                else (local_mask if local_mask.dim() == 3 else local_mask[None])[:, None]
            )
        for layer in self.model.layers:
            x = layer(x, rope, cache, mask, self.backend)
        x = x[:logit_rows]
        if isinstance(logits_at, slice):
            x = x[:, logits_at]
        elif logits_at is not None:
            x = x.gather(1, logits_at[..., None].expand(-1, -1, x.shape[-1]))
        return self.lm_head(self.model.norm(x))
