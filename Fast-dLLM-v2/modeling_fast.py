"""The Fast-dLLM v2 network: Qwen2.5 whose caller supplies the mask (Wu et al. 2025, Fast-dLLM v2).

`shared.network.decoder` under the released names. As in an autoregressive model, row ``t`` of the logits predicts the token at position ``t + 1``;
`previous_row` is the one place that knows it.
"""

from __future__ import annotations

from torch import Tensor

from fast_dllm_v2.configuration_fast import Fast_dLLM_QwenConfig
from shared.network.decoder import DecoderModel, Switches


def previous_row(index: Tensor) -> Tensor:
    """The row of a forward that predicts the token at ``index`` of the same forward.

    The token before the first is not in the forward, so index 0 gets row 0, which predicts another token; decoders know it already.
    """
    return (index - 1).clamp(min=0)


class Fast_dLLM_QwenForCausalLM(DecoderModel):
    """The network with its head. ``Fast_dLLM_QwenForCausalLM.from_pretrained(path_or_hub_id)`` loads a released checkpoint."""

    config_class = Fast_dLLM_QwenConfig
    family_mask, family_stop = 151665, (151645,)

    @staticmethod
    def switches(config: Fast_dLLM_QwenConfig) -> Switches:
        return Switches(qkv_bias=True)
