"""One run at a time in a folder of results."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from shared.errors import UserError
from shared.scripts.store import check_writable

_HELD: dict[Path, TextIO] = {}


def claim(folder: str | Path) -> None:
    """Make ``folder`` this process's until `release` or its end. Raises `UserError` where it cannot be used or another
    process holds it."""
    folder = Path(folder)
    check_writable(folder)
    place = folder.resolve()
    if place in _HELD:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"output folder {str(folder)!r} cannot be written ({error.strerror}). Allowed: a folder of yours"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"output folder {str(folder)!r} is in use by another run. "
            "Allowed: another folder, or this one when that run has ended"
        ) from None
    _HELD[place] = file


def release(folder: str | Path | None) -> None:
    """Let others have it."""
    file = None if folder is None else _HELD.pop(Path(folder).resolve(), None)
    if file is not None:
        file.close()


def check_same(folder: str | Path, made_by: dict) -> None:
    """Raise `UserError`, naming the setting, unless what an earlier run left in ``folder`` was made by the same."""
    kept = Path(folder) / "made_by.json"
    if not kept.is_file():
        return
    try:
        before = dict(flattened(json.loads(kept.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{kept} is damaged ({error}). Allowed: another folder") from error
    now = dict(flattened(json.loads(json.dumps(made_by, default=str))))
    differ = [key for key in dict.fromkeys([*now, *before]) if now.get(key) != before.get(key)]
    if differ:
        key = differ[0]
        raise UserError(
            f"{key} is {now.get(key)!r}; the texts in {str(folder)!r} were made with {before.get(key)!r}. "
            "Allowed with --resume: the same, or another folder"
        )


def note(folder: str | Path, made_by: dict) -> None:
    """Keep with the results what makes them."""
    unfinished = Path(folder) / "made_by.json.part"
    unfinished.write_text(json.dumps(made_by, default=str, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, Path(folder) / "made_by.json")


def flattened(settings: dict, under: str = "") -> Iterator[tuple[str, object]]:
    """Every setting by one name: ``options block_length``."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{under}{key} ")
        else:
            yield f"{under}{key}", value


def check_fresh(folder: str | Path, name: str) -> None:
    """Raise `UserError` if ``folder`` holds records called ``name``: a new run would write over them."""
    found = [path for path in sorted(Path(folder).glob(f"{name}*.jsonl")) if path.stat().st_size]
    if found:
        raise UserError(
            f"output folder {str(folder)!r} holds results ({found[0].name}). "
            "Allowed: --resume, which keeps them, or another folder"
        )
