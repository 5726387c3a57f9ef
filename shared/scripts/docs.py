"""Tables in READMEs that are made from the code. ``python -m shared.scripts.docs FILE...`` rewrites them; a test says when one is stale.

A table stands between ``<!-- flags: module:Class -->`` and ``<!-- /flags -->`` and lists every field of an options class.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

from shared.options import ALIASES, FlatOptions

_MARKED = re.compile(r"(<!-- flags: ([\w.]+):(\w+) -->\n).*?(<!-- /flags -->)", re.DOTALL)


def flags_table(options: type[FlatOptions]) -> str:
    """A Markdown table: flag, default, meaning, allowed values, by group."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for title, group in options.groups().items():
        lines.append(f"| **{title}** | | |")
        hints = get_type_hints(group)
        for f in dataclasses.fields(group):
            others = [f"`--{s}`" for s in ALIASES.get(f.name, ()) if s != f.name]
            choices = [f"`{c}`" for c in get_args(hints[f.name]) if isinstance(c, str)]
            meaning = f.metadata["help"] + (f" (also {', '.join(others)})" if others else "")
            meaning += f": {', '.join(choices)}" if choices else ""
            lines.append(f"| `--{f.name}` | {f.default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def refreshed(text: str) -> str:
    """``text`` with every marked table made anew."""

    def table(match: re.Match) -> str:
        options = getattr(importlib.import_module(match[2]), match[3])
        return match[1] + flags_table(options) + match[4]

    return _MARKED.sub(table, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(refreshed(Path(name).read_text()))
