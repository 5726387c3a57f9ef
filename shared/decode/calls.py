"""What a decoder is called with, and what it checks before its first forward: the prompts, the call, the options."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from shared.errors import UserError
from shared.options import FlatOptions
from shared.output import Completion
from shared.policy.accept import Verdict, accept_span


class Stop(tuple):
    """Stop strings. ``special`` are those that hold a special token: texts do not show it, so they are looked for in what ``raw_of(ids)`` decodes."""

    special: frozenset[str] = frozenset()
    raw_of: Callable[[list[int]], str] | None = None

    @classmethod
    def of(cls, strings: Any, tokenizer: Any) -> Stop:
        """``strings`` as a decoder is given them, one or several, seen with the special tokens of ``tokenizer``."""
        strings = (strings,) if isinstance(strings, str) else strings
        if not isinstance(strings, (tuple, list)) or not all(isinstance(s, str) and s for s in strings):
            raise UserError(f"stop is {strings!r}. Allowed: strings that are not empty")
        stop = cls(strings)
        hidden = special_texts(tokenizer) if stop else ()
        stop.special = frozenset(s for s in stop if any(text in s for text in hidden))
        if stop.special:
            stop.raw_of = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        return stop


def special_texts(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer, as they are written."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    listed = getattr(tokenizer, "all_special_tokens", ())
    return list(dict.fromkeys([*listed, *(token.content for token in added if token.special)]))


@dataclass(frozen=True, slots=True)
class Call:
    """How a list of prompts is decoded, whatever decodes them.

    ``attention_mask`` marks padding in prompts ``[B, P]``. ``batch_size`` texts are in flight at a time (default: all); waiting prompts join as others
    finish. ``stop``: a text ends with the block in which one of these strings appears, and is cut before it (needs ``tokenizer``); a string may hold
    special tokens. Randomness comes from
    ``(seed, number of the prompt)``, or from ``uniforms``, one recorded list per prompt; ``requests`` numbers the prompts otherwise than 0, 1, 2, ...
    ``on_block(request, new_ids)`` is called as blocks finish, ``on_finish(completion)`` as texts do. ``accept_rule`` replaces
    `shared.policy.accept.accept_span`: acceptance by a script, for benchmarks on weights that mean nothing.
    """

    attention_mask: Any = None
    uniforms: Sequence[Sequence[float]] | None = None
    seed: int = 0
    batch_size: int | None = None
    tokenizer: Any = None
    requests: Sequence[int] | None = None
    stop: Sequence[str] = ()
    on_block: Callable[[int, list[int]], None] | None = None
    on_finish: Callable[[Completion], None] | None = None
    accept_rule: Callable[..., Verdict] = accept_span

    def __post_init__(self):
        object.__setattr__(self, "stop", Stop.of(self.stop, self.tokenizer))

    def check(self, prompts: int) -> None:
        """Raise `UserError` for what does not fit ``prompts`` prompts."""
        if self.requests is not None and (len(self.requests) != prompts or len(set(self.requests)) != prompts):
            raise UserError(
                f"requests are {list(self.requests)}. Allowed: one number for each of the {prompts} prompts, all different"
            )
        if self.uniforms is not None and len(self.uniforms) != prompts:
            raise UserError(f"uniforms hold {len(self.uniforms)} lists. Allowed: one for each of the {prompts} prompts")
        if self.batch_size is not None and (type(self.batch_size) is not int or self.batch_size < 1):
            raise UserError(f"batch_size is {self.batch_size!r}. Allowed: an int of at least 1")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed is {self.seed!r}. Allowed: an int from 0 to {(1 << 63) - 1}")


CALL_KEYWORDS = tuple(f.name for f in fields(Call))


def split_call(kind: type[FlatOptions], options, flat: dict) -> tuple[FlatOptions, Call]:
    """Options and call from flat keywords; ``options`` given must be a ``kind``, and flat ones go on top."""
    flat = dict(flat)
    call = Call(**{name: flat.pop(name) for name in CALL_KEYWORDS if name in flat})
    if options is not None and type(options) is not kind:
        raise UserError(f"options is a {type(options).__name__}. Allowed: {kind.__name__}")
    return kind.from_flat(flat) if options is None else options.replace(**flat) if flat else options, call


class Job(NamedTuple):
    """What a decode was asked for, checked: ``prompts`` as lists of ids, ``options`` with every default filled in. It ``began`` then."""

    prompts: list[list[int]]
    options: Any
    call: Call
    began: float

    @property
    def rows(self) -> int:
        """Texts in flight at a time."""
        return min(self.call.batch_size or len(self.prompts), len(self.prompts))


def checked(model, input_ids, options, call: Call, resolve: Callable) -> Job:
    """The prologue of every decode. ``resolve(model, options, tokenizer)`` fills in what depends on the checkpoint. Raises `UserError` before any forward."""
    began = time.perf_counter()
    prompts, options = as_prompts(input_ids, call.attention_mask), resolve(model, options, call.tokenizer)
    check_prompts(prompts, options.blocks, model.config)
    call.check(len(prompts))
    return Job(prompts, options, call, began)


def as_prompts(input_ids, attention_mask=None) -> list[list[int]]:
    """``[P]`` or ``[B, P]`` ids (tensor, array or list), or a list of id lists of any lengths -> one list of ids per prompt.

    ``attention_mask [B, P]`` (1 = token, 0 = padding) removes padding on either side.
    """
    rows = _rows(input_ids)
    if attention_mask is None:
        return rows
    keep = _rows(attention_mask)
    if [len(k) for k in keep] != [len(r) for r in rows]:
        raise UserError("attention_mask has another shape than input_ids")
    return [[t for t, here in zip(r, k, strict=True) if here] for r, k in zip(rows, keep, strict=True)]


def _rows(values) -> list[list]:
    """One list of plain numbers per row of a tensor, an array or a nested list; a flat one is one row."""
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else x  # noqa: E731
    rows = [plain(row) for row in plain(values)]
    if rows and not isinstance(rows[0], (list, tuple)):
        rows = [rows]
    return [[plain(value) for value in row] for row in rows]


def check_prompts(prompts: list[list[int]], blocks, config) -> None:
    """Raise `UserError` for a prompt that is empty, holds ids it must not hold, or does not fit the model.

    Blocks are decoded whole, so the last one must lie within the model's positions even where its tail is cut off; where ``blocks.ends_anywhere`` texts end
    in the middle of one.
    """
    unit = 1 if getattr(blocks, "ends_anywhere", False) else blocks.block_length
    whole_blocks = config.max_position_embeddings // unit * unit
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
