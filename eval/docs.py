"""The tables of READMEs and the pages beside them that are made from code and from recorded results.

python -m eval.docs                      # make the tables of every page of the repository anew
python -m eval.docs SDAR/README.md       # of these files
python -m eval.docs --check              # write nothing; say which are stale, with exit code 1 where one is

A table stands between ``<!-- MAKER ... -->`` and ``<!-- /MAKER -->``, and what follows MAKER says which:

    <!-- flags: module:Class -->                       every field of an options class
    <!-- compare KIND: FILE [TASK] [PATTERN] -->       results.json of `eval.compare`; KIND is one of
                                                       `eval.results.TABLES`, PATTERN a regular expression for settings
    <!-- benchmark: FILE -->                           what `eval.benchmark --json` wrote

Each FILE is a path in the repository.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

from eval.results import TABLES
from eval.speed_tables import speed_tables
from shared.errors import Parser, UserError, run_main, unknown_name
from shared.family import imported
from shared.options import ALIASES, FlatOptions
from shared.scripts.files import write_whole

ROOT = Path(__file__).parents[1]


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


def recorded(root: Path, file: str) -> dict:
    """The JSON of a file in the repository."""
    if not (root / file).is_file():
        raise UserError(
            f"a README asks for {file}, which is not there. Allowed: what eval.compare or eval.benchmark wrote"
        )
    return json.loads((root / file).read_text(encoding="utf-8"))


def flags(arguments: str, root: Path) -> str:
    return flags_table(imported(arguments))


def compare(arguments: str, root: Path) -> str:
    """``KIND: FILE [TASK] [PATTERN]``"""
    kind, _, rest = arguments.partition(": ")
    file, task, pattern = [*rest.split(" ", 2), "", ""][:3]
    if kind not in TABLES:
        raise unknown_name("table", kind, TABLES)
    results = recorded(root, file)
    rows = [r for r in results["rows"] if task in ("", "all", r["task"]) and re.search(pattern, r["setting"])]
    return "\n".join(TABLES[kind](rows, results)) + "\n"


def benchmark(arguments: str, root: Path) -> str:
    return speed_tables(recorded(root, arguments))


MAKERS: dict[str, Callable[[str, Path], str]] = {"flags": flags, "compare": compare, "benchmark": benchmark}
_MARKED = re.compile(
    rf"(<!-- (?P<maker>{'|'.join(MAKERS)}):? (?P<arguments>(?:(?!-->)[^\n])+?) -->\n).*?(<!-- /(?P=maker) -->)",
    re.DOTALL,
)


def refreshed(text: str, root: Path = ROOT) -> str:
    """``text`` with every marked table made anew."""
    made = lambda match: match[1] + MAKERS[match["maker"]](match["arguments"], root) + match[4]  # noqa: E731
    return _MARKED.sub(made, text)


def readmes() -> list[Path]:
    """Every README of the repository, and the other pages beside them."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md"), *ROOT.glob("*/tiny/*/*.md")]
    return sorted(f for f in found if not f.relative_to(ROOT).parts[0].startswith("."))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: every page of the repository")
    parser.add_argument("--check", action="store_true", help="write nothing; name the files whose tables are stale")
    args = parser.parse_args(argv)
    stale = []
    for path in args.files or readmes():
        text = path.read_text(encoding="utf-8")
        fresh = refreshed(text)
        if fresh != text:
            stale.append(path)
            if not args.check:
                write_whole(path, fresh)
    for path in stale:
        print(f"{'stale' if args.check else 'written'}: {path}")
    if args.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
