"""What every generated task is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True, slots=True)
class Problem:
    """One exercise: ``prompt`` is shown, ``solution`` is trained on, ``check`` (plain JSON data) judges any answer."""

    task: str
    prompt: str
    solution: str
    check: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """A generator and its judge. A task has ``is_correct``, or ``test_program`` when judging means running a program.

    ``test_program(problem, text)`` is Python source that exits with 0 when ``text`` solves the problem. It contains
    model-written code: run it in a child process with limits.
    """

    name: str
    sample: Callable[[Random], Problem]
    is_correct: Callable[[Problem, str], bool] | None = None
    test_program: Callable[[Problem, str], str] | None = None
