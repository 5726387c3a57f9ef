"""LLaDA2: block diffusion on a mixture of experts."""

from llada2.configuration_llada2_moe import LLaDA2MoeConfig
from llada2.modeling_llada2_moe import LLaDA2MoeModelLM

__all__ = ["LLaDA2MoeConfig", "LLaDA2MoeModelLM"]
