"""Data and judges of the offline tasks, as lm-eval's task files name them."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

from eval import sandbox
from train.problem import Problem
from train.tasks import TASKS


def load(file: str, **kwargs) -> dict[str, Dataset]:
    rows = [json.loads(line) for line in (Path(__file__).parent / file).read_text().splitlines()]
    return {"test": Dataset.from_list([{**row, "check": json.dumps(row["check"])} for row in rows])}


def judge(doc: dict, results: list[str]) -> dict[str, float]:
    """``acc`` by the rules of the problem's generator; functions are run in the sandbox."""
    task = TASKS[doc["task"]]
    problem = Problem(doc["task"], doc["prompt"], doc["solution"], json.loads(doc["check"]))
    if task.is_correct:
        return {"acc": float(task.is_correct(problem, results[0]))}
    return {"acc": float(sandbox.run(task.test_program(problem, results[0])).passed)}
