"""A run killed at a random moment and resumed gives the scores of one that was left alone."""

from __future__ import annotations

import sys

import pytest

from eval import endurance


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork server")
def test_three_kills():
    found = endurance.trial(3, limit=16, seed=7)
    assert [r["same"] for r in found] == [True] * 3
    assert any(r["alive"] for r in found)
