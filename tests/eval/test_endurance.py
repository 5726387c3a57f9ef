"""A run killed at a random moment and resumed gives the scores of one that was left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from eval import endurance


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork server")
def test_three_kills():
    found = endurance.trial(3, limit=12, seed=7)
    assert [r["same"] for r in found] == [True] * 3
    assert any(r["alive"] for r in found)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("auto", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_two_processes_give_the_table_of_one(device, tmp_path):
    """Five problems, so that lm-eval pads one process's share. What processes tell each other goes through gloo."""
    script = tmp_path / "run.py"
    script.write_text("import sys\nfrom eval.endurance import run_cli\nrun_cli(sys.argv[1:])\n")
    one, two = tmp_path / "one", tmp_path / "two"
    endurance.finish(endurance.processes(), endurance.command("instructions", 5, one, device), one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*launcher, *endurance.command("instructions", 5, two, device)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [endurance.scores(folder) for folder in (one, two)]
    assert [f["decoding"].pop("processes") for f in found] == [1, 2]
    assert found[0] == found[1]
    assert found[0]["decoding"]["texts"] == 5
