"""SDAR: block diffusion with a self-speculative decoder (S2D2)."""

from sdar.configuration_sdar import SDARConfig
from sdar.modeling_sdar import SDARForCausalLM

__all__ = ["SDARConfig", "SDARForCausalLM"]
