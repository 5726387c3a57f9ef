"""Ctrl-C ends every program with exit code 130 and without a traceback, also while it imports."""

from __future__ import annotations

import ast
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path
    for path in ROOT.glob("*/*.py")
    if path.parent.name not in ("tests", "build") and '\nif __name__ == "__main__":\n' in path.read_text()
)
STARTED = ["SDAR/generate_ssd_policy.py", "LLaDA2/example_llada.py", "eval", "eval.compare", "eval.benchmark", "train"]
GUARD = """if __name__ == '__main__':
    from shared.errors import end_on_interrupt
    end_on_interrupt()"""


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_program_begins_with_the_guard(path):
    body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
    assert ast.unparse(body[0]) == "from __future__ import annotations"
    assert ast.unparse(body[1]) == GUARD


def start(program: str, *arguments: str, watch: bool) -> subprocess.Popen:
    call = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    python = [sys.executable, *(["-X", "importtime"] if watch else [])]
    return subprocess.Popen(
        [*python, *call, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("program", STARTED)
def test_a_signal_amid_the_imports(program):
    """After the guard, a drawn number of imports later."""
    later = random.Random(program).randrange(1, 1500)
    with start(program, watch=True) as process:
        for line in process.stderr:
            if line.rstrip().endswith("shared.errors"):
                break
        for _ in range(later):
            process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-2000:]
    assert out == ""
    assert [line for line in err.splitlines() if not line.startswith("import time:")] == []


def test_a_signal_amid_the_work():
    with start("SDAR/generate.py", "--stream", "--device", "cpu", watch=False) as process:
        while not process.stdout.readline().startswith(">"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
