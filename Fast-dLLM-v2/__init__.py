"""Fast-dLLM v2: block diffusion with a token shift and sub-blocks, and S2D2 with a causal verifier."""

from fast_dllm_v2.configuration_fast import Fast_dLLM_QwenConfig
from fast_dllm_v2.modeling_fast import Fast_dLLM_QwenForCausalLM

__all__ = ["Fast_dLLM_QwenConfig", "Fast_dLLM_QwenForCausalLM"]
