"""Configuration of Fast-dLLM v2 checkpoints (``model_type: Fast_dLLM_Qwen``). Unknown keys of released configs are kept and ignored."""

from __future__ import annotations

from shared.network.configuration import DecoderConfig


class Fast_dLLM_QwenConfig(DecoderConfig):
    """Fields with the class defaults of the released code. ``head_dim`` is ``hidden_size / heads`` unless given.

    ``bd_size`` is the block length the checkpoint was trained with; decoding uses it when no ``block_length`` is given. Released configs
    name no mask token; ``mask_token_id`` may.
    """

    model_type = "Fast_dLLM_Qwen"
    family = "Fast-dLLM v2"
    defaults = DecoderConfig.defaults | {"num_key_value_heads": 32, "bd_size": 32}
    least = DecoderConfig.least | {"bd_size": 1}
