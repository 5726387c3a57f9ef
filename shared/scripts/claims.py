"""One run at a time in a folder of results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from shared.errors import UserError
from shared.scripts.files import check_writable

try:
    import fcntl
except ImportError:  # Windows: there nobody is kept out
    fcntl = None

_HELD: dict[Path, TextIO] = {}


def claim(folder: str | Path, *, several: bool = False) -> None:
    """Make ``folder`` this process's until `release` or its end. Raises `UserError` where it cannot be used or another run holds it.

    ``several``: the other processes of this run will `join`. The folder is free again when all of them have ended, a killed one too.
    """
    folder = Path(folder)
    check_writable(folder)
    if folder.resolve() in _HELD:
        return
    _hold(folder, alone=True)
    if several:
        release(folder)
        _hold(folder, alone=False)


def join(folder: str | Path) -> None:
    """Hold ``folder`` too, in a run whose first process has made its claim."""
    if Path(folder).resolve() not in _HELD:
        _hold(Path(folder), alone=False)


def _hold(folder: Path, *, alone: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"output folder {str(folder)!r} cannot be written ({error.strerror}). Allowed: a folder of yours"
        ) from error
    try:
        if fcntl is not None:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"output folder {str(folder)!r} is in use by another run. Allowed: another folder, or this one when that run has ended"
        ) from None
    except OSError as error:
        file.close()
        raise UserError(
            f"output folder {str(folder)!r} cannot be locked ({error.strerror}). Allowed: a folder on a file system with locks"
        ) from error
    _HELD[folder.resolve()] = file


def release(folder: str | Path | None) -> None:
    """Let others have it."""
    file = None if folder is None else _HELD.pop(Path(folder).resolve(), None)
    if file is not None:
        file.close()


@contextmanager
def claimed(folder: str | Path | None, *, several: bool = False) -> Iterator[None]:
    """`claim` and `release` around what is done there; without a folder nothing."""
    if folder is not None:
        claim(folder, several=several)
    try:
        yield
    finally:
        release(folder)


def check_fresh(folder: str | Path, name: str) -> None:
    """Raise `UserError` if an earlier run left records called ``name`` in ``folder``: a new one would write over them."""
    found = [path for path in sorted(Path(folder).glob(f"{name}*.jsonl")) if path.stat().st_size]
    if found:
        raise UserError(
            f"output folder {str(folder)!r} holds results ({found[0].name}). Allowed: --resume, which keeps them, or another folder"
        )
