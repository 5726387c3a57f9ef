"""Configuration of Fast-dLLM v2 checkpoints (``model_type: Fast_dLLM_Qwen``). Unknown keys of released configs are kept and ignored."""

from __future__ import annotations

from transformers import PretrainedConfig


class Fast_dLLM_QwenConfig(PretrainedConfig):
    """Fields with the class defaults of the released code. ``head_dim`` is ``hidden_size / heads`` unless given.

    ``bd_size`` is the block length the checkpoint was trained with; decoding uses it when no ``block_length`` is given. Released configs
    name no mask token; ``mask_token_id`` may.
    """

    model_type = "Fast_dLLM_Qwen"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 32,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling: dict | None = None,
        use_sliding_window: bool = False,
        bd_size: int = 32,
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
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.use_sliding_window = use_sliding_window
        self.bd_size = bd_size
        self.mask_token_id = mask_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
