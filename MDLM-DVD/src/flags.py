"""Command lines of any flags: ``--key value``, ``--key=value``, bare ``--key`` (true), ``--no-key`` (false), values by the scalar rules of YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from mdlm_dvd.src.model import RUNTIME_NAMES, Pool
from shared.errors import UserError

ROLES = ("drafter", "verifier", "algorithm")
TEXTS = {"prompt", "prompt_file", "output_dir", "registry", *ROLES}  # whose values are text whatever they look like


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Flags by name, ``-`` as ``_``; ``--drafter.steps`` keeps its role. Raises `UserError` for a word without a flag and for a flag that comes twice."""
    found: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} belongs to no flag. Allowed: --NAME VALUE")
        name, equals, value = word[2:].partition("=")
        if equals:
            given = value if name in TEXTS else scalar(value)
        elif words and not words[0].startswith("--"):
            given = words.pop(0) if name in TEXTS else scalar(words.pop(0))
        elif name.startswith("no-"):
            name, given = name[3:], False
        else:
            given = True
        name = name.replace("-", "_")
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"--{name} is no name. Allowed: letters, digits and _")
        if name in found:
            raise UserError(f"--{name} is given twice. Allowed: once")
        found[name] = given
    return found


def scalar(text: str) -> Any:
    """``1`` an int, ``0.5`` and ``1e-3`` floats, ``true``, ``null``, ``[1, 2]``; anything else is text."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(found, str):
        try:
            return float(found) if any(c.isdigit() for c in found) else text  # YAML takes 1e-3 for text
        except ValueError:
            return text
    return found if isinstance(found, (int, float, bool, list, type(None))) else text


def pool_of(flags: dict[str, Any]) -> Pool:
    """The flags as values that functions may ask for. Raises `UserError` for names that the loop itself passes, and for roles there are not."""
    pool = Pool()
    for name, value in flags.items():
        role, dot, key = name.rpartition(".")
        if dot and role not in ROLES:
            raise UserError(f"--{name}: no such role. Allowed: {', '.join(f'--{r}.{key}' for r in ROLES)}")
        if key in RUNTIME_NAMES:
            raise UserError(f"--{name} is what the loop itself passes. Allowed: any other name")
        (pool.by_role.setdefault(role, {}) if dot else pool.shared)[key] = value
    return pool
