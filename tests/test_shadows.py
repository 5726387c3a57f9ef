"""A file of the user's that has the name of a package here is named, in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("file", "program", "message"),
    [
        ("shared/mine.py", "eval.docs", "error: shared is {folder}/shared, found before this repository's."),
        ("shared/__init__.py", "train", "error: shared is {folder}/shared, found before this repository's."),
        ("shared.py", "eval", "error: shared is {folder}/shared.py, found before this repository's."),
        ("sdar.py", "train", "error: family SDAR: sdar is {folder}/sdar.py, which has no sdar.family."),
    ],
)
def test_a_name_that_shadows_a_package_is_told(file, program, message, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    done = subprocess.run([sys.executable, "-m", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stderr.startswith(message.format(folder=tmp_path) + " Allowed: run from another folder")
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode in (1, 2)
