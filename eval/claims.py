"""One run at a time in a folder of results."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

from shared.errors import UserError
from shared.scripts.store import check_writable

_HELD: dict[Path, TextIO] = {}


def claim(folder: str | Path) -> None:
    """Make ``folder`` this process's until `release` or its end. Raises `UserError` where it cannot be used or another process holds it."""
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
            f"output folder {str(folder)!r} is in use by another run. Allowed: another folder, or this one when that run has ended"
        ) from None
    _HELD[place] = file


def release(folder: str | Path | None) -> None:
    """Let others have it."""
    file = None if folder is None else _HELD.pop(Path(folder).resolve(), None)
    if file is not None:
        file.close()


def check_fresh(folder: str | Path, name: str) -> None:
    """Raise `UserError` if an earlier run left records called ``name`` in ``folder``: a new one would write over them."""
    found = [path for path in sorted(Path(folder).glob(f"{name}*.jsonl")) if path.stat().st_size]
    if found:
        raise UserError(
            f"output folder {str(folder)!r} holds results ({found[0].name}). Allowed: --resume, which keeps them, or another folder"
        )
