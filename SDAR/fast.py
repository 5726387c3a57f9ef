"""The fast forward of SDAR on a GPU: the network of `modeling_sdar` as `shared.gpu.fast` runs it."""

from __future__ import annotations

from torch import Tensor, nn

from shared.gpu.fast import FastForward


class FastSDAR(FastForward):
    """See `FastForward`: queries and keys have a norm each."""

    family = "SDAR"

    def qk_norms(self, block: nn.Module) -> tuple[Tensor, Tensor]:
        return block.self_attn.q_norm.weight, block.self_attn.k_norm.weight
