"""Problems of the offline tasks and their judge, as lm-eval's task files name them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from datasets import Dataset

from shared.scripts import judging, sandbox


def load(file: str, **kwargs) -> dict[str, Dataset]:
    rows = [json.loads(line) for line in (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()]
    return {"test": Dataset.from_list([{**row, "check": json.dumps(row["check"])} for row in rows])}


# Decoders often write the same program; it is run once.
_verdict = lru_cache(maxsize=65536)(sandbox.run)


def _passes(program: str) -> bool:
    return sandbox.solves(_verdict(program))


def judge(doc: dict, results: list[str]) -> dict[str, float]:
    """``acc`` by the rules of the problem's generator; functions are run in the sandbox."""
    return {"acc": float(judging.meets_check(json.loads(doc["check"]), results[0], _passes))}
