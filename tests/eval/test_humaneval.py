"""HumanEval by the rules of D2F's scripts, on answers written by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from shared.scripts import sandbox

FILE = Path(__file__).parents[2] / "eval" / "tasks" / "humaneval.py"
spec = importlib.util.spec_from_file_location("humaneval_task", FILE)
humaneval = importlib.util.module_from_spec(spec)
spec.loader.exec_module(humaneval)

PROMPT = 'from typing import List\n\n\ndef double(numbers: List[int]) -> List[int]:\n    """Each number twice."""\n'
DOC = {
    "prompt": PROMPT,
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n",
}
BODY = "    return [2 * n for n in numbers]\n"


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        (BODY, True),
        ("    return numbers\n", False),
        ("", False),
        (f"{BODY}\nThis doubles each of them, as asked.", True),  # prose behind it
        (f"{BODY}\nprint(1 / 0)\nassert False\n", True),  # what the function does not need is not run
        (f"Here it is:\n```python\n{PROMPT}{BODY}```\nIt doubles them.", True),
        (f"```python\n{PROMPT}{BODY}", True),  # never closed
        (f"```python\n{PROMPT}    return numbers\n```\nor\n```python\n{PROMPT}{BODY}```", False),  # the first fence
        ("```python\ndef twice(n):\n    return FACTOR * n\n\n\nFACTOR = 2\n\n\ndef double(ns):\n    return [twice(n) for n in ns]\n```", True),
        ("```python\nimport operator\n\n\ndef double(ns):\n    return [operator.mul(n, 2) for n in ns]\n```", True),
        (f"{BODY}\n\ndef double(numbers):\n    return None\n", True),  # the first that returns
        ("```python\ndef double(numbers):\n    return twice(numbers)\n```", False),  # not there
    ],
)  # fmt: skip
def test_answers(text, passed):
    assert humaneval.judge(DOC, [text]) == {"acc": float(passed)}


def test_only_what_is_needed_is_kept():
    code = f"{PROMPT}\n{BODY}\nLIMIT = 3\n\n\ndef other():\n    return LIMIT\n\n\nprint(other())\n"
    kept = humaneval.needed(code, "double")
    assert kept.startswith("from typing import List\n")
    assert "return [2 * n" in kept
    assert not any(word in kept for word in ("LIMIT", "other", "print"))
    assert "LIMIT = 3" in humaneval.needed(code, "other")


def test_a_program_is_what_the_sandbox_takes():
    assert sandbox.run(humaneval.program(DOC, BODY)).passed
    assert humaneval.program(DOC, BODY).endswith("check(double)")


def test_no_python_at_all_defines_nothing():
    assert humaneval.needed("no ( python", "double") == ""
