"""Adapters in training: saved, merged at load, named by their base; and the two commands of D2F from end to end."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from d2f.modeling_d2f import BACKENDS
from shared.errors import UserError
from shared.network.adapters import LoRA
from shared.network.loading import load_tokenizer
from tests.train.d2f_models import NAMES, batch, network
from tests.train.shipped import TINY
from train.__main__ import main
from train.data import encode_rows
from train.lora import Lora, adapt, adapted, adapter_off, base_name, save
from train.masked_diffusion import positions
from train.tasks import held_out

TARGETS = {"llada": ["attn_out", "k_proj", "q_proj", "v_proj"], "dream": ["k_proj", "o_proj", "q_proj", "v_proj"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_merges_to_the_student(tmp_path, name):
    network(name).save_pretrained(tmp_path)
    model, options = BACKENDS[name].from_pretrained(tmp_path), Lora(lora_r=4)
    tokens = batch().tokens
    plain = model(tokens, positions(tokens))
    adapt(model, options, 0)
    assert torch.equal(model(tokens, positions(tokens)), plain), "B is zero at first"
    for module in adapted(model).values():
        module.lora_A.data = module.lora_A.data.bfloat16().float()  # as it is saved
        module.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
        module.lora_B.data = module.lora_B.data.bfloat16().float()
    student = model(tokens, positions(tokens))
    assert (student - plain).abs().max() > 0.1
    with adapter_off(model):
        assert torch.equal(model(tokens, positions(tokens)), plain)
    save(model, str(tmp_path), tmp_path / "adapter", options)
    merged = BACKENDS[name].from_pretrained(tmp_path, adapter=tmp_path / "adapter")
    assert (merged(tokens, positions(tokens)) - student).abs().max() < 1e-5 * student.abs().max()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == TARGETS[name]
    assert config["base_model_name_or_path"] == ".."


def test_dropout_is_before_the_adapter_and_only_in_training():
    model = network("llada")
    adapt(model, Lora(lora_r=4, lora_dropout=0.5), 0)
    for module in adapted(model).values():
        module.lora_B.data.normal_(0, 0.1)
    tokens = batch().tokens
    one, two = (model.train()(tokens, positions(tokens)) for _ in range(2))
    assert not torch.equal(one, two)
    one, two = (model.eval()(tokens, positions(tokens)) for _ in range(2))
    assert torch.equal(one, two)


def test_names_of_bases(tmp_path):
    (tmp_path / "base").mkdir()
    assert base_name(str(tmp_path / "base"), tmp_path / "base" / "adapter") == ".."
    assert base_name(str(tmp_path / "base"), tmp_path / "elsewhere") == "../base"
    assert base_name("GSAI-ML/LLaDA-8B-Instruct", tmp_path) == "GSAI-ML/LLaDA-8B-Instruct"


def test_answers_padded_from_the_prompt_on():
    tokenizer, problems = load_tokenizer(TINY), held_out("instructions", 8)
    rows = encode_rows(problems, tokenizer, from_prompt=True)
    assert [r.ids for r in rows] == [r.ids for r in encode_rows(problems, tokenizer)]
    for row in rows:
        assert (row.stop - row.start) % 32 == 0
        assert 0 <= row.stop - len(row.ids) < 32


def test_other_tokenizers_have_their_own_template_and_end_of_turn():
    tokenizer, problems = load_tokenizer(TINY), held_out("instructions", 2)
    tokenizer.chat_template = "{{ '[' + messages[0]['content'] + ']' }}"
    tokenizer.convert_tokens_to_ids = lambda token: None
    for problem, row in zip(problems, encode_rows(problems, tokenizer), strict=True):
        assert tokenizer.decode(row.ids) == f"[{problem.prompt}]{problem.solution}<|endoftext|>"
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_rows(problems, tokenizer)


@pytest.fixture
def shipped_tokenizer(monkeypatch):
    """The tokenizer every run makes, without making it: `tests/train/test_tokenizer.py` compares the two."""
    monkeypatch.setattr("train.recipes.build_tokenizer", lambda: load_tokenizer(TINY))


def run(capsys, command: str) -> dict:
    assert main([*command.split(), "--batch_tokens", "512", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_both_commands(tmp_path, capsys, shipped_tokenizer, name):
    """A base, and an adapter inside its folder, which loads with it."""
    base = tmp_path / name
    about = run(
        capsys, f"D2F --role model --backend {name} --steps 2 --size smoke --out {base} --block_causal_share 0.5"
    )
    assert (about["backend"], about["size"], about["steps"]) == (name, "smoke", 2)
    weights = load_file(base / "model.safetensors")
    about = run(
        capsys, f"D2F --role adapter --base {base} --steps 4 --out {base}/adapter --lora_r 3 --self_align false"
    )
    assert (about["base"], about["steps"]) == (str(base), 4)
    assert LoRA.read(base / "adapter").rank == 3
    plain, merged = (BACKENDS[name].from_pretrained(base, adapter=a) for a in (None, base / "adapter"))
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, merged.get_parameter(n))}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    again = load_file(base / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())
    command = f"D2F --role adapter --base {base} --steps 4 --out {base}/adapter".split()
    assert main(command) == 2
    assert "has an adapter_config.json" in capsys.readouterr().err
    command = f"D2F --role model --backend {name} --steps 1 --size smoke --out {base} --overwrite".split()
    assert main(command) == 2
    assert "holds an adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--role adapter", "give --base"),
        ("--role adapter --base x --size smoke", "size means nothing here. Allowed: only with --role model"),
        ("--role adapter --base x --backend dream", "backend means nothing here"),
        ("--role adapter --base x --block_causal_share 0.5", "block_causal_share means nothing here"),
        ("--role adapter --base /nowhere", "no such folder"),
        ("--role adapter --base x --lora_r 0", "lora_r is 0. Allowed: at least 1"),
        (f"--role adapter --base {TINY}", "is of model_type 'sdar'. Allowed here: llada, Dream"),
        ("--role model --base x", "base means nothing here"),
        ("--role model --dtype float32", "dtype means nothing here"),
        ("--role model --lr 1", "lr means nothing here. Allowed: only with --role adapter"),
        ("--role model --backend sdar", "invalid choice: 'sdar'"),
        ("--role model --block_causal_share 2", "block_causal_share is 2.0. Allowed: at least 0.0 and at most 1.0"),
        ("--role model --size medium", "unknown size 'medium'"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, command, message, capsys):
    assert main(["D2F", *command.split(), "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
