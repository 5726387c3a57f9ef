"""The fast forward of LLaDA2 on a GPU: the network of `modeling_llada2_moe` as `shared.gpu.fast` runs it, its experts through `shared.gpu.experts`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llada2.modeling_llada2_moe import LLaDA2MoeMLP, LLaDA2MoeSparseMoeBlock
from shared.gpu import experts as moe
from shared.gpu.fast import FastForward, GatedMLP, Layer, norm_weight
from shared.gpu.rope import QKNorm


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: the router's ``weight [E, H]``, ``gate, up [E, m, H]``, ``down [E, H, m]``, and what every token goes through."""

    weight: Tensor
    router: moe.Router
    gate: Tensor
    up: Tensor
    down: Tensor
    shared: GatedMLP | None

    @classmethod
    def of(cls, block: LLaDA2MoeSparseMoeBlock) -> Experts:
        gate, stacks = block.gate, block.experts
        return cls(
            gate.weight,
            moe.Router(gate.expert_bias.float(), gate.top_k, gate.groups, gate.top_groups, gate.scale),
            stacks.gate_proj,
            stacks.up_proj,
            stacks.down_proj,
            None if block.shared_experts is None else GatedMLP.of(block.shared_experts),
        )

    def small_batch(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor:
        work, scores = fast.work, normed.new_empty(len(x), len(self.weight), dtype=torch.float32)
        fast.product(normed, self.weight, scores, scale_eps=fast.eps)
        unscaled = moe.Unscaled(work.squares, work.square_parts, x.shape[1], fast.eps)
        parts, weights = self.routed(fast, normed, scores, unscaled)
        shared = None
        if self.shared is not None:
            shared = fast.product(self.shared.inner_small_batch(fast, normed), self.shared.down, torch.empty_like(x))
        work.square_parts = 1
        return moe.combine(parts, weights, shared, x, after, squares=work.squares, overlap=fast.overlap)

    def large_batch(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor:
        scores = F.linear(normed.float(), self.weight.float())
        parts, weights = self.routed(fast, normed, scores, None)
        shared = None
        if self.shared is not None:
            shared = F.linear(self.shared.inner_large_batch(fast, normed), self.shared.down)
        return moe.combine(parts, weights, shared, x, after, eps=fast.eps, overlap=fast.overlap)

    def routed(self, fast: FastForward, normed: Tensor, scores: Tensor, unscaled: moe.Unscaled | None):
        """What each token's experts return, ``[N * K, H]`` by pair, and their ``weights [N, K]``."""
        tokens, top_k, overlap = len(normed), self.router.top_k, {"overlap": fast.overlap}
        experts, weights, row_scale = moe.route(scores, self.router, unscaled, **overlap)
        buckets = moe.Buckets(*moe.bucket(experts, len(self.weight), **overlap), top_k)
        plan = moe.grouped_plan(tokens, top_k, self.up, gated=True)
        inner = moe.grouped_matmul(normed, self.up, buckets, plan, gate=self.gate, row_scale=row_scale, **overlap)
        plan = moe.grouped_plan(tokens, top_k, self.down)
        return moe.grouped_matmul(inner, self.down, buckets, plan, **overlap), weights


class FastLLaDA2(FastForward):
    """See `FastForward`: one projection for queries, keys and values, rotation of a part of each head, experts."""

    @staticmethod
    def refuses(config) -> str | None:
        width = int(config.head_dim * config.partial_rotary_factor)
        if width < 2 or config.head_dim % width:
            return f"the rotated width {width} does not divide head_dim {config.head_dim}"
        return None

    def embedding(self) -> Tensor:
        return self.model.model.word_embeddings.weight

    def first_projection(self, block: nn.Module) -> nn.Linear:
        return block.attention.query_key_value

    def layer(self, block: nn.Module, cos_sin: list[Tensor], after: Tensor) -> Layer:
        attention = block.attention
        qk_norms = [norm_weight(norm) for norm in (attention.query_layernorm, attention.key_layernorm)]
        return Layer(
            qkv=attention.query_key_value.weight,
            qkv_bias=attention.query_key_value.bias,
            out=attention.dense.weight,
            out_bias=attention.dense.bias,
            qk_norm=QKNorm(*qk_norms, *cos_sin, self.eps),
            between=block.post_attention_layernorm.weight,
            mlp=GatedMLP.of(block.mlp) if isinstance(block.mlp, LLaDA2MoeMLP) else Experts.of(block.mlp),
            after=after,
        )
