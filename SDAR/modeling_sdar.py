"""The SDAR network: a Qwen3-style decoder whose caller supplies the mask (Cheng et al. 2025, SDAR).

`shared.network.decoder` under the released names. It differs from Qwen3 in the mask, in logits that predict the token at their own position (no
shift), and in the norm, which multiplies by its weight in float32 before the one cast back.
"""

from __future__ import annotations

from sdar.configuration_sdar import SDARConfig
from shared.network.decoder import DecoderModel, Float32RMSNorm, Switches


class SDARForCausalLM(DecoderModel):
    """The network with its head. ``SDARForCausalLM.from_pretrained(path_or_hub_id)`` loads a released checkpoint."""

    config_class = SDARConfig
    family_mask, family_stop = 151669, (151645, 151643)

    @staticmethod
    def switches(config: SDARConfig) -> Switches:
        bias = config.attention_bias
        return Switches(qk_norm=True, qkv_bias=bias, out_bias=bias, norm=Float32RMSNorm)
