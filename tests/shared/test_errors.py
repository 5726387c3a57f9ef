from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import UserError, run_main, unknown_name


def test_the_nearest_names_are_suggested():
    error = unknown_name("policy", "alway", ["always", "never"])
    assert isinstance(error, UserError)
    assert str(error) == "unknown policy 'alway'; did you mean always? Allowed: always, never"


def test_nothing_near():
    text = str(unknown_name("policy", "zzz", iter(["always", "never"])))
    assert "did you mean" not in text
    assert text.startswith("unknown policy 'zzz'")
    assert text.endswith("Allowed: always, never")


def test_no_name_is_told_twice():
    text = str(unknown_name("option", "block_lenght", ["block_length", "top_k", "block_length"]))
    assert text == "unknown option 'block_lenght'; did you mean block_length? Allowed: block_length, top_k"


def test_a_full_stop_stands_before_what_is_allowed():
    assert str(unknown_name("policy", "zzz", ["always"])) == "unknown policy 'zzz'. Allowed: always"


def test_a_reader_that_has_enough():
    """``program | head -1``: no traceback, and the exit code of the signal."""
    program = "from shared.errors import run_main\nrun_main(lambda: [print('x' * 99, flush=True) for _ in range(9999)])"
    done = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stdout.readline()
    done.stdout.close()
    assert done.stderr.read() == b""
    assert done.wait() == 141


def test_weights_that_are_not_finite_end_in_one_line(capsys):
    def decode():
        raise FloatingPointError("logits are not finite at step 3, first in layer 1")

    with pytest.raises(SystemExit) as stop:
        run_main(decode)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: logits are not finite at step 3, first in layer 1\n"


def ended(program: str, **more) -> subprocess.CompletedProcess:
    """A program's end; its main is ``main``."""
    program = f"from shared.errors import UserError, run_main\n{program}\nrun_main(main)"
    return subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, **more)


def test_a_terminal_that_shows_ascii_gets_question_marks():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = ended("main = lambda: print('中文 ±', '\\ud800')", stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "?? ? ?\n", "")


def test_output_to_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = ended("main = lambda: print('x')", stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_a_file_that_is_not_there_is_one_line():
    done = ended("main = lambda: open('/none/x')")
    assert (done.returncode, done.stderr) == (2, "error: /none/x: No such file or directory\n")
