"""Configuration of LLaDA2 checkpoints (``model_type: llada2_moe``). Unknown keys of released configs are kept and ignored."""

from __future__ import annotations

from transformers import PretrainedConfig


class LLaDA2MoeConfig(PretrainedConfig):
    """Fields with the class defaults of the released code, except that no shared expert may be written as 0 or null.

    Layers below ``first_k_dense_replace`` have a plain MLP of width ``intermediate_size``, the others ``num_experts`` of width
    ``moe_intermediate_size``. ``block_size`` is the block length the checkpoint was trained with.
    """

    model_type = "llada2_moe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = 4,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        use_qkv_bias: bool = False,
        use_qk_norm: bool = True,
        use_bias: bool = True,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: dict | None = None,
        partial_rotary_factor: float = 0.5,
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        num_experts: int = 256,
        num_experts_per_tok: int = 2,
        num_shared_experts: int | None = 0,
        moe_intermediate_size: int = 512,
        first_k_dense_replace: int = 0,
        n_group: int = 8,
        topk_group: int = 4,
        routed_scaling_factor: float = 2.5,
        block_size: int = 32,
        mask_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        if head_dim is None and _is_count(hidden_size, 1) and _is_count(num_attention_heads, 1):
            head_dim = hidden_size // num_attention_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.use_qkv_bias = use_qkv_bias
        self.use_qk_norm = use_qk_norm
        self.use_bias = use_bias
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.partial_rotary_factor = partial_rotary_factor
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_shared_experts = num_shared_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.first_k_dense_replace = first_k_dense_replace
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def problem(self) -> str | None:
        """Why a network cannot be built from these values (None: it can)."""
        released = {"hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False}
        for name, value in released.items():
            if getattr(self, name) != value:
                return f"{name} {getattr(self, name)!r} is not supported; released LLaDA2 checkpoints have {value!r}"
        if problem := self._too_small(_LEAST):
            return problem
        if self.first_k_dense_replace and (problem := self._too_small({"intermediate_size": 1})):
            return problem
        if self.num_shared_experts is not None and not _is_count(self.num_shared_experts, 0):
            return f"num_shared_experts is {self.num_shared_experts!r}. Allowed: null, or a whole number, at least 0"
        if self.num_attention_heads % self.num_key_value_heads:
            return (
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self._rotary_problem() or (
            self._routing_problem() if self.first_k_dense_replace < self.num_hidden_layers else None
        )

    def _too_small(self, least: dict[str, int]) -> str | None:
        for name, low in least.items():
            if not _is_count(getattr(self, name), low):
                return f"{name} is {getattr(self, name)!r}. Allowed: a whole number, at least {low}"
        return None

    def _rotary_problem(self) -> str | None:
        factor = self.partial_rotary_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
            return f"partial_rotary_factor is {factor!r}. Allowed: above 0, at most 1"
        width = int(self.head_dim * factor)
        if width < 2 or width % 2:
            return (
                f"partial_rotary_factor {factor} of head_dim {self.head_dim} rotates {width} channels. "
                "Allowed: an even number, at least 2"
            )
        return None

    def _routing_problem(self) -> str | None:
        """As `problem`, of the layers that have experts."""
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
        if problem := self._too_small(dict.fromkeys(names, 1)):
            return problem
        if self.num_experts % self.n_group or self.num_experts // self.n_group < 2:
            return f"num_experts {self.num_experts} does not split into n_group {self.n_group} groups of at least two"
        if self.topk_group > self.n_group:
            return f"topk_group is {self.topk_group}. Allowed: 1 to n_group {self.n_group}"
        reach = self.topk_group * self.num_experts // self.n_group
        if self.num_experts_per_tok > reach:
            return f"num_experts_per_tok is {self.num_experts_per_tok}. Allowed: 1 to {reach}, the experts of topk_group groups"
        return None


# The least that the sizes every network has may be.
_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 1,
    "block_size": 1,
}


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
