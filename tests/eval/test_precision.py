"""What the precision report compares: the plain network with itself differs by nothing, bfloat16 by its rounding, a wrong network by more."""

from __future__ import annotations

import json

import pytest
import torch

from eval import precision
from sdar import SDARForCausalLM
from shared.family import FAMILIES
from shared.options import Runtime
from tests.family_checks import golden_folder

TIMED = FAMILIES["SDAR"].timed["model"]


def load(dtype: str, device: str = "cpu"):
    return SDARForCausalLM.from_pretrained(golden_folder("SDAR") / "model", dtype=dtype, device=device)


def test_rounding_is_seen_and_small(capsys):
    precision.main(["--model", str(golden_folder("SDAR") / "model"), "--context", "24", "--device", "cpu"])
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["differences"]
    # Which sums a CPU rounds to bfloat16 is its own affair: 0.052 was seen. A context one token shorter gives 1.7.
    assert 1e-5 < rows["plain"]["mean"] < 0.1
    assert rows["plain"]["mean"] <= rows["plain"]["largest"]


def test_a_wrong_network_is_seen():
    model = load("float32")
    right = precision.log_probabilities(model, TIMED, Runtime(fast=False), 24, 8)
    assert right.shape == (16, model.config.vocab_size)
    assert torch.equal(right, precision.log_probabilities(model, TIMED, Runtime(fast=False), 24, 8))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight.mul_(1.5)
    wrong = precision.log_probabilities(model, TIMED, Runtime(fast=False), 24, 8)
    assert (wrong - right).abs().mean() > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fast_bfloat16_is_as_near_to_float32_as_plain_bfloat16():
    models = precision.random_models(FAMILIES["SDAR"], "sdar-8b", torch.device("cuda"), torch.bfloat16)
    rows = precision.differences(models["model"], TIMED, 512, 16)
    assert rows["fast"]["mean"] <= precision.TOLERANCE * rows["plain"]["mean"]
