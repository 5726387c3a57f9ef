"""A sample of `tests.fuzz` and `tests.kills`, whose whole is run by hand. `python -m eval` is killed in `tests/eval/test_endurance.py`."""

from __future__ import annotations

import sys

import pytest

from tests.fuzz import fuzz
from tests.kills import kills


def test_bad_inputs_end_well():
    ends, wrong = fuzz(count=98, processes=1, seed=5)
    assert wrong == []
    assert sum(times for end, times in ends.items() if end.endswith("refused")) > 50


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork server")
def test_killed_runs_go_on():
    counts, wrong = kills(["script"], times=1, seed=1)
    assert wrong == []
    assert counts["script"]["some texts"] == 1
