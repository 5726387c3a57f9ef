"""A run killed at a random moment and resumed gives the scores of one that was left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from eval import endurance


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork server")
def test_three_kills():
    found = endurance.trial(3, limit=16, seed=7)
    assert [r["same"] for r in found] == [True] * 3
    assert any(r["alive"] for r in found)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("auto", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_two_processes_give_the_table_of_one(device, tmp_path):
    """Five problems, so that lm-eval pads one process's share. What processes tell each other goes through gloo."""
    script = tmp_path / "run.py"
    script.write_text("import sys\nfrom eval.endurance import run_cli\nrun_cli(sys.argv[1:])\n")
    found = []
    for processes in (1, 2):
        flags = endurance.command("instructions", 5, tmp_path / str(processes), device)
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        done = subprocess.run([sys.executable, *launcher, str(script), *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(endurance.scores(tmp_path / str(processes)))
    assert [f["decoding"].pop("processes") for f in found] == [1, 2]
    assert found[0] == found[1]
    assert found[0]["decoding"]["texts"] == 5
