"""Figures and answer extraction of the published suite (``tests/golden/MDLM-DVD/metrics.json``), one test a case. ``GOLDEN_DIR=folder`` reads
``folder/MDLM-DVD`` instead."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mdlm_dvd.src.evals.suite.answers import extract_published
from mdlm_dvd.src.evals.suite.metrics import (
    accuracy,
    confidence_interval,
    distinct_n,
    prompt_sensitivity,
    token_entropy,
)

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden")) / "MDLM-DVD"
RECORDED = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))


def cases(kind: str):
    return pytest.mark.parametrize("case", [pytest.param(c, id=f"{kind}-{k}") for k, c in enumerate(RECORDED[kind])])


@cases("diversity")
def test_diversity(case):
    orders = [int(key.removeprefix("distinct_")) for key in case if key.startswith("distinct_")]
    assert orders
    for n in orders:
        assert distinct_n(case["samples"], n) == pytest.approx(case[f"distinct_{n}"])
    assert token_entropy(case["samples"]) == pytest.approx(case["entropy_bits"])


@cases("accuracy")
def test_accuracy(case):
    assert accuracy(case["predictions"], case["references"]) == pytest.approx(case["accuracy"])


@cases("confidence_interval")
def test_confidence_interval(case):
    assert confidence_interval(case["data"]) == pytest.approx((case["mean"], case["margin"]))


@cases("prompt_sensitivity")
def test_prompt_sensitivity(case):
    assert prompt_sensitivity(case["outputs"]) == pytest.approx((case["mean_similarity"], case["variance"]))


@cases("extract")
def test_extract(case):
    assert extract_published(case["task"], case["text"]) == case["result"]
