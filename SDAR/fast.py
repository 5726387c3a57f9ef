"""The fast forward of SDAR on a GPU: the network of `modeling_sdar` as `shared.fast` runs it."""

from __future__ import annotations

from torch import Tensor, nn

from shared import triton_ops as ops
from shared.fast import FastForward, GatedMLP, Layer, fuse_rows


class FastSDAR(FastForward):
    """See `FastForward`: projections without biases, a norm on queries and keys."""

    family = "SDAR"

    @staticmethod
    def refuses(config) -> str | None:
        return "attention_bias is set" if config.attention_bias else None

    def layer(self, block: nn.Module, cos_sin: list[Tensor], after: Tensor) -> Layer:
        attention = block.self_attn
        qkv, bias = fuse_rows([attention.q_proj, attention.k_proj, attention.v_proj])
        return Layer(
            qkv=qkv,
            qkv_bias=bias,
            out=attention.o_proj.weight,
            out_bias=None,
            qk_norm=ops.QKNorm(attention.q_norm.weight, attention.k_norm.weight, *cos_sin, self.eps),
            between=block.post_attention_layernorm.weight,
            mlp=GatedMLP.of(block.mlp),
            after=after,
        )
