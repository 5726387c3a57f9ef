"""Runs model-written Python where it can harm nothing, and says whether it ran to its end.

The program runs in a child process (`jail.py`, Linux) inside its own user, process, network, mount and IPC namespaces: every file system is
read-only but for a small temporary folder in memory, there is no network and no other process to see, and a system-call filter refuses
sockets, new processes and mounts. Processor time, wall time, memory, open files and file sizes are limited. Where a limit cannot be had, `run` refuses.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UserError

_JAIL = Path(__file__).parent / "jail.py"
_GRACE = 10.0  # seconds for the interpreter to start, on top of the program's own
# Exit codes of jail.py; any other than these means that it could not set its limits.
_PASSED, _DIED = 77, 4
_REASONS = {_PASSED: "passed", 1: "failed", 2: "timed out", _DIED: "died"}
# No program may start threads here, and the libraries of numpy end the interpreter where they cannot.
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class Limits:
    """``seconds`` of wall time (and of processor time, rounded up); ``memory_mb`` of address space and ``files_mb`` of temporary files, in MiB."""

    seconds: float = 5.0
    memory_mb: int = 1024
    files_mb: int = 16


@dataclass(frozen=True, slots=True)
class Verdict:
    """``passed``: the program reached its end. ``reason``: passed, failed (an error, or it left early), timed out, or died.

    A program that died took the interpreter with it: by a signal, or by leaving without unwinding. ``how`` says which (``SIGSEGV``, ``exit code 0``).
    """

    passed: bool
    reason: str
    how: str = ""


DEATHS: list[str] = []  # how each program that `solves` saw dying in this process died


def solves(verdict: Verdict) -> bool:
    """Does the verdict solve a problem? A death does not; it is counted apart from a failed test."""
    if verdict.reason == "died":
        DEATHS.append(verdict.how)
    return verdict.passed


def told(deaths: Iterable[str]) -> str:
    """``deaths`` in a few words; none, nothing."""
    counts = Counter(deaths)
    how = ", ".join(f"{count} x {name}" for name, count in counts.most_common())
    return f"{counts.total()} programs died with their interpreter ({how}), counted as not solved" if counts else ""


def run(program: str, limits: Limits | None = None) -> Verdict:
    """Run Python source in the jail. Raises `UserError` with the reason where the limits cannot be had."""
    limits = limits or Limits()
    if sys.platform != "linux":
        raise UserError(f"model-written code cannot be confined on {sys.platform}. Allowed: Linux")
    numbers = map(str, (limits.seconds, limits.memory_mb, limits.files_mb))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(_JAIL), *numbers, folder],
                input=program.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=limits.seconds + _GRACE,
                start_new_session=True,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **_ONE_THREAD},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Verdict(False, "timed out")
    why = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode in _REASONS:
        reason = _REASONS[done.returncode]
        return Verdict(done.returncode == _PASSED, reason, why if done.returncode == _DIED else "")
    raise UserError(f"model-written code is not run, because it cannot be confined here: {why}")
