"""One judge for generated problems and for the answers of prompt files."""

from __future__ import annotations

import pytest

from shared.scripts.judging import is_solved, meets_check, needs_run


@pytest.mark.parametrize(
    ("record", "text", "want"),
    [
        ({"answer": 12}, "3 x 4\n#### 12\n", True),
        ({"answer": "12"}, "12", True),
        ({"answer": 12}, "#### 1 #### 13", False),
        ({}, "#### 12", None),
        ({"answer": "3 x 4 = 12\n#### 12"}, "so\n#### 12", True),
        ({"answer": "3 x 4 = 12\n#### 12"}, "12", True),
        ({"answer": "3 x 4 = 12\n#### 12"}, "3 x 4 = 12\n#### 13", False),
        ({"expected": "a b"}, " a b\n", True),
        ({"check": {"answer": 12}}, "#### 12", True),
        ({"check": {"answer": 12}, "answer": 3}, "#### 3", False),
        ({"check": {"answer": 12}}, "12", False),
        ({"check": {"rules": [{"rule": "contains", "words": ["b"]}]}}, "abc", True),
        ({"check": {"tests": ["assert f() == 1"]}}, "def f(): return 1", None),
    ],
)
def test_is_solved(record, text, want):
    assert is_solved(record, text) is want


def test_tests_are_run_by_who_is_asked_to():
    asked = []

    def run(program: str) -> bool:
        asked.append(program)
        return len(asked) > 1

    check = {"tests": ["assert f() == 1"]}
    assert needs_run(check)
    assert not needs_run({"answer": 1})
    assert [meets_check(check, "```python\nf = 1\n```", run) for _ in range(2)] == [False, True]
    assert asked[0] == "f = 1\n\nassert f() == 1\n"
