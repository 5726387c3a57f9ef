"""The benchmark runs, its floor is arithmetic, its last line is JSON, and acceptance by a script accepts what the script says."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from eval import benchmark
from eval.roofline import Machine, Touched, forward_work, touched_experts
from eval.shapes import family_of, shapes
from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from sdar import SDARConfig, SDARForCausalLM, generate_ssd_policy
from shared.errors import UserError
from shared.family import FAMILIES
from shared.gpu.graphs import Shape
from shared.output import Lossless, Output, Work
from shared.trace import Spent
from tests.family_checks import golden_folder

SMALL = ["--device", "cpu", "--batch", "1", "2", "--new_tokens", "32", "--context", "16", "--prefill", "32"]
MODEL = ["--model", str(golden_folder("SDAR") / "model")]


def run(capsys, *argv: str) -> tuple[str, dict]:
    benchmark.main([*SMALL, *argv])
    out = capsys.readouterr().out
    return out, json.loads(out.strip().splitlines()[-1])


def test_runs_on_a_cpu(capsys, tmp_path):
    out, result = run(
        capsys,
        *MODEL,
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
    assert all(r["ms"] > 0 and r["floor_ms"] > 0 and r["of_datasheet"] is None for r in result["forwards"])
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert "microseconds and launches a step" in (tmp_path / "p.txt").read_text()


def test_the_shifted_family(capsys):
    out, result = run(capsys, "--family", "Fast-dLLM-v2", "--block_length", "16", "--accept", "2")
    assert "draft with block cache, 2 x 8 tokens" in out
    assert [d["rows"] for d in result["decodes"]] == [1, 1, 2, 2]
    assert all(d["batch_forwards"]["draft"] > 0 for d in result["decodes"])


def test_a_mixture_of_experts_tells_what_it_touched(capsys, tmp_path):
    model = LLaDA2MoeModelLM.from_pretrained(golden_folder("LLaDA2") / "model")
    model.config.mask_token_id = model.config.vocab_size - 1
    model.save_pretrained(tmp_path)
    out, result = run(capsys, "--block_length", "8", "--decodes", "false", "--model", str(tmp_path))
    assert "experts a layer" in out
    assert result["decodes"] == []
    for line in result["forwards"]:
        assert 0 < line["expert_bytes"] < line["read_bytes"]


def test_family_comes_from_shape_or_model():
    assert family_of(None, "llada2-mini", None) is FAMILIES["LLaDA2"]
    assert family_of(None, None, str(golden_folder("Fast-dLLM-v2") / "model")) is FAMILIES["Fast-dLLM-v2"]
    assert family_of(None, None, "Fast-dLLM-v2/tiny") is FAMILIES["Fast-dLLM-v2"]
    assert family_of(None, None, None) is FAMILIES["SDAR"]
    with pytest.raises(UserError, match="Allowed with this shape or model: SDAR"):
        family_of("LLaDA2", "sdar-8b", None)
    with pytest.raises(UserError, match="did you mean sdar-8b"):
        family_of(None, "sdar-8", None)


def test_scripted_acceptance_counts():
    """Blocks of 8 from position 0, 3 accepted and 1 replaced a step: two steps a block, and the second verify sees 4 tokens."""
    model = SDARForCausalLM.from_pretrained(golden_folder("SDAR") / "model")
    out = generate_ssd_policy.block_diffusion_generate(
        model, [1] * 8, block_length=8, max_new_tokens=16, stopping_criteria_idx=(), accept_rule=benchmark.scripted(3)
    )
    trace = out.completions[0].trace
    assert trace.verified_span == [8, 4, 8, 4]
    assert trace.accepted == [3, 3, 3, 3]


def test_against_published_code(capsys):
    _, result = run(capsys, *MODEL, "--vs", "tests.eval.published_style:generate", "--vs-kwargs", '{"gen_length": 16}')
    assert result["decodes"][-1]["decode"] == "tests.eval.published_style:generate"
    assert result["decodes"][-1]["tokens_per_second"] > 0
    with pytest.raises(UserError, match="cannot be imported"):
        run(capsys, *MODEL, "--vs", "nowhere:nothing")


def test_floor_by_hand():
    """2 layers, hidden 4, one head of 4, feed-forward 8, vocabulary 10: 2 x (4 x 16 + 3 x 32) matrix weights, 2 x (2 x 4 + 2 x 4) + 4 of norms."""
    config = SDARConfig(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=4
    )  # fmt: skip
    model = SDARForCausalLM(config)
    body = 2 * (4 * 16 + 3 * 32) + 2 * (2 * 4 + 2 * 4) + 4
    work = forward_work(model, entries=3, tokens=5, logits=7, context=11)
    assert work.read_bytes == 4 * (body + 40) + 2 * 3 * 11 * (2 * 4) * 4
    assert work.operations == 2 * body * 15 + 2 * 40 * 7 + 4 * (3 * 5 * (11 + 5)) * (2 * 4)
    assert Machine("slow reader", read=1.0, rate=1e9).floor(work) == work.read_bytes
    assert Machine("slow calculator", read=1e9, rate=1.0).floor(work) == work.operations
    riding = forward_work(model, entries=3, tokens=5, logits=7, context=11, rows=2)
    assert riding.read_bytes == 4 * (body + 40) + 2 * 2 * 11 * (2 * 4) * 4, "what is cached of a row is read once"
    assert riding.operations == work.operations
    no_head = forward_work(model, entries=1, tokens=5, logits=0, context=0, causal=True)
    assert no_head.read_bytes == 4 * body
    assert no_head.operations == 2 * body * 5 + 4 * (5 * 2.5) * (2 * 4)


def test_share_of_the_data_sheet():
    assert Machine("NVIDIA H200", read=4.3e12, rate=1.0).of_datasheet(2.4e12) == 0.5
    assert Machine("NVIDIA H100 80GB HBM3", read=1.0, rate=1.0).of_datasheet(3.35e12) == 1
    assert Machine("CPU, 2 threads", read=1e10, rate=1.0).of_datasheet(1e10) is None


def test_a_known_device_shows_it(capsys):
    table = benchmark.Forwards(None, Machine("NVIDIA L40S", read=0.8e12, rate=1e15), None, 8, 16, "drafter: ")
    table.add("draft", 2.0, Work(read_bytes=0.864e12, operations=0.0), Touched())
    assert table.rows == [
        {"forward": "drafter: draft", "ms": 2000.0, "floor_ms": 1080.0, "over_floor": 1.85, "read_bytes": 864000000000, "of_datasheet": 0.5}
    ]  # fmt: skip
    assert "50.0 % of the datasheet bandwidth" in capsys.readouterr().out


def test_experts_by_hand():
    """One layer of 8 experts of 3 x 4 x 16 weights; 5 tokens of 2 experts each."""
    config = LLaDA2MoeConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=16, first_k_dense_replace=1,
        intermediate_size=8, num_experts=8, n_group=2, topk_group=1, moe_intermediate_size=4,
    )  # fmt: skip
    model = LLaDA2MoeModelLM(config)
    ids = torch.arange(5)[None]
    same = torch.zeros_like(ids)
    spread, one = (touched_experts(model, [lambda i=i: model(i, same)]) for i in (ids, same))
    assert one == Touched(2, 10), "equal tokens at equal positions choose the same experts"
    assert 2 <= spread.experts <= 8
    none = forward_work(model, entries=1, tokens=5, logits=0, context=0)
    some = forward_work(model, entries=1, tokens=5, logits=0, context=0, touched=one)
    assert some.read_bytes - none.read_bytes == 2 * (3 * 4 * 16) * 4
    assert some.operations - none.operations == 2 * 10 * (3 * 4 * 16)
    stacked = 8 * 3 * 4 * 16
    assert none.read_bytes == 4 * (sum(p.numel() for p in model.parameters()) - stacked - 2 * 160)


@pytest.mark.parametrize(
    ("shape", "size"), [("sdar-8b", 16_381_470_720), ("fast-dllm-v2-7b", 15_231_233_024), ("llada2-mini", 32.5e9)]
)
def test_a_named_shape_has_the_released_sizes(shape, size):
    """The 16B's bytes are known to three digits."""
    family = FAMILIES[shapes()[shape]]
    kind, config = family.networks["model"].model_class, family.shapes[shape]["model"]
    with torch.device("meta"):
        model = kind(kind.config_class(**config))
    assert 2 * sum(p.numel() for p in model.parameters()) == pytest.approx(
        size, rel=1e-4 if size > 4e10 or size < 3e10 else 0.01
    )


def test_time_without_graphs_is_each_lanes_forwards_times_one_of_its_kind():
    spent = {"target": {"prefill": Spent(1), "verify": Spent(3)}, "drafter": {"draft": Spent(5), "commit": Spent(2)}}
    output = Output([], 1.0, Lossless(True, ""), spent)
    times = {("target", 4, "verify"): 2.0, ("drafter", 4, "draft"): 0.5, ("drafter", 1, "draft"): 9.0}
    assert benchmark.seconds_by_kind(output, times, 4) == 3 * 2.0 + 5 * 0.5 + 2 * 0.5


def test_time_in_graphs_is_each_shape_times_its_replays(monkeypatch):
    replayed = []
    runner = SimpleNamespace(replay=lambda shape, logit_rows: replayed.append((shape, logit_rows)))
    monkeypatch.setattr(benchmark, "timed", lambda call, device: call() or {16: 0.25, 20: 0.5}[replayed[-1][0].tokens])
    replays = Counter({Shape(1, 16): 4, Shape(2, 20, picks=4): 3})
    assert benchmark.seconds_in_graphs(runner, replays, "cpu") == 4 * 0.25 + 3 * 0.5
    assert replayed == [(Shape(1, 16), 1), (Shape(2, 20, picks=4), 2)]


@pytest.mark.parametrize("flag", ["--json", "--profile"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(flag, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "load", lambda *a: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "x", "/proc/none/x"):
        with pytest.raises(UserError, match="Allowed: a f"):
            benchmark.main([*SMALL, flag, str(place)])
