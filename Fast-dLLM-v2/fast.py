"""The fast forward of Fast-dLLM v2 on a GPU: the network of `modeling_fast` as `shared.fast` runs it."""

from __future__ import annotations

from torch import Tensor, nn

from shared import triton_ops as ops
from shared.fast import FastForward, GatedMLP, Layer, fuse_rows


class FastFastdLLM(FastForward):
    """See `FastForward`: biases on queries, keys and values, no norm on them."""

    family = "Fast-dLLM v2"

    def layer(self, block: nn.Module, cos_sin: list[Tensor], after: Tensor) -> Layer:
        attention = block.self_attn
        qkv, bias = fuse_rows([attention.q_proj, attention.k_proj, attention.v_proj])
        return Layer(
            qkv=qkv,
            qkv_bias=bias,
            out=attention.o_proj.weight,
            out_bias=None,
            qk_norm=ops.QKNorm(None, None, *cos_sin, self.eps),
            between=block.post_attention_layernorm.weight,
            mlp=GatedMLP.of(block.mlp),
            after=after,
        )
