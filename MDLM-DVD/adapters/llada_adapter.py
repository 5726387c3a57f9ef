"""LLaDA checkpoints, in the published form: one call of `llada_generate` is one forward.

What the loop of this repository uses besides is ``network`` in the state: the same model, looked at by `mdlm_dvd.src.network.Network`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mdlm_dvd.src.network import Network
from shared.errors import UserError
from shared.network.loading import load_tokenizer

PLACEHOLDER = "{the prompt}"


def load_llada_model(
    model_id: str,
    device: str = "auto",
    dtype: str = "auto",
    chat: str | bool = "auto",
    cache: bool = True,
    runtime=None,
) -> dict[str, Any]:
    """``{model, tokenizer, template_prefix_ids, template_suffix_ids, network}``. ``chat``: is the prompt put into the tokenizer's chat template (``auto``: where
    there is one)? A network whose config names a ``block_size`` attends block by block, so that its ``cache`` may keep what is finished."""
    from shared.network.llada import LLaDAModelLM

    return state_of(LLaDAModelLM, model_id, device, dtype, chat, cache, runtime)


def state_of(kind: type, model_id: str, device: str, dtype: str, chat: str | bool, cache: bool, runtime=None) -> dict:
    """The state of a network class that sees prompt and region in one pass."""
    model, tokenizer = kind.from_pretrained(model_id, dtype=dtype, device=device), load_tokenizer(model_id)
    network = Network(model, getattr(model.config, "block_size", None) if cache else None)
    if runtime is not None:
        network.runtime = runtime
    return {"model": model, "tokenizer": tokenizer, "network": network, **template(tokenizer, chat)}


def template(tokenizer: Any, chat: str | bool = "auto") -> dict[str, Tensor]:
    """The ids before and after a prompt: those of the chat template, else the token that begins a text, where there is one."""
    wanted = tokenizer.chat_template is not None if chat == "auto" else chat
    if wanted and tokenizer.chat_template is None:
        raise UserError("chat is true, and the tokenizer has no chat template. Allowed: auto or false")
    if not wanted:
        begin = tokenizer.bos_token_id
        return {"template_prefix_ids": _ids([] if begin is None else [begin]), "template_suffix_ids": _ids([])}
    turn = [{"role": "user", "content": PLACEHOLDER}]
    before, _, after = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).partition(
        PLACEHOLDER
    )
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]
    return {"template_prefix_ids": _ids(parts[0]), "template_suffix_ids": _ids(parts[1])}


def _ids(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)


def llada_tokenize(
    prompt: str, state: Mapping[str, Any], tokenizer_max_len: int | None = None, truncate_prompt: bool = False
) -> Any:
    """``{"input_ids": [1, P]}``, without template and special tokens. A prompt longer than ``tokenizer_max_len`` is refused; ``truncate_prompt`` keeps its
    beginning, as published."""
    found = state["tokenizer"](prompt, add_special_tokens=False, return_tensors="pt")
    length = found["input_ids"].shape[1]
    if tokenizer_max_len is not None and length > tokenizer_max_len:
        if not truncate_prompt:
            raise UserError(
                f"the prompt has {length} tokens. Allowed: {tokenizer_max_len} (tokenizer_max_len); --truncate_prompt keeps its beginning"
            )
        found = {"input_ids": found["input_ids"][:, :tokenizer_max_len]}
    return found


def llada_generate(
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    initialize: bool = False,
    gen_length: int | None = None,
    mask_id: int = 126336,
    prompt_len: int | None = None,
) -> dict[str, Any]:
    """One forward: ``{"logits": [B, gen_length, V], "tokens": None}``, row ``j`` scoring place ``j`` of the region.

    ``tensors``: ``input_ids [B, P]`` (with ``initialize``, which appends the masks) or ``[B, P + gen_length]``, and perhaps ``attention_mask``, 0 where a
    prompt is padded. The template goes around each prompt; padding moves to its left and is not seen, so that a row's logits are those of the row alone.
    """
    model, content = state["model"], tensors["input_ids"]
    content = content.to(model.device)
    given = tensors.get("attention_mask")
    real = torch.ones_like(content, dtype=torch.bool) if given is None else given.to(model.device).bool()
    if initialize:
        content = torch.nn.functional.pad(content, (0, gen_length), value=mask_id)
        real = torch.nn.functional.pad(real, (0, gen_length), value=True)
    if prompt_len is None:
        if gen_length is None:
            raise UserError("neither gen_length nor prompt_len is given. Allowed: one of them")
        prompt_len = content.shape[1] - gen_length
    prefix, suffix = (
        state[k].to(content) if k in state else content.new_zeros(0)
        for k in ("template_prefix_ids", "template_suffix_ids")
    )
    rows = [
        torch.cat([prefix, ids[:prompt_len][seen[:prompt_len]], suffix, ids[prompt_len:]])
        for ids, seen in zip(content, real, strict=True)
    ]
    width, length = max(map(len, rows)), content.shape[1] - prompt_len
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=mask_id) for row in rows])
    before = torch.tensor([width - len(row) for row in rows], device=ids.device)[:, None]
    columns = torch.arange(width, device=ids.device)
    inside = columns >= before
    mask = inside[:, None, :] | torch.eye(width, dtype=torch.bool, device=ids.device)
    logits = model(ids, (columns - before).clamp(min=0), None, mask, logits_at=slice(width - length, None))
    return {"logits": logits, "tokens": None}
