"""SDAR: block diffusion with a self-speculative decoder (S2D2)."""

from transformers import AutoConfig

from sdar.configuration_sdar import SDARConfig
from sdar.modeling_sdar import SDARForCausalLM

AutoConfig.register("sdar", SDARConfig, exist_ok=True)

__all__ = ["SDARConfig", "SDARForCausalLM"]
