"""Files that a run writes: may they be, and are they whole whatever happens."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from io import FileIO
from pathlib import Path

from shared.errors import UserError


def check_writable(folder: Path) -> None:
    """Raise `UserError` unless ``folder`` is one, or can be made. Nothing is left there."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        which = "is a file" if there == folder else f"is under a file ({there})"
        raise UserError(f"output folder {str(folder)!r} {which}. Allowed: a folder")
    try:
        if not os.access(there, os.W_OK):
            raise PermissionError
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        message = f"output folder {str(folder)!r} cannot be written ({there}). Allowed: a folder of yours"
        raise UserError(message) from error


def check_file(flag: str, path: str | Path) -> None:
    """Raise `UserError` unless a file can be written to ``path``, which was given with ``flag``. Its folder need not be there."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {str(path)!r} is a folder. Allowed: a file")
    if not path.exists():
        check_writable(path.parent)
    elif not os.access(path, os.W_OK):
        raise UserError(f"{flag} {str(path)!r} cannot be written. Allowed: a file of yours")


def append_whole(file: FileIO, line: bytes) -> None:
    """Append all of ``line``, or nothing where the disk is full."""
    end = file.seek(0, os.SEEK_END)
    left = memoryview(line)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        file.truncate(end)
        raise


def whole_lines(path: Path) -> bytes:
    """The file less half a last line, which a killed run may leave."""
    kept = path.read_bytes()
    return kept[: kept.rfind(b"\n") + 1]


def write_whole(path: str | Path, text: str) -> None:
    """Write a file, whole or not at all: a kill or a full disk leaves the one that was there."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():  # a device
        path.write_text(text, encoding="utf-8")
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
