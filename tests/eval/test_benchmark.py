"""The benchmark runs, its floor is arithmetic, its last line is JSON, and acceptance by a script accepts what the script says."""

from __future__ import annotations

import json

import pytest
import torch

from eval import benchmark
from eval.roofline import Machine, dense_work
from sdar import SDARConfig, SDARForCausalLM, generate_ssd_policy
from shared.errors import UserError
from tests.family_checks import golden_folder

SMALL = ["--device", "cpu", "--batch", "1", "2", "--new_tokens", "32", "--context", "16", "--prefill", "32"]


def run(capsys, *argv: str) -> tuple[str, dict]:
    benchmark.main([*SMALL, "--model", str(golden_folder("SDAR") / "model"), *argv])
    out = capsys.readouterr().out
    return out, json.loads(out.strip().splitlines()[-1])


def test_runs_on_a_cpu(capsys, tmp_path):
    out, result = run(
        capsys,
        "--block_length",
        "8",
        "--accept",
        "2",
        "--profile",
        str(tmp_path / "p.txt"),
        "--json",
        str(tmp_path / "r.json"),
    )
    assert "x" in out
    assert [d["rows"] for d in result["decodes"]] == [1, 1, 2, 2]
    assert all(d["tokens_per_second"] > 0 for d in result["decodes"])
    assert all(r["ms"] > 0 and r["floor_ms"] > 0 for r in result["forwards"])
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert "microseconds and launches a step" in (tmp_path / "p.txt").read_text()


def test_scripted_acceptance_counts():
    """Blocks of 8 from position 0, 3 accepted and 1 replaced a step: two steps a block, and the second verify sees 4 tokens."""
    model = SDARForCausalLM.from_pretrained(golden_folder("SDAR") / "model")
    out = generate_ssd_policy.block_diffusion_generate(
        model, [1] * 8, block_length=8, max_new_tokens=16, stopping_criteria_idx=(), judge=benchmark.scripted(3)
    )
    trace = out.completions[0].trace
    assert trace.verified_span == [8, 4, 8, 4]
    assert trace.accepted == [3, 3, 3, 3]


def test_against_published_code(capsys):
    _, result = run(capsys, "--vs", "tests.eval.published_style:generate", "--vs-kwargs", '{"gen_length": 16}')
    assert result["decodes"][-1]["decode"] == "tests.eval.published_style:generate"
    assert result["decodes"][-1]["tokens_per_second"] > 0
    with pytest.raises(UserError, match="cannot be imported"):
        run(capsys, "--vs", "nowhere:nothing")


def test_floor_by_hand():
    """2 layers, hidden 4, one head of 4, feed-forward 8, vocabulary 10: 2 x (4 x 16 + 3 x 32) matrix weights, 2 x (2 x 4 + 2 x 4) + 4 of norms."""
    config = SDARConfig(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=4
    )  # fmt: skip
    model = SDARForCausalLM(config)
    body = 2 * (4 * 16 + 3 * 32) + 2 * (2 * 4 + 2 * 4) + 4
    work = dense_work(model, entries=3, tokens=5, logits=7, context=11)
    assert work.read_bytes == 4 * (body + 40) + 2 * 3 * 11 * (2 * 4) * 4
    assert work.operations == 2 * body * 15 + 2 * 40 * 7 + 4 * (3 * 5 * (11 + 5)) * (2 * 4)
    assert work.floor(Machine("slow reader", read=1.0, rate=1e9)) == work.read_bytes
    assert work.floor(Machine("slow calculator", read=1e9, rate=1.0)) == work.operations
    no_head = dense_work(model, entries=1, tokens=5, logits=0, context=0, causal=True)
    assert no_head.read_bytes == 4 * body
    assert no_head.operations == 2 * body * 5 + 4 * (5 * 2.5) * (2 * 4)


def test_a_named_shape_has_the_released_sizes():
    with torch.device("meta"):
        model = SDARForCausalLM(SDARConfig(**benchmark.SHAPES["sdar-8b"]))
    assert 2 * sum(p.numel() for p in model.parameters()) == pytest.approx(16_381_470_720, rel=1e-4)
