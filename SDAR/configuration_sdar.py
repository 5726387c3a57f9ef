"""Configuration of SDAR checkpoints (``model_type: sdar``). Unknown keys of released configs are kept and ignored."""

from __future__ import annotations

from shared.network.configuration import DecoderConfig


class SDARConfig(DecoderConfig):
    """Fields with the class defaults of the released code; ``head_dim`` is independent of ``hidden_size / heads``.

    ``block_size`` is the block length the checkpoint was trained with; decoding uses it when no ``block_length`` is given.
    """

    model_type = "sdar"
    family = "SDAR"
    usual_head_dim = 128
    defaults = DecoderConfig.defaults | {"attention_bias": False, "block_size": 4}
    least = DecoderConfig.least | {"block_size": 1}
    booleans = (*DecoderConfig.booleans, "attention_bias")
