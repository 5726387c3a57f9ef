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
from shared.network.decoder import MLP, DecoderModel, ForwardContext, RMSNorm
from shared.network.experts import group_limited_top_k, mix_experts

LLaDA2MoeMLP = MLP


class LLaDA2MoeAttention(nn.Module):
    """One projection for queries, keys and values; the released names."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        heads = self.heads + 2 * self.kv_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=config.use_bias)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """``x [B, T, hidden]`` -> ``[B, T, hidden]``."""
        heads = rearrange(self.query_key_value(x), "b t (h d) -> b h t d", d=self.head_dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.query_layernorm is not None:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        return self.dense(context.attend(self.layer, q, k, v))


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
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDA2MoeModelLM(DecoderModel):
    """The network with its head. ``LLaDA2MoeModelLM.from_pretrained(path_or_hub_id)`` loads a released checkpoint."""

    config_class = LLaDA2MoeConfig
    fast_class = "llada2.fast:FastLLaDA2"
    divides = False
    family_mask, family_stop = 156895, (156892,)
    embedding_name = "word_embeddings"

    def layer(self, config: LLaDA2MoeConfig, number: int) -> LLaDA2MoeDecoderLayer:
        return LLaDA2MoeDecoderLayer(config, number)
