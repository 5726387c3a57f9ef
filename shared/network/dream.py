"""The Dream network (Ye et al. 2025): Qwen2.5 whose masks the caller supplies. Row ``t`` of the logits predicts the token at ``t + 1``."""

from __future__ import annotations

from shared.network.configuration import DecoderConfig
from shared.network.decoder import DecoderModel, Switches


class DreamConfig(DecoderConfig):
    """``model_type: Dream``. ``head_dim`` is ``hidden_size / heads``."""

    model_type = "Dream"
    family = "Dream"
    defaults = DecoderConfig.defaults | {"rope_theta": 1000000.0}


class DreamModel(DecoderModel):
    """The network with its head. ``DreamModel.from_pretrained(path_or_hub_id)`` loads a released checkpoint."""

    predicts_next = True  # does row t of the logits predict the token at t + 1?
    config_class = DreamConfig
    family_mask, family_stop = 151666, (151643,)

    @staticmethod
    def switches(config: DreamConfig) -> Switches:
        return Switches(qkv_bias=True)
