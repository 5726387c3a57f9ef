"""Configuration of LLaDA2 checkpoints (``model_type: llada2_moe``). Unknown keys of released configs are kept and ignored."""

from __future__ import annotations

from shared.network.configuration import DecoderConfig


class LLaDA2MoeConfig(DecoderConfig):
    """Fields with the class defaults of the released code, except that no shared expert may be written as 0 or null.

    Layers below ``first_k_dense_replace`` have a plain MLP of width ``intermediate_size``, the others ``num_experts`` of width
    ``moe_intermediate_size``. ``block_size`` is the block length the checkpoint was trained with.
    """

    model_type = "llada2_moe"
    family = "LLaDA2"
    defaults = DecoderConfig.defaults | {
        "vocab_size": 157184,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_bias": True,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "num_experts": 256,
        "num_experts_per_tok": 2,
        "num_shared_experts": 0,
        "moe_intermediate_size": 512,
        "first_k_dense_replace": 0,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "block_size": 32,
    }
    fixed = DecoderConfig.fixed | {"rope_scaling": None, "tie_word_embeddings": False}
    least = DecoderConfig.least | {"first_k_dense_replace": 0, "block_size": 1}
    del least["intermediate_size"]  # only dense layers have it
    least_or_null = DecoderConfig.least_or_null | {"num_shared_experts": 0}
    positive = (*DecoderConfig.positive, "routed_scaling_factor")
    booleans = ("use_qkv_bias", "use_qk_norm", "use_bias")

    def problem(self) -> str | None:
        """Why a network cannot be built from these values (None: it can)."""
        if problem := super().problem():
            return problem
        dense, layers = self.first_k_dense_replace, self.num_hidden_layers
        if dense and (problem := self.too_small({"intermediate_size": 1})):
            return problem
        return self._routing_problem() if dense < layers else None

    def _routing_problem(self) -> str | None:
        """As `problem`, of the layers that have experts."""
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
        if problem := self.too_small(dict.fromkeys(names, 1)):
            return problem
        if self.num_experts % self.n_group or self.num_experts // self.n_group < 2:
            return f"num_experts {self.num_experts} does not split into n_group {self.n_group} groups of at least two"
        if self.topk_group > self.n_group:
            return f"topk_group is {self.topk_group}. Allowed: 1 to n_group {self.n_group}"
        reach = self.topk_group * self.num_experts // self.n_group
        if self.num_experts_per_tok > reach:
            return f"num_experts_per_tok is {self.num_experts_per_tok}. Allowed: 1 to {reach}, the experts of topk_group groups"
        return None
