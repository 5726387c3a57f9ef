"""Sizes and options of launches."""

from __future__ import annotations

import torch

from shared.gpu import launch


def test_pow2_rounds_up():
    assert [launch.pow2(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
    assert [launch.pow2(n, 16) for n in (1, 16, 17)] == [16, 16, 32]


def test_only_overlapping_launches_ask_for_it():
    assert launch.launch_options(False, 4, 2) == {"num_warps": 4, "num_stages": 2}
    assert launch.launch_options(True, 4, 2)["launch_pdl"] is True


def test_nothing_overlaps_off_the_gpu():
    assert not launch.overlapping_launch("cpu")
    assert launch.shared_memory(torch.device("cpu")) > 1 << 20


def test_kernels_run_on_a_cpu_only_when_interpreted(monkeypatch):
    monkeypatch.setattr(launch, "triton", object())
    for interpreted in (False, True):
        monkeypatch.setattr(launch, "_INTERPRET", interpreted)
        assert launch.available("cpu") is interpreted
        assert launch.available("cuda")
    monkeypatch.setattr(launch, "triton", None)
    assert not launch.available("cuda")
