"""Lines of JSON that a run appends as it goes, and that a later run finds."""

from __future__ import annotations

import json
from pathlib import Path

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
            for part in sorted(path.glob("predictions-*.jsonl")):
                self.found |= {r["key"]: r for r in read_lines(part) if "key" in r}
        mine = path / f"predictions-{rank}.jsonl"
        torn = resume and mine.is_file() and not mine.read_bytes().endswith(b"\n")
        self.file = mine.open("a" if resume else "w", encoding="utf-8")
        if torn:
            self.file.write("\n")

    def append(self, record: dict) -> None:
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.file = None


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
    """What the comparison needs of a text's trace, position by position of the returned tokens, and of each verify ``[step, span, accepted]``."""
    trace, first = completion.trace, completion.trace.prompt_length
    part = slice(first, first + len(completion.tokens))
    return {
        "ids": completion.tokens,
        "step": trace.step_of[part],
        "how": trace.how_of[part],
        "rank": trace.rank_of[part],
        "confidence": [round(c, 4) for c in trace.confidence_of[part]],
        "verified": [[k, s, a] for k, (s, a) in enumerate(zip(trace.verified_span, trace.accepted, strict=True)) if s],
    }
