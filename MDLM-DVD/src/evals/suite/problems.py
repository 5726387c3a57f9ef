"""The problems of the suite: three public data sets, and the offline tasks of this repository. Each problem knows how it is judged."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mdlm_dvd.src.evals.suite.answers import as_choice, as_number, extract_choice, extract_number
from shared.errors import UserError, unknown_name
from shared.scripts import judging, sandbox


@dataclass(frozen=True)
class Problem:
    """``solution`` is a text that solves it; ``judge(text)``: does a text?"""

    id: str
    prompt: str
    solution: str
    judge: Callable[[str], bool]


def gsm8k(row: Mapping, number: int) -> Problem:
    """Grade-school mathematics: the answer stands behind ``####``."""
    wanted = as_number(row["answer"].split("####")[-1])
    prompt = f"{row['question']}\nRespond with no steps, only with the answer.\nFormat: Answer: <number>"
    return Problem(str(number), prompt, f"Answer: {wanted}", lambda text: extract_number(text) == wanted)


def mmlu(row: Mapping, number: int) -> Problem:
    """Four choices, the answer is the index of one."""
    return _choices(str(number), row["question"], row["choices"], str(int(row["answer"]) + 1))


def arc_challenge(row: Mapping, number: int) -> Problem:
    """Three to five choices, whose keys are letters or numbers."""
    return _choices(str(row.get("id", number)), row["question"], row["choices"]["text"], row["answerKey"])


def _choices(name: str, question: str, choices: list[str], key: str) -> Problem:
    wanted = as_choice(key, len(choices))
    listed = "\n".join(f"{as_choice(str(k), len(choices))}. {choice}" for k, choice in enumerate(choices, 1))
    prompt = (
        f"{question}\n{listed}\nRespond with the letter of the right choice and nothing else. Format: Answer: <letter>"
    )
    return Problem(name, prompt, f"Answer: {wanted}", lambda text: extract_choice(text, len(choices)) == wanted)


# What the library `datasets` is asked for, and what makes a problem of a row.
PUBLIC: dict[str, tuple[tuple[str, str], str, Callable[[Mapping, int], Problem]]] = {
    "gsm8k": (("openai/gsm8k", "main"), "test", gsm8k),
    "mmlu": (("cais/mmlu", "all"), "test", mmlu),
    "arc_challenge": (("allenai/ai2_arc", "ARC-Challenge"), "test", arc_challenge),
}
OFFLINE = ("word_problems", "functions", "instructions")
NAMES = (*PUBLIC, *OFFLINE)


def tasks_folder() -> Path:
    """Where the offline tasks are: their problems, and the YAML files by which lm-eval finds them."""
    return Path(importlib.util.find_spec("eval").submodule_search_locations[0]) / "tasks"


def check(name: str, run_unsafe_code: bool) -> None:
    """Raise `UserError` for a data set there is not, and for one that runs programs which a model wrote, unless they may be."""
    if name not in NAMES:
        raise unknown_name("data set", name, NAMES)
    if name == "functions" and not run_unsafe_code:
        raise UserError(
            "data set 'functions' runs model-written code. Allowed: --confirm_run_unsafe_code, other data sets"
        )


def load(name: str, limit: int | None = None, *, run_unsafe_code: bool = False) -> list[Problem]:
    """All problems of a data set, or the first ``limit``. ``run_unsafe_code``: see `check`."""
    check(name, run_unsafe_code)
    rows = _offline(name) if name in OFFLINE else _public(name)
    return [problem for problem, _ in zip(rows, range(limit), strict=False)] if limit is not None else list(rows)


def _offline(name: str) -> Iterator[Problem]:
    lines = (tasks_folder() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        yield Problem(str(number), row["prompt"], row["solution"], _meets(row["check"]))


def _meets(check: Mapping) -> Callable[[str], bool]:
    run = lambda program: sandbox.solves(sandbox.run(program))  # noqa: E731
    return lambda text: bool(judging.meets_check(check, text, run))


def _public(name: str) -> Iterator[Problem]:
    import datasets

    (path, subset), split, problem_of = PUBLIC[name]
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # of the hub, the network or the file system, each with classes of its own
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data set {name!r} ({path}) cannot be had ({type(error).__name__}: {reason}). "
            f"Allowed: a machine that reaches the hub, or {', '.join(OFFLINE)}"
        ) from error
    for number, row in enumerate(rows):
        yield problem_of(row, number)
