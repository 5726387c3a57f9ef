"""The generated tasks, their mixture and their held-out split.

A problem is held out when the sha256 of its prompt falls into one of `HELD_OUT_ONE_IN` bins, so training and evaluation
never share a prompt, whatever the seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from random import Random

from shared.errors import unknown_name
from train import functions, instructions, word_problems
from train.problem import Problem, Task

HELD_OUT_ONE_IN = 64
TASKS: dict[str, Task] = {task.name: task for task in (word_problems.TASK, functions.TASK, instructions.TASK)}
WEIGHTS = {"word_problems": 0.55, "functions": 0.15, "instructions": 0.30}


def task_named(name: str) -> Task:
    """The task called ``name``."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


def is_held_out(prompt: str) -> bool:
    """Whether ``prompt`` belongs to evaluation. Stable over versions, machines and seeds."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def train_problems(weights: Mapping[str, float] = WEIGHTS, seed: int | str = 0) -> Iterator[Problem]:
    """Endless training problems, tasks drawn by weight; the same for the same seed."""
    rng, tasks = Random(f"train/{seed}"), [task_named(name) for name in weights]
    while True:
        problem = rng.choices(tasks, list(weights.values()))[0].sample(rng)
        if not is_held_out(problem.prompt):
            yield problem


def held_out(task: str, count: int, seed: int | str = 0) -> list[Problem]:
    """``count`` held-out problems of ``task`` with distinct prompts; the same for the same seed. A longer list begins with the shorter one."""
    rng, found = Random(f"held-out/{task}/{seed}"), {}
    sample = task_named(task).sample
    while len(found) < count:
        problem = sample(rng)
        if is_held_out(problem.prompt):
            found.setdefault(problem.prompt, problem)
    return list(found.values())
