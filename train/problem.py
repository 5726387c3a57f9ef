"""What every generated task is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True, slots=True)
class Problem:
    """One exercise: ``prompt`` is shown, ``solution`` is trained on, ``check`` (plain JSON data) is what `shared.scripts.judging` judges an answer by."""

    task: str
    prompt: str
    solution: str
    check: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """A generator of problems."""

    name: str
    sample: Callable[[Random], Problem]
