"""Programs in an interpreter of their own: they run, and import nothing that takes seconds and is not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = ["--device", "cpu", "--max_new_tokens", "4", "--prompt", "What is 2 + 3?"]
EVAL = "--model dllm --model_args pretrained=SDAR/tiny,max_new_tokens=4 --tasks instructions --limit 1 --apply_chat_template --output_path"
# The compiler of torch, what it computes sizes with, transformers' networks, and the metrics of a hub.
HEAVY = ("torch._dynamo.", "sympy.", "transformers.models.", "evaluate.")


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("SDAR", ["generate.py", *SHORT]),
        ("SDAR", ["generate_ssd_policy.py", *SHORT]),
        ("Fast-dLLM-v2", ["example_v2.py", *SHORT]),
        ("LLaDA2", ["example_llada.py", *SHORT]),
        ("D2F", ["example_d2f.py", *SHORT]),
        (".", ["-m", "eval", *EVAL.split()]),
        (".", ["-m", "eval.compare", "--help"]),
        (".", ["-m", "eval.benchmark", "--help"]),
        (".", ["-m", "train", "--help"]),
    ],
    ids=lambda words: " ".join(words[:2]) if isinstance(words, list) else words,
)
def test_a_program_runs_and_imports_little(folder, words, tmp_path):
    words = [*words, str(tmp_path)] if words[-1] == "--output_path" else words
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=ROOT / folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch" in imported
    assert [name for name in imported if f"{name}.".startswith(HEAVY)] == []
    if "--help" in words:
        assert "--output" in done.stdout or "--json" in done.stdout or "--seconds" in done.stdout
    elif words[0] == "-m":
        assert len(list(tmp_path.rglob("predictions.jsonl"))) == 1
    else:
        assert "forwards: " in done.stdout or "forwards/token" in done.stdout
