"""What step functions share: options by name, the start of a batch, and the helpers that the published framework's algorithm files import."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mdlm_dvd.src.model import ModelBroker
from mdlm_dvd.src.runtime import mask_of
from mdlm_dvd.src.texts import Ask, Texts
from mdlm_dvd.src.token_utils import same_vocabulary
from mdlm_dvd.src.utils import top
from shared.decode.calls import Call
from shared.errors import UserError
from shared.options import ALIASES, FlatOptions, Runtime
from shared.policy.sampling import GREEDY_BELOW

STEP = ("drafter", "verifier", "prompts", "step_idx", "total_steps", "algo_state")
# Beside options: how a batch is called, which `shared.decode.calls.Call` describes.
CALL = ("seed", "requests", "call")


def takes(options: type[FlatOptions]) -> Callable:
    """Decorates ``step(drafter, verifier, texts, options, step_idx, algo_state)``: the result is a step function in the published form, which asks for the
    fields of ``options`` by name, checks them, and has `Texts` of the prompts from its first step on."""
    spellings = [s for name, row in ALIASES.items() if name in options.names() for s in row]
    names = dict.fromkeys([*options.names(), *spellings, *CALL])

    def decorate(step: Callable) -> Callable:
        @functools.wraps(step)
        def run_step(drafter, verifier, prompts, step_idx, total_steps, algo_state, **given) -> dict:
            if "texts" not in algo_state:
                how = {name: given.pop(name) for name in CALL if name in given}
                chosen = options.from_flat(given)
                algo_state = start(drafter, verifier, prompts, chosen, **how)
            texts, chosen = algo_state["texts"], algo_state["options"]
            rows = texts.live
            before = drafter.forwards, verifier.forwards
            out = step(drafter, verifier, texts, chosen, step_idx, algo_state) if rows else {}
            same = drafter.model_state is verifier.model_state and drafter is verifier
            metrics = {
                "drafter_nfe": 0 if same else drafter.forwards - before[0],
                "verifier_nfe": verifier.forwards - before[1],
                **out,
            }
            return {"algo_state": algo_state, "metrics": metrics, "texts": texts, "rows": rows, "done": not texts.live}

        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in STEP]
        optional = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
        run_step.__signature__ = inspect.Signature([*parameters, *optional])
        return run_step

    return decorate


def start(
    drafter: ModelBroker,
    verifier: ModelBroker,
    prompts: Sequence[str | list[int]],
    options: Any,
    seed: int = 0,
    requests: Sequence[int] | None = None,
    call: Call | None = None,
) -> dict[str, Any]:
    """The state of a batch: its ``texts``, and ``options`` with the checkpoint's ids filled in. Raises `UserError` for two vocabularies."""
    tokenizers = drafter.tokenizer, verifier.tokenizer
    if None not in tokenizers and not same_vocabulary(*tokenizers):
        raise UserError(
            f"drafter {drafter.name!r} and verifier {verifier.name!r} have different vocabularies. "
            "Allowed: --algorithm dual, which goes through text, or models with one tokenizer"
        )
    for broker in (drafter, verifier):
        if broker.network is not None and options.runtime != Runtime():
            broker.network.runtime = options.runtime
    call, region, tokenizer = call or Call(), options.region, verifier.tokenizer
    mask_id, stops = special_ids(verifier, region)
    options = options.replace(**ends(options, verifier, stops))
    ids = [list(p) if not isinstance(p, str) else verifier.prompt_ids(p) for p in prompts]
    length = region.max_new_tokens
    check_room_for(ids, length, verifier, drafter)
    sampled = getattr(getattr(options, "sampling", None), "temperature", 0.0) >= GREEDY_BELOW
    shuffled = getattr(options.unmask, "remasking", "") == "random"
    most = (getattr(options.unmask, "steps", None) or length) + length
    recorded = call.uniforms
    ask = Ask(
        gen_length=length,
        mask_id=mask_id,
        stop_ids=stops if region.truncate_at_eos else (),
        device=torch.device(getattr(verifier.model_state["model"], "device", "cpu")),
        requests=requests if call.requests is None else call.requests,
        seed=seed,
        draws=(sampled + shuffled) * most * length,
        recorded=recorded,
        tokenizer=tokenizer,
        stop=call.stop,
        trim=region.trim_stop_tokens,
        whole=not region.truncate_at_eos,
        on_block=call.on_block,
    )
    return {"texts": Texts(ids, ask), "options": options}


def check_room_for(prompts: Sequence[Sequence[int]], gen_length: int, *brokers: ModelBroker) -> None:
    """Raise `UserError` for a prompt without tokens, and for one that leaves no room for its region among the positions of a model."""
    for broker in brokers:
        config = getattr(broker.model_state["model"], "config", None)
        most = getattr(config, "max_position_embeddings", None)
        for k, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {k} is empty. Allowed: at least one token")
            if isinstance(most, int) and len(prompt) + gen_length > most:
                raise UserError(
                    f"prompt {k} has {len(prompt)} tokens and gen_length is {gen_length}. Allowed together: {most}, "
                    f"the positions of {broker.name!r}"
                )


def special_ids(broker: ModelBroker, region: Any) -> tuple[int, tuple[int, ...]]:
    """``(mask id, stop ids)`` of a role's model."""
    model = broker.model_state["model"]
    if hasattr(model, "special_ids"):
        return model.special_ids(region.mask_id, region.stopping_criteria_idx, broker.tokenizer)
    end = getattr(broker.tokenizer, "eos_token_id", None)
    stops = region.stopping_criteria_idx
    return mask_of(broker, region.mask_id), tuple(stops) if stops is not None else () if end is None else (end,)


def ends(options: Any, broker: ModelBroker, stops: tuple[int, ...]) -> dict[str, int]:
    """``eos_token_id`` and ``eot_token_id`` where an option asks for them; `UserError` where they are not known."""
    unmask = options.unmask
    if not (getattr(unmask, "logits_eos_inf", False) or getattr(unmask, "confidence_eos_eot_inf", False)):
        return {}
    config = getattr(broker.model_state["model"], "config", None)
    eos = unmask.eos_token_id if unmask.eos_token_id is not None else getattr(config, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    others = [i for i in stops if i != eos]
    eot = unmask.eot_token_id if unmask.eot_token_id is not None else next(iter(others), eos)
    if eos is None:
        raise UserError("eos_token_id is not known. Allowed: --eos_token_id ID")
    return {"eos_token_id": eos, "eot_token_id": eot}


# The published framework's names and parameters, for algorithm files written against it. Contents are ``[B, P + gen_length]``, prompts without their template.


def tokenize_batch(broker: ModelBroker, prompts: Sequence[str], **kwargs) -> tuple[Tensor, Tensor, int]:
    """``(content [B, P], attention mask [B, P], P)``: prompts padded on the right to one length, on the model's device."""
    found = [torch.as_tensor(broker.tokenize(p, **kwargs)["input_ids"]).reshape(-1) for p in prompts]
    prompt_len, pad = max(map(len, found)), getattr(broker.tokenizer, "pad_token_id", None)
    if pad is None:
        pad = getattr(broker.tokenizer, "eos_token_id", None) or 0
    device = getattr(broker.model_state["model"], "device", "cpu")
    content = torch.full((len(found), prompt_len), pad, dtype=torch.long, device=device)
    attention = torch.zeros_like(content)
    for k, ids in enumerate(found):
        content[k, : len(ids)] = ids.to(device)
        attention[k, : len(ids)] = 1
    return content, attention, prompt_len


def initialize_content(broker: ModelBroker, prompts: Sequence[str], gen_length: int, mask_id: int, **kwargs):
    """``(content, attention_mask, prompt_len, logits)``: prompts padded on the right to one length, masks behind them, and the first forward's logits
    ``[B, gen_length, V]``."""
    content, attention, prompt_len = tokenize_batch(broker, prompts, **kwargs)
    content = torch.nn.functional.pad(content, (0, gen_length), value=mask_id)
    attention = torch.nn.functional.pad(attention, (0, gen_length), value=1)
    return content, attention, prompt_len, step_generate(broker, content, attention, prompt_len, gen_length, mask_id)


def step_generate(
    broker: ModelBroker, full_content: Tensor, full_attn: Tensor, prompt_len: int, gen_length: int, mask_id: int
) -> Tensor:
    """Logits ``[B, gen_length, V]`` of one forward over ``full_content``."""
    tensors = {"input_ids": full_content, "attention_mask": full_attn}
    given = {"initialize": False, "gen_length": gen_length, "mask_id": mask_id, "prompt_len": prompt_len}
    out = broker.generate(tensors, **given)
    logits = out["logits"] if isinstance(out, dict) else getattr(out, "logits", out)
    return logits[:, -gen_length:]


def sample_topk_confident(logits: Tensor, gen_region: Tensor, mask_id: int, k: int) -> Tensor:
    """``gen_region [B, G]`` with the ``k`` masks of the largest logits filled by their argmax."""
    best, tokens = logits.max(-1)
    count = torch.full((len(best),), k, device=best.device)
    return torch.where(top(best, gen_region == mask_id, count), tokens.to(gen_region.dtype), gen_region)


def decode_results(broker: ModelBroker, full_content: Tensor, prompts: Sequence[str], prompt_len: int) -> list[dict]:
    """What a last step returns as ``results``."""
    regions = full_content[:, prompt_len:]
    texts = [broker.tokenizer.decode(row, skip_special_tokens=True) for row in regions]
    return [{"text": t, "tokens": r, "prompt": p} for t, r, p in zip(texts, regions, prompts, strict=True)]


def drafter_step(
    drafter: ModelBroker, texts: Texts, rows: Sequence[int], region: Tensor, cached: bool = False
) -> Tensor:
    """The drafter's call inside a step: logits ``[b, G, V]`` of one forward over ``region``."""
    return drafter.logits(texts, rows, region, "draft", cached=cached)


def verifier_step(verifier: ModelBroker, texts: Texts, rows: Sequence[int], region: Tensor) -> Tensor:
    """The verifier's call inside a step."""
    return verifier.logits(texts, rows, region, "verify")
