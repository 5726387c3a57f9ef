"""DualDiffusion's pipeline under its published name and signature. The loop and the rules are this repository's (`mdlm_dvd.src.runtime`, `verification_algos`)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from mdlm_dvd.adapters.llada_adapter import llada_generate, template
from mdlm_dvd.algorithms import dual
from mdlm_dvd.src.model import ModelBroker
from mdlm_dvd.src.network import Network
from mdlm_dvd.src.registry import Algorithm
from mdlm_dvd.src.runtime import run
from mdlm_dvd.verification_algos import trust_verifier
from shared.errors import UserError
from shared.network.decoder import DecoderModel

SYSTEM = "You are a helpful assistant."


def dual_diffusion_generate(
    drafter_model: Any,
    drafter_tokenizer: Any,
    verifier_model: Any,
    verifier_tokenizer: Any,
    query: str,
    max_new_tokens: int,
    num_drafter_steps: int,
    num_verifier_steps: int = 1,
    drafter_mask_id: int | None = None,
    verifier_mask_id: int | None = None,
    drafter_generate_fn: Callable | None = None,
    verifier_generate_fn: Callable | None = None,
    verification_fn: Callable | None = None,
    max_iterations: int = 1,
    remask_threshold: int = 0,
    **kwargs,
) -> dict[str, Any]:
    """Draft, convert, verify, convert back, judge; again with what was rejected masked, at most ``max_iterations`` times.

    Returns ``{"output_ids": [1, n], "output_text", "stats"}``, ids in the drafter's vocabulary, with ``stats`` ``{"iterations", "total_drafter_steps",
    "total_verifier_steps", "tokens_remasked_per_iteration"}``. ``verification_fn``: one of `mdlm_dvd.verification_algos`, or one of its form (default:
    `trust_verifier`). A ``generate_fn`` is called as ``fn(model, tokenizer, input_ids [1, P + G], num_steps, **kwargs)`` for one forward and returns logits
    ``[1, G, V]``, or a tuple that ends with them; by default the model, one of this repository, is asked itself. ``kwargs``: ``threshold``,
    ``draft_threshold``, ``block_length``, ``keep_later`` of `mdlm_dvd.algorithms.dual.run_step`. The prompt goes through each model's chat template,
    with the published system prompt where ``system`` is true.
    """
    rule = verification_fn or trust_verifier
    pairs = (
        ("drafter", drafter_model, drafter_tokenizer, drafter_mask_id, drafter_generate_fn),
        ("verifier", verifier_model, verifier_tokenizer, verifier_mask_id, verifier_generate_fn),
    )
    system = SYSTEM if kwargs.pop("system", False) else None
    brokers = [_broker(*pair, system, kwargs) for pair in pairs]
    remasked: list[int] = []
    counts = {"iterations": 0, "drafter_nfe": 0, "verifier_nfe": 0}

    def listen(event) -> None:
        for key in counts:
            counts[key] += event.metrics[key]
        remasked.append(event.metrics["tokens_remasked"])

    (result,) = run(
        *brokers, Algorithm("dual", dual.run_step), [query], gen_length=max_new_tokens, listen=listen,
        verification=rule, num_drafter_steps=num_drafter_steps, num_verifier_steps=num_verifier_steps,
        max_iterations=max_iterations, remask_threshold=remask_threshold, **kwargs,
    )  # fmt: skip
    return {
        "output_ids": torch.tensor([result.token_ids], dtype=torch.long),
        "output_text": result.text,
        "stats": {
            "iterations": counts["iterations"],
            "total_drafter_steps": counts["drafter_nfe"],
            "total_verifier_steps": counts["verifier_nfe"],
            "tokens_remasked_per_iteration": remasked,
        },
    }


def _broker(
    role: str,
    model: Any,
    tokenizer: Any,
    mask_id: int | None,
    function: Callable | None,
    system: str | None,
    kwargs: dict,
) -> ModelBroker:
    """A role's model behind a broker: asked itself where it is ours, else by its function."""
    state = {"model": model, "tokenizer": tokenizer, **template(tokenizer, "auto")}
    if function is None:
        if not isinstance(model, DecoderModel):
            raise UserError(f"{role}_generate_fn is missing. Allowed: one, where the model is none of this repository")
        state["network"] = Network(model, getattr(model.config, "block_size", None))
    if mask_id is not None:
        model.config.mask_token_id = mask_id

    def generate(tensors, state, **_):
        found = function(model, tokenizer, tensors["input_ids"], 1, **kwargs)
        return {"logits": found[-1] if isinstance(found, tuple) else found}

    def tokenize(prompt, state):
        turns = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
        if (function is None and system is None) or tokenizer.chat_template is None:
            return tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        state["template_prefix_ids"] = state["template_suffix_ids"] = torch.tensor([], dtype=torch.long)
        return {"input_ids": torch.tensor([ids])}

    module = SimpleNamespace(tokenize=tokenize, generate=generate)
    config = {"name": role, "tokenizer_func": "tokenize", "gen_func": "generate"}
    return ModelBroker(module, config, role, model_state=state)


def llada_generate_fn(model: Any, tokenizer: Any, input_ids, num_steps: int = 1, **kwargs):
    """A ``verifier_generate_fn`` (the notebook's name): one forward over ``input_ids [1, P + G]``; logits of all places."""
    content = torch.as_tensor(input_ids)
    tensors = {"input_ids": content}
    return llada_generate(tensors, {"model": model}, gen_length=content.shape[1], prompt_len=0)["logits"]
