"""The generated tasks: deterministic, split by prompt, and judged by checkers that tell right from wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice, pairwise
from random import Random

import pytest

from shared.errors import UserError
from shared.scripts import judging
from train import word_problems
from train.tasks import TASKS, held_out, is_held_out, train_problems

WITH_CHECKER = [name for name in TASKS if not judging.needs_run(held_out(name, 1)[0].check)]


def _samples(task: str, count: int) -> list:
    rng = Random(7)
    return [TASKS[task].sample(rng) for _ in range(count)]


def _run(program: str) -> int:
    """The exit status of ``program``, read from standard input by a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-I", "-"], input=program.encode(), capture_output=True, timeout=60
    ).returncode


def test_same_seed_same_problems():
    assert list(islice(train_problems(seed=3), 50)) == list(islice(train_problems(seed=3), 50))
    assert list(islice(train_problems(seed=3), 50)) != list(islice(train_problems(seed=4), 50))
    assert held_out("functions", 5, seed=1) == held_out("functions", 5, seed=1)


def test_training_never_shows_a_held_out_prompt():
    assert not any(is_held_out(p.prompt) for p in islice(train_problems(), 3000))


@pytest.mark.parametrize("task", list(TASKS))
def test_held_out_prompts_are_distinct(task):
    problems = held_out(task, 40)
    assert len({p.prompt for p in problems}) == 40
    assert all(is_held_out(p.prompt) and p.task == task for p in problems)
    assert held_out(task, 24) == problems[:24], "more problems follow the old ones"


def test_the_split_is_pinned():
    """A change of the hash would move training prompts into evaluation under the shipped checkpoints."""
    assert [i for i in range(200) if is_held_out(str(i))] == [9, 95, 98, 114, 130, 169]


def test_unknown_task_is_named():
    with pytest.raises(UserError, match=r"unknown task 'function'.*did you mean functions"):
        held_out("function", 1)


@pytest.mark.parametrize("task", list(TASKS))
def test_checks_are_plain_json(task):
    for problem in _samples(task, 50):
        assert json.loads(json.dumps(problem.check)) == problem.check


@pytest.mark.parametrize("task", WITH_CHECKER)
def test_checker_accepts_the_solution(task):
    for problem in _samples(task, 1000):
        assert judging.meets_check(problem.check, problem.solution), problem


@pytest.mark.parametrize("task", WITH_CHECKER)
def test_checker_refuses_other_answers(task):
    """Nothing, noise, and the solution of the next problem are all wrong."""
    problems = _samples(task, 300)
    for problem, other in pairwise(problems):
        if other.check != problem.check:
            assert not judging.meets_check(problem.check, other.solution), (problem, other)
        assert not judging.meets_check(problem.check, "")
        assert not judging.meets_check(problem.check, "zz " + problem.solution[: len(problem.solution) // 2])


def test_instructions_refuse_one_wrong_character():
    """At the end of every answer but free lines, whose last word is free too."""
    for problem in _samples("instructions", 300):
        if all(rule["rule"] != "lines" for rule in problem.check["rules"]):
            assert not judging.meets_check(problem.check, problem.solution[:-2] + "#")


def test_word_problems_are_worked_right():
    """Every mark holds, each step's numbers are known by then, and the last result is the answer."""
    for problem in _samples("word_problems", 1000):
        marks = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", problem.solution)
        assert 2 <= len(marks) <= 6
        known = {int(n) for n in re.findall(r"\d+", problem.prompt)}
        known |= {factor for factor, words in word_problems.TIMES.items() if words in problem.prompt}
        for left, sign, right, result, shown in marks:
            a, b, c = int(left), int(right), int(result)
            assert c == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert shown == result
            assert {a, b} <= known
            assert 0 < c <= word_problems.LARGEST
            known.add(c)
        assert int(marks[-1][3]) == problem.check["answer"]


def test_word_answer_is_the_last_mark_exactly():
    problem = _samples("word_problems", 1)[0]
    answer = problem.check["answer"]
    assert judging.meets_check(problem.check, f"#### {answer + 1}\n#### {answer}")
    assert not judging.meets_check(problem.check, f"#### {answer}\n#### {answer + 1}")
    assert not judging.meets_check(problem.check, f"#### {answer}0")
    assert not judging.meets_check(problem.check, str(answer))


def test_function_solutions_run_and_corrupted_ones_fail():
    """One process for many programs: each in its own namespace, each of its own asserts counted."""
    problems = _samples("functions", 300)
    programs = [judging.test_program(p.check, p.solution) for p in problems]
    broken = [judging.test_program(p.check, re.sub(r"return (.+)", r"return [\1, 0]", p.solution)) for p in problems]
    assert all(len(p.check["tests"]) >= 3 for p in problems)
    judge = f"""
import sys
for program in {programs!r}:
    exec(program, {{}})
for program in {broken!r}:
    try:
        exec(program, {{}})
    except (AssertionError, TypeError):
        continue
    sys.exit("a broken function passed: " + program)
"""
    assert _run(judge) == 0


def test_function_program_of_unfenced_or_cut_text():
    problem = _samples("functions", 1)[0]
    code = judging.extract_code(problem.solution)
    assert judging.extract_code(code) == code
    assert judging.extract_code("```python\n" + code) == code
    assert _run(judging.test_program(problem.check, code)) == 0
    assert _run(judging.test_program(problem.check, "no code at all")) != 0


def test_docstring_examples_hold():
    """The example in a docstring agrees with the solution."""
    for problem in _samples("functions", 200):
        if found := re.search(r">>> (.+)\n +(.+)", problem.prompt):
            space: dict = {}
            exec(judging.extract_code(problem.solution), space)
            assert eval(found[1], space) == eval(found[2])
