"""What any decoder checks before its first forward: the prompts, the keywords of the call, the options."""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import UserError
from shared.options import FlatOptions

CALL_KEYWORDS = (
    "attention_mask",
    "seed",
    "batch_size",
    "tokenizer",
    "requests",
    "stop",
    "on_block",
    "on_finish",
    "accept_rule",
)


def split_call(kind: type[FlatOptions], options, flat: dict) -> tuple[FlatOptions, dict]:
    """``(options, keywords of the call)`` from flat keywords; ``options`` given must be a ``kind``, and flat ones go on top."""
    flat = dict(flat)
    call = {name: flat.pop(name) for name in CALL_KEYWORDS if name in flat}
    if options is not None and type(options) is not kind:
        raise UserError(f"options is a {type(options).__name__}. Allowed: {kind.__name__}")
    return kind.from_flat(flat) if options is None else options.replace(**flat) if flat else options, call


def check_prompts(prompts: list[list[int]], blocks, config) -> None:
    """Raise `UserError` for a prompt that is empty, holds ids it must not hold, or does not fit the model.

    Blocks are decoded whole, so the last one must lie within the model's positions even where its tail is cut off.
    """
    whole_blocks = config.max_position_embeddings // blocks.block_length * blocks.block_length
    room = whole_blocks - blocks.max_new_tokens
    if not prompts:
        raise UserError("there is no prompt")
    if room < 1:
        name, most = (
            ("max_new_tokens", whole_blocks - 1) if whole_blocks else ("block_length", config.max_position_embeddings)
        )
        raise UserError(
            f"{name} is {getattr(blocks, name)}. Allowed: at most {most} (max_position_embeddings {config.max_position_embeddings}, "
            f"blocks of {blocks.block_length}, a prompt of at least one token)"
        )
    for k, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {k} is empty. Allowed: at least one token")
        if len(prompt) > room:
            raise UserError(
                f"prompt {k} has {len(prompt)} tokens. Allowed: {room} ({whole_blocks} positions in whole blocks less "
                f"max_new_tokens {blocks.max_new_tokens}); --prompt_length truncates"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"prompt {k} has a token id outside the vocabulary. Allowed: 0 to {config.vocab_size - 1}")
        if blocks.mask_id in prompt:
            raise UserError(f"prompt {k} contains the mask token (id {blocks.mask_id}), which means 'to be decoded'")


def check_call(prompts: int, requests: Sequence[int] | None, uniforms, batch_size: int | None, seed: int) -> None:
    """Raise `UserError` for call keywords that do not fit ``prompts`` prompts."""
    if requests is not None and (len(requests) != prompts or len(set(requests)) != prompts):
        raise UserError(
            f"requests are {list(requests)}. Allowed: one number for each of the {prompts} prompts, all different"
        )
    if uniforms is not None and len(uniforms) != prompts:
        raise UserError(f"uniforms hold {len(uniforms)} lists. Allowed: one for each of the {prompts} prompts")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise UserError(f"batch_size is {batch_size!r}. Allowed: an int of at least 1")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise UserError(f"seed is {seed!r}. Allowed: an int from 0 to {(1 << 63) - 1}")
