"""Checkpoints of the other families here, as drafter or verifier. ``family`` in the registry names which.

SDAR, Fast-dLLM v2 and LLaDA2 attend block by block, blocks counted from position 0; D2F from the prompt's end. A pass over prompt and region is under that mask
and with the family's own shift, so nothing is converted.
"""

from __future__ import annotations

from typing import Any

from mdlm_dvd.adapters.llada_adapter import llada_tokenize, template
from mdlm_dvd.src.network import Network
from shared.errors import UserError

family_tokenize = llada_tokenize


def load_family_model(
    model_id: str,
    family: str,
    device: str = "auto",
    dtype: str = "auto",
    chat: str | bool = "auto",
    adapter: str | None = None,
    attention_block: int | None = None,
) -> dict[str, Any]:
    """``model_id``: a checkpoint of ``family``, or the name of one that it ships. ``adapter``: weights laid on it (D2F). ``attention_block``: tokens that see
    each other both ways; by default the checkpoint's, or the family's."""
    from shared.family import family_named
    from shared.network.loading import load_tokenizer
    from shared.scripts.models import checkpoints_of, load_models

    found = family_named(family)
    given = {} if adapter is None else {"adapter": adapter}
    checkpoints = checkpoints_of(found, model_id, given)
    model = load_models(found, checkpoints, dtype=dtype, device=device)[found.first]
    tokenizer = load_tokenizer(checkpoints[found.first])
    config = model.config
    length = (
        attention_block or getattr(config, "block_size", None) or getattr(config, "bd_size", None) or found.block_length
    )
    network = Network(model, length, from_prompt=family == "D2F", next_token=family == "Fast-dLLM-v2")
    return {"model": model, "tokenizer": tokenizer, "network": network, **template(tokenizer, chat)}


def family_generate(tensors, state, **_) -> dict[str, Any]:
    """Not used by the loop here, which asks the network itself; of the published form there is none for such a model."""
    raise UserError(
        "a model of another family decodes with this repository's algorithms only. Allowed: cascade, topk_sets, llada, threshold_verifier, ..."
    )
