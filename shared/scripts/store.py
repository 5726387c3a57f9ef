"""Lines of JSON that a run appends as it goes, and that a later run finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from shared.output import Completion


class Store:
    """Records with a ``key``, one JSON line each, flushed as they come; ``found`` are those of an earlier run, by key.

    Every process writes a file of its own, ``predictions-RANK.jsonl``, and reads all of them. Without a folder nothing is kept.
    """

    def __init__(self, folder: str | Path | None, rank: int, resume: bool):
        self.found: dict[str, dict] = {}
        self.file = None
        if folder is None:
            return
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if resume:
            self.found = texts_in(path)
        self.file = opened(path / f"predictions-{rank}.jsonl", resume)

    def append(self, record: dict) -> None:
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.file = None


def texts_in(folder: Path) -> dict[str, dict]:
    """The finished texts that all processes left in a folder, by key."""
    parts = sorted(folder.glob("predictions-*.jsonl"))
    return {r["key"]: r for part in parts for r in read_lines(part) if "key" in r}


def opened(path: Path, resume: bool) -> TextIO:
    """The file, empty or (``resume``) to be appended to, after the half line that a killed run may have left."""
    torn = resume and path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    file = path.open("a" if resume else "w", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, one a line; the half line that a killed run leaves is passed over."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def trace_of(completion: Completion) -> dict:
    """What the comparison needs of a text's trace, position by position of the returned tokens; of each verify ``[step, span, accepted]`` and of each
    edit ``[step, position in the text, old id, new id]``."""
    trace, first = completion.trace, completion.trace.prompt_length
    part = slice(first, first + len(completion.tokens))
    return {
        "ids": completion.tokens,
        "step": trace.step_of[part],
        "how": trace.how_of[part],
        "rank": trace.rank_of[part],
        "confidence": [round(c, 4) for c in trace.confidence_of[part]],
        "verified": [[k, s, a] for k, (s, a) in enumerate(zip(trace.verified_span, trace.accepted, strict=True)) if s],
        "edits": [[k, p - first, old, new] for k, p, old, new in trace.edits if p < part.stop],
    }
