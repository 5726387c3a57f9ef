"""Prompts as lists of token ids, whatever shape they arrive in, and prompt files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shared.errors import UserError


def as_prompts(input_ids, attention_mask=None) -> list[list[int]]:
    """``[P]`` or ``[B, P]`` ids (tensor or list), or a list of id lists of any lengths -> one list of ids per prompt.

    ``attention_mask [B, P]`` (1 = token, 0 = padding) removes padding on either side.
    """
    rows = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    if rows and not isinstance(rows[0], (list, tuple, torch.Tensor)):
        rows = [rows]
    rows = [r.tolist() if isinstance(r, torch.Tensor) else list(r) for r in rows]
    if attention_mask is None:
        return rows
    keep = attention_mask.tolist() if isinstance(attention_mask, torch.Tensor) else list(attention_mask)
    keep = keep if keep and isinstance(keep[0], (list, tuple)) else [keep]
    if [len(k) for k in keep] != [len(r) for r in rows]:
        raise UserError("attention_mask has another shape than input_ids")
    return [[t for t, here in zip(r, k, strict=True) if here] for r, k in zip(rows, keep, strict=True)]


def read_prompt_file(path: str | Path) -> list[dict]:
    """Prompts of a file, each as ``{"prompt": text}`` or ``{"messages": [...]}`` plus whatever else its line held.

    ``.jsonl``: one JSON object a line with ``prompt`` (or ``question``) or ``messages``; a bare JSON string is a prompt too. Anything else: one
    prompt a line. Empty lines are skipped. Raises `UserError` naming the line before anything is decoded.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
    if "prompt" not in record and "question" in record:
        record = {"prompt": record["question"], **record}
    if not isinstance(record.get("prompt"), str) and not isinstance(record.get("messages"), list):
        raise UserError(f"{where}: no text under 'prompt' and no list under 'messages'")
    return record


def encode_prompt(tokenizer, record: dict, *, chat: bool = True) -> list[int]:
    """Token ids of a record of `read_prompt_file`: through the chat template, or as plain text without special tokens."""
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    if "prompt" in record and not record["prompt"].strip():
        raise UserError("the prompt is empty. Allowed: some text")
    if not chat:
        return tokenizer("\n".join(m["content"] for m in messages), add_special_tokens=False)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; --no_chat sends the prompt as it is")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
