"""Programs as a user starts them, each in a process of its own that finds torch and transformers imported.

Importing them is most of what a short program does. A server imports them once and forks for each program. The child has arguments, a folder, an environment
and streams of its own, imports what is ours, and runs its file or module as ``__main__``; it ends as any interpreter does. That programs start without help is
shown by `tests/test_startup.py` and `tests/test_interrupts.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

PRELOADED = ("torch", "transformers", "transformers.modeling_rope_utils", "transformers.tokenization_utils_fast")


def run(
    words: Sequence[str], cwd: Path, *, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess:
    """``python words`` in the folder ``cwd``, to its end. ``env`` goes on top of this process's environment."""
    (done,) = run_together([words], cwd, envs=[env or {}], timeout=timeout)
    return done


def run_together(
    programs: Sequence[Sequence[str]], cwd: Path, *, envs: Sequence[Mapping[str, str]], timeout: float = 120
) -> list[subprocess.CompletedProcess]:
    """Programs that run at the same time, as the processes of one job do."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            {"words": list(words), "cwd": str(cwd), "env": {**os.environ, **ALONE, **env}, "streams": f"{folder}/{k}"}
            for k, (words, env) in enumerate(zip(programs, envs, strict=True))
        ]
        codes = _answer(asked, timeout)
        read = lambda k, name: Path(f"{folder}/{k}.{name}").read_text(errors="replace")  # noqa: E731
        return [
            subprocess.CompletedProcess(a["words"], code, read(k, "out"), read(k, "err"))
            for k, (a, code) in enumerate(zip(asked, codes, strict=True))
        ]


def run_ranks(words: Sequence[str], cwd: Path, size: int, *, timeout: float = 120) -> list[subprocess.CompletedProcess]:
    """``size`` processes of one program, which find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    envs = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return run_together([words] * size, cwd, envs=envs, timeout=timeout)


ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen:
    started = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **ALONE}, start_new_session=True,
    )  # fmt: skip
    atexit.register(_stop, started)
    return started


def _stop(server: subprocess.Popen) -> None:
    """With whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _answer(asked: list[dict], timeout: float) -> list[int]:
    server = _server()
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    if not select.select([server.stdout], [], [], timeout)[0]:
        _server.cache_clear()
        _stop(server)
        raise subprocess.TimeoutExpired([a["words"] for a in asked], timeout)
    return json.loads(server.stdout.readline())


def serve() -> None:
    """A line of programs in, a line of exit codes out. Returns in a child whose program has ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        children = []
        for program in json.loads(line):
            child = os.fork()
            if not child:
                return become(**program)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    return None


def become(words: list[str], cwd: str, env: dict[str, str], streams: str) -> None:
    """This process as ``python words`` would be."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate((os.devnull, f"{streams}.out", f"{streams}.err")):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve()
