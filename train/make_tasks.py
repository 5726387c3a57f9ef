"""Writes the offline tasks' problems: ``python -m train.make_tasks``.

The same bytes every time; a test compares them with what is committed. More problems follow the old ones: the first 256 have stayed as they were.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shared.errors import run_main
from train.tasks import TASKS, held_out

PROBLEMS, SEED = 1024, 42
FOLDER = Path(__file__).parents[1] / "eval" / "tasks"


def lines(task: str) -> str:
    """``PROBLEMS`` held-out problems of ``task``, one JSON object a line."""
    return "".join(json.dumps(asdict(p), sort_keys=True) + "\n" for p in held_out(task, PROBLEMS, SEED))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the problems; there is nothing to choose."""
    argparse.ArgumentParser(prog="train.make_tasks", description=__doc__).parse_args(arguments)
    for name in TASKS:
        (FOLDER / f"{name}.jsonl").write_text(lines(name), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
