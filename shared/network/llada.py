"""The LLaDA network (Nie et al. 2025): a bidirectional decoder whose masks the caller supplies, under OLMo's names.

Row ``t`` of the logits predicts the token at ``t``. D2F decodes with it; masked-diffusion drafters and verifiers are such networks too.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from shared.network.configuration import DecoderConfig
from shared.network.decoder import DecoderModel, Switches

# What every released checkpoint says of OLMo's other switches; nothing else is served.
_RELEASED = {
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
}


class LLaDAConfig(DecoderConfig):
    """``model_type: llada``, by the names of its config.json; the shared names work as well.

    ``mlp_hidden_size`` null is ``mlp_ratio * d_model``, ``n_kv_heads`` null as many as heads, or one with ``multi_query_attention``. The embedding has
    ``embedding_size`` rows where that is given, else ``vocab_size``.
    """

    model_type = "llada"
    family = "LLaDA"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "hidden_act": "activation_type",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
    defaults = (
        DecoderConfig.defaults
        | {
            "vocab_size": 126464,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": None,
            "mlp_ratio": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "embedding_size": None,
            "multi_query_attention": None,
            "include_bias": False,
            "include_qkv_bias": False,
            "scale_logits": False,
        }
        | _RELEASED
    )
    fixed = DecoderConfig.fixed | _RELEASED
    positive = (*DecoderConfig.positive, "mlp_ratio")
    booleans = (*DecoderConfig.booleans, "include_bias", "scale_logits")

    def __init__(self, **given):
        kv_heads = given.get("n_kv_heads", given.get("num_key_value_heads"))
        if given.get("multi_query_attention") and kv_heads is None:
            given["n_kv_heads"] = 1
        super().__init__(**given)
        if self.embedding_size is not None:
            self.vocab_size = self.embedding_size
        if self.include_qkv_bias is None:
            self.include_qkv_bias = False
        if self.intermediate_size is None and not self.too_small({"hidden_size": 1}):
            self.intermediate_size = self.mlp_ratio * self.hidden_size

    def problem(self) -> str | None:
        if not isinstance(self.include_qkv_bias, bool):
            return f"include_qkv_bias is {self.include_qkv_bias!r}. Allowed: null, true, false"
        return super().problem()


class LLaDAModelLM(DecoderModel):
    """The network with its head. ``LLaDAModelLM.from_pretrained(path_or_hub_id)`` loads a released checkpoint."""

    predicts_next = False  # does row t of the logits predict the token at t + 1?
    config_class = LLaDAConfig
    family_mask, family_stop = 126336, (126081,)
    checkpoint_keys: ClassVar[dict[str, str]] = {
        "model.embed_tokens": "model.transformer.wte",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
        "model.layers.*.input_layernorm": "model.transformer.blocks.*.attn_norm",
        "model.layers.*.post_attention_layernorm": "model.transformer.blocks.*.ff_norm",
        "model.layers.*.self_attn.q_proj": "model.transformer.blocks.*.q_proj",
        "model.layers.*.self_attn.k_proj": "model.transformer.blocks.*.k_proj",
        "model.layers.*.self_attn.v_proj": "model.transformer.blocks.*.v_proj",
        "model.layers.*.self_attn.o_proj": "model.transformer.blocks.*.attn_out",
        "model.layers.*.mlp.gate_proj": "model.transformer.blocks.*.ff_proj",
        "model.layers.*.mlp.up_proj": "model.transformer.blocks.*.up_proj",
        "model.layers.*.mlp.down_proj": "model.transformer.blocks.*.ff_out",
    }

    @staticmethod
    def switches(config: LLaDAConfig) -> Switches:
        bias = config.include_bias
        return Switches(qkv_bias=bias or config.include_qkv_bias, out_bias=bias, mlp_bias=bias)

    def forward(self, *inputs, **keywords) -> Tensor:
        logits = super().forward(*inputs, **keywords)
        return logits / self.config.hidden_size**0.5 if self.config.scale_logits else logits
