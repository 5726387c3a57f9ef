"""The LLaDA2 network: a mixture-of-experts decoder whose caller supplies the mask (Bie et al. 2025, LLaDA2.0).

Written for inference with a preallocated cache. Checkpoint key names are the released ones; the experts of a layer, single tensors in the
checkpoint, are stacked when it is loaded. Logits predict the token at their own position (no shift).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from llada2.configuration_llada2_moe import LLaDA2MoeConfig
from shared.network.attention import attend
from shared.network.experts import group_limited_top_k, mix_experts
from shared.network.kv_cache import BlockCache, Window
from shared.network.loading import CheckpointModel, special_ids
from shared.network.rotary import rotary_tables, rotate


class LLaDA2MoeRMSNorm(nn.Module):
    """``x / rms(x)`` in float32, cast back, times the weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LLaDA2MoeAttention(nn.Module):
    def __init__(self, config: LLaDA2MoeConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        heads = self.heads + 2 * self.kv_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=config.use_bias)
        self.query_layernorm = self.key_layernorm = None
        if config.use_qk_norm:
            self.query_layernorm = LLaDA2MoeRMSNorm(config.head_dim, config.rms_norm_eps)
            self.key_layernorm = LLaDA2MoeRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], window: Window | None, mask: Tensor | None, backend: str):
        """``x [B, T, hidden]`` -> ``[B, T, hidden]``; ``mask [B, 1, T, S]`` over everything in reach, or None."""
        heads = rearrange(self.query_key_value(x), "b t (h d) -> b h t d", d=self.head_dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.query_layernorm is not None:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if window is not None:
            k, v = window.update(self.layer, k, v)
        return self.dense(rearrange(attend(q, k, v, mask, backend=backend), "b h t d -> b t (h d)"))


class LLaDA2MoeMLP(nn.Module):
    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LLaDA2MoeGate(nn.Module):
    """The router. ``expert_bias`` takes part in the choice only, never in the weights.

    It stays float32 (or wider) whatever the weights are cast to: rounded, it would choose other experts.
    """

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups, self.top_groups = config.n_group, config.topk_group

    def _apply(self, fn, recurse=True):
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype.itemsize < bias.dtype.itemsize:
            wide = torch.promote_types(self.expert_bias.dtype, torch.float32)
            self.expert_bias = bias.to(self.expert_bias.device, wide)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x [N, hidden]`` -> ``experts [N, K]`` and ``weights [N, K]``, at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
        return group_limited_top_k(
            scores, self.expert_bias.to(wide), self.top_k, self.groups, self.top_groups, self.scale
        )


class LLaDA2MoeExperts(nn.Module):
    """All experts of a layer as three stacks, ``gate_proj, up_proj [E, m, H]`` and ``down_proj [E, H, m]``.

    In a state dict they are ``<expert>.gate_proj.weight`` and so on, one tensor an expert, as released.
    """

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        count, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(count, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(count, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        for stack in self.parameters():
            nn.init.normal_(stack, std=config.initializer_range)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return mix_experts(x, experts, weights, self.gate_proj, self.up_proj, self.down_proj)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, stack in self.named_parameters():
            for e, one in enumerate((stack if keep_vars else stack.detach()).unbind()):
                destination[f"{prefix}{e}.{name}.weight"] = one

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name, stack in self.named_parameters():
            parts = [f"{prefix}{e}.{name}.weight" for e in range(len(stack))]
            if all(part in state_dict for part in parts):
                state_dict[f"{prefix}{name}"] = torch.stack([state_dict.pop(part) for part in parts])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class LLaDA2MoeSparseMoeBlock(nn.Module):
    """Routed experts plus the shared one, which every token goes through."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.gate = LLaDA2MoeGate(config)
        self.experts = LLaDA2MoeExperts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            width = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = LLaDA2MoeMLP(config.hidden_size, width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        out = self.experts(flat, *self.gate(flat)).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class LLaDA2MoeDecoderLayer(nn.Module):
    def __init__(self, config: LLaDA2MoeConfig, layer: int):
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer)
        dense = layer < config.first_k_dense_replace
        self.mlp = (
            LLaDA2MoeMLP(config.hidden_size, config.intermediate_size) if dense else LLaDA2MoeSparseMoeBlock(config)
        )
        self.input_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, window: Window | None, mask: Tensor | None, backend: str) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), rope, window, mask, backend)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDA2MoeModel(nn.Module):
    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)


class LLaDA2MoeModelLM(CheckpointModel):
    """The network with its head. ``LLaDA2MoeModelLM.from_pretrained(path_or_hub_id)`` loads a released checkpoint."""

    config_class = LLaDA2MoeConfig
    fast_class = "llada2.fast:FastLLaDA2"
    divides = False

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        if problem := config.problem():
            raise ValueError(problem)
        self.config = config
        self.backend = "sdpa"
        self.rotary_dim = int(config.head_dim * config.partial_rotary_factor)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def special_ids(self, mask_id: int | None = None, stop_ids=None, tokenizer=None) -> tuple[int, tuple[int, ...]]:
        """``(mask id, stop ids)``: those given, else the checkpoint's, else the released family's; checked against the vocabulary."""
        return special_ids(
            vocab_size=self.config.vocab_size,
            mask_id=mask_id,
            stop_ids=stop_ids,
            config=self.config,
            folder=self.folder,
            tokenizer=tokenizer,
            family_mask=156895,
            family_stop=(156892,),
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
        ``local_mask``: None (all T see each other), bool ``[T, T]`` or ``[B, T, T]`` (True = may attend), or additive float, which the reference
        attention alone can do and therefore does. ``logits_at`` limits which positions reach the head: a slice of T, or indices ``[B, K]`` -> ``[B, K, V]``.
        ``logit_rows``: only this many first entries of the batch reach it (default: all).
        """
        x = self.model.word_embeddings(input_ids)
        rope = rotary_tables(position_ids, self.rotary_dim, self.config.rope_theta, x.dtype)
        if cache is not None:
            mask = cache.mask(local_mask)
        elif local_mask is None:
            mask = None
        else:
            mask = (local_mask if local_mask.dim() == 3 else local_mask[None])[:, None]
        backend = "reference" if mask is not None and mask.is_floating_point() else self.backend
        for layer in self.model.layers:
            x = layer(x, rope, cache, mask, backend)
        x = x[:logit_rows]
        if isinstance(logits_at, slice):
            x = x[:, logits_at]
        elif logits_at is not None:
            x = x.gather(1, logits_at[..., None].expand(-1, -1, x.shape[-1]))
        return self.lm_head(self.model.norm(x))
