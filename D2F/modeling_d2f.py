"""The two networks D2F decodes with, each its base with a D2F adapter merged (Wang et al. 2025, D2F).

`shared.network.llada` predicts a token at its own position, `shared.network.dream` the next one; a decoder reads ``predicts_next``.
"""

from __future__ import annotations

from shared.errors import unknown_name
from shared.network.adapters import Adaptable
from shared.network.dream import DreamModel
from shared.network.llada import LLaDAModelLM


class LLaDAForD2F(Adaptable, LLaDAModelLM):
    """``LLaDAForD2F.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", adapter="SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora")``"""

    architecture = "LLaDAModelLM"  # in config.json
    divides = False


class DreamForD2F(Adaptable, DreamModel):
    """``DreamForD2F.from_pretrained("Dream-org/Dream-v0-Base-7B", adapter="SJTU-Deng-Lab/D2F_Dream_Base_7B_Lora")``"""

    architecture = "DreamModel"
    divides = False


BACKENDS = {"llada": LLaDAForD2F, "dream": DreamForD2F}


def network_of(model_type: str) -> type[LLaDAForD2F] | type[DreamForD2F]:
    """The network class for ``model_type`` in a config.json, in any case of letters."""
    if model_type.lower() not in BACKENDS:
        raise unknown_name("model_type", model_type, BACKENDS)
    return BACKENDS[model_type.lower()]
