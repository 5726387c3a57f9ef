"""Prompt files, and prompts through a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from shared.errors import UserError


def read_prompt_file(path: str | Path) -> list[dict]:
    """Prompts of a file, each as ``{"prompt": text}`` or ``{"messages": [...]}`` plus whatever else its line held.

    ``.jsonl``: one JSON object a line with ``prompt`` (or ``question``) or ``messages``; a bare JSON string is a prompt too. Anything else: one
    prompt a line. Empty lines are skipped. Raises `UserError` naming the line before anything is decoded.
    """
    path = Path(path)
    try:
        # Not splitlines: a JSON string and a prompt may hold U+2028 and the like, which it takes for line ends.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file {str(path)!r} cannot be read ({error})") from error
    records = [
        _record(line, f"prompt_file {path}, line {n}") if path.suffix == ".jsonl" else {"prompt": line}
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not records:
        raise UserError(f"prompt_file {str(path)!r} holds no prompt")
    return records


def _record(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg} at column {error.colno})") from error
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: {type(record).__name__} found. Allowed: an object with 'prompt' or 'messages', or a string"
        )
    if record.get("prompt") is None and "question" in record:
        record = {**record, "prompt": record["question"]}
    try:
        _check_record(record)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return record


def as_typed(argument: str) -> str:
    """A prompt of a command line, which is UTF-8 where Python, in another locale, took its bytes one by one."""
    try:
        return argument.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"prompt is no UTF-8 text ({error.reason} at byte {error.start})") from error


def check_text(text: str, what: str) -> None:
    """Raise `UserError` for half a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds {text[error.start]!a}, half a character. Allowed: Unicode text") from None


def _check_record(record: dict) -> None:
    """Raise `UserError` unless the record has messages, each a role and a text, or else a prompt that says something."""
    messages, prompt = record.get("messages"), record.get("prompt")
    if messages and isinstance(messages, list):
        for k, message in enumerate(messages):
            parts = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
            if not all(isinstance(part, str) for part in parts):
                raise UserError(f"message {k} is no object with texts under 'role' and 'content'")
            for part in parts:
                check_text(part, f"message {k}")
    elif messages or not isinstance(prompt, str):
        raise UserError("no text under 'prompt' and no list under 'messages'")
    elif not prompt.strip():
        raise UserError("the prompt is empty. Allowed: some text")
    else:
        check_text(prompt, "the prompt")


def encode_prompt(tokenizer, record: dict, *, chat: bool = True) -> list[int]:
    """Token ids of a record of `read_prompt_file`: through the chat template, or as plain text without special tokens."""
    _check_record(record)
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    if not chat:
        return tokenizer("\n".join(m["content"] for m in messages), add_special_tokens=False)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; --no_chat sends the prompt as it is")
    text = templated(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def templated(tokenizer, messages: list[dict], **how) -> str:
    """``messages`` through the chat template; `UserError` where it refuses them, or is damaged."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # of jinja2, or what a template raises
        reason = " ".join(f"{error or type(error).__name__}".split())[:200]
        raise UserError(
            f"the chat template fails ({reason}). Allowed: messages that it takes, or none (--no_chat)"
        ) from error


def spell_out(tokenizer, ids: list[int], mask_id: int) -> list[int]:
    """``ids`` of a prompt whose text wrote the mask token out: there it is words, since a mask means 'to be decoded'."""
    if mask_id not in ids:
        return ids
    written = tokenizer.convert_ids_to_tokens(mask_id)
    words = tokenizer(written, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [token for i in ids for token in (words if i == mask_id else [i])]
