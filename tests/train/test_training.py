"""Batches, optimizer, schedule, command line, and a whole smoke run."""

from __future__ import annotations

import json
import math
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from fast_dllm_v2 import Fast_dLLM_QwenForCausalLM
from llada2 import LLaDA2MoeModelLM
from sdar import SDARForCausalLM
from shared.network.loading import load_tokenizer
from tests.train.shipped import TINY
from train import make_tasks
from train.__main__ import main
from train.data import TRAINED_TO, WIDTH_STEP, batches, encode_rows
from train.loop import learning_rate_scale
from train.optim import Muon, optimizers, orthogonalise
from train.tasks import TASKS, held_out
from train.tokenizer import chat_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def test_rows_train_the_answer_and_its_padding(tokenizer):
    problems = held_out("instructions", 8)
    for problem, row in zip(problems, encode_rows(problems, tokenizer), strict=True):
        assert tokenizer.decode(row.ids[: row.start]) == chat_prompt(problem.prompt)
        assert tokenizer.decode(row.ids[row.start :]) == problem.solution + "<|im_end|>"
        assert row.stop % TRAINED_TO == 0
        assert 0 <= row.stop - len(row.ids) < TRAINED_TO


def test_batches_are_of_one_width_and_repeatable(tokenizer):
    weights = {"word_problems": 1.0, "instructions": 1.0}
    first, second = (
        list(islice(batches(tokenizer, weights, batch_tokens=2048, seed=1, workers=0), 4)) for _ in range(2)
    )
    for batch, again in zip(first, second, strict=True):
        assert torch.equal(batch.tokens, again.tokens)
        rows, width = batch.tokens.shape
        assert width % WIDTH_STEP == 0
        assert rows * width >= 2048 > (rows - 1) * width
        assert (batch.tokens[~batch.trained][-1:] != tokenizer.mask_token_id).all()
        ends = batch.trained.long().argmax(1) + batch.trained.sum(1)
        after = torch.arange(width) >= ends[:, None]
        assert (batch.tokens[after] == tokenizer.pad_token_id).all()


def test_learning_rate():
    """Warm-up over 100 steps, level until half time, then down to zero."""
    assert learning_rate_scale(0, 0.0) == pytest.approx(0.01)
    assert learning_rate_scale(500, 0.49) == 1.0
    assert learning_rate_scale(500, 0.75) == pytest.approx(0.5)
    assert learning_rate_scale(500, 1.0) == 0.0


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 48)])
def test_orthogonalise(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_solves_a_linear_problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(12, 8))
    target, x = torch.randn(12, 8, generator=generator), torch.randn(64, 8, generator=generator)
    optimizer, losses = Muon([weight]), []
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 100)
        loss = (x @ (weight - target).T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100


@pytest.mark.parametrize(
    ("family", "model_class", "least", "most"),
    [
        ("SDAR", SDARForCausalLM, 6.63, 7.23),
        ("Fast-dLLM-v2", Fast_dLLM_QwenForCausalLM, 13.26, 14.46),
        ("LLaDA2", LLaDA2MoeModelLM, 6.63, math.inf),
    ],
    ids=["SDAR", "Fast-dLLM-v2", "LLaDA2"],
)
def test_smoke_run_writes_a_checkpoint(tmp_path, capsys, family, model_class, least, most):
    """The loss starts at ln 1024 for each of its parts; that of LLaDA2 is divided by fewer positions than it sums over."""
    out = tmp_path / "model"
    command = [*f"{family} --steps 3 --size smoke --batch_tokens 1024 --device cpu --out".split(), str(out)]
    assert main(command) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["steps"] == 3
    assert least <= last["loss"] <= most
    model, tokenizer = model_class.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == model_class.config_class.model_type
    assert config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] == len(tokenizer)
    assert config["mask_token_id"] == tokenizer.mask_token_id
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1022, 1020]
    ids = torch.tensor([tokenizer("hi").input_ids])
    assert model(ids, torch.arange(ids.shape[1])[None]).isfinite().all()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["SDAR", "--out", "x"], "give --seconds or --steps"),
        (["SDAR", "--out", "x", "--steps", "0"], "steps 0 is too small"),
        (["SDAR", "--out", "x", "--steps", "1", "--size", "tinny"], "did you mean tiny"),
        (["SDAR", "--out", "x", "--step", "1"], "unrecognized arguments: --step 1"),
        (["SDRA"], "invalid choice: 'SDRA'"),
        (["SDAR", "--steps", "1"], "required: --out"),
        (["SDAR", "--out", "x", "--steps", "1", "--device", "gpu"], "device 'gpu'"),
        (["SDAR", "--out", str(TINY), "--steps", "1"], "has a config.json. Allowed: a new folder, or --overwrite"),
        (["tokenizer", "--out", str(TINY)], "has a config.json. Allowed: a new folder, or --overwrite"),
        (["SDAR", "--out", str(TINY / "config.json" / "x"), "--steps", "1"], "is under a file"),
        (["SDAR", "--out", "/proc/x", "--steps", "1"], "output folder '/proc/x' cannot be written"),
        (["probe", "--model", "SDAR/tiny", "--count", "0"], "count is 0. Allowed: a whole number, at least 1"),
        (["probe", "--model", ""], "model '' is empty"),
        (["probe", "--model", "/nowhere"], "no such folder"),
        (["probe", "--model", "SDAR/tiny", "--checkpoint", "draft=x"], "unknown role of SDAR 'draft'"),
        (["probe", "--model", "SDAR/tiny", "--family", "SADR"], "did you mean SDAR"),
    ],
)
def test_bad_arguments_are_one_line(command, message, capsys):
    assert main(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_a_checkpoint_is_written_over_when_asked(tmp_path):
    (tmp_path / "tokenizer.json").write_text("old")
    assert main(["tokenizer", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "tokenizer.json").read_text() == "old"
    assert main(["tokenizer", "--out", str(tmp_path), "--overwrite"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token == "<|MASK|>"


def test_help_writes_no_tasks(monkeypatch, tmp_path):
    monkeypatch.setattr(make_tasks, "FOLDER", tmp_path)
    for argv, code in ((["--help"], 0), (["--halp"], 2)):
        with pytest.raises(SystemExit) as stop:
            make_tasks.main(argv)
        assert stop.value.code == code
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(make_tasks, "PROBLEMS", 2)
    make_tasks.main([])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.jsonl" for name in sorted(TASKS)]


def test_shipped_folder_is_small_and_complete():
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 5_000_000
    assert {f.name for f in TINY.iterdir()} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


def test_decay_bounds_what_an_update_of_one_direction_builds_up():
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer, direction = Muon([weight], lr=0.1, decay=0.5), torch.eye(4, 6)
    for _ in range(200):
        weight.grad = -direction
        optimizer.step()
    assert 1.4 < float(torch.linalg.matrix_norm(weight.data, 2)) < 2.5, "about 1 / decay"


@pytest.mark.parametrize(("model_class", "decays"), [(Fast_dLLM_QwenForCausalLM, [0.0, 0.5]), (SDARForCausalLM, [0.0])])
def test_queries_and_keys_without_a_norm_are_decayed(model_class, decays):
    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = model_class(model_class.config_class(**sizes, num_key_value_heads=1, head_dim=4))
    steppers = optimizers(model)
    assert [s.param_groups[0]["decay"] for s in steppers if isinstance(s, Muon)] == decays
    held = [id(p) for s in steppers for group in s.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    attention = model.model.layers[0].self_attn
    decayed = {id(p) for group in steppers[-2].param_groups for p in group["params"]}
    assert (id(attention.q_proj.weight) in decayed, id(attention.v_proj.weight) in decayed) == (
        (True, False) if len(decays) > 1 else (True, True)
    )
