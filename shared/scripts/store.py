"""Records that a run appends to files as it goes, and that a later run finds."""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path

from shared.errors import UserError
from shared.scripts.files import append_whole, check_writable, whole_lines
from shared.scripts.identity import difference, note


class Store:
    """Records in a folder, one JSON object a line, written to disk as they come; ``found`` are those of earlier runs, by their ``key``.

    Every process appends to a file of its own, ``NAME.jsonl`` or ``NAME.rank1.jsonl`` and so on, and reads all of them. Nothing is written before the
    first record. ``run``: settings, kept in run.json, that all runs into one folder must share. ``resume`` off: what is there is not read, and this
    process's file begins anew. ``found``: what another process has read there, so that this one neither reads nor checks. Without a folder nothing is
    kept. Raises `UserError` where the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | Path | None,
        name: str,
        key: str,
        *,
        rank: int = 0,
        run: dict | None = None,
        resume: bool = True,
        found: dict | None = None,
    ):
        self.root = None if folder is None else Path(folder)
        self.key, self.rank, self.run, self.resume = key, rank, run, resume
        self.file: FileIO | None = None
        self.found: dict = found or {}
        if self.root is None:
            return
        self.path = self.root / (f"{name}.rank{rank}.jsonl" if rank else f"{name}.jsonl")
        if found is not None:
            return
        check_writable(self.root)
        if run is not None:
            self._check_run()
        if resume:
            self.found = records_in(self.root, name, key)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def append(self, record: dict) -> None:
        """Write a record; it is on disk when this returns."""
        if self.root is None:
            return
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="replace")
        try:
            if self.file is None:
                self._open()
            append_whole(self.file, line)
        except OSError as error:
            raise UserError(
                f"output folder {str(self.root)!r} takes no more ({error.strerror}). What is there is whole: "
                "the same command goes on with it once there is room"
            ) from error

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _open(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if self.run is not None:
            note(self.root / "run.json", self.run)
        if self.resume and self.path.is_file():
            os.truncate(self.path, len(whole_lines(self.path)))
        self.file = self.path.open("ab" if self.resume else "wb", buffering=0)

    def _check_run(self) -> None:
        """Raise `UserError` if the folder holds results of another run."""
        if differ := difference(self.root / "run.json", self.run):
            key, now, before = differ
            raise UserError(
                f"output folder {str(self.root)!r} holds results of other settings: {key} is {now}, there it was {before}. "
                "Allowed: the same settings, or another folder"
            )


def records_in(folder: Path, name: str, key: str) -> dict:
    """The records that all processes left in a folder, by key; of several with one key the last."""
    found = {}
    for path in [folder / f"{name}.jsonl", *sorted(folder.glob(f"{name}.rank*.jsonl"))]:
        if not path.is_file():
            continue
        try:
            records = [json.loads(line) for line in whole_lines(path).split(b"\n") if line]
            found |= {record[key]: record for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: not every line is a JSON object with {key!r} ({error})") from error
    return found
