"""What does not fit into memory is refused in one line, with the bytes it needs and those that are free, before it is allocated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from eval.shapes import random_models
from llada2 import LLaDA2MoeModelLM
from sdar import SDARForCausalLM
from sdar.generate_ssd_policy import block_diffusion_generate
from shared.errors import UserError
from shared.family import FAMILIES
from shared.network import memory
from shared.network.memory import SMALL, check_room, free_bytes
from tests.family_checks import golden_folder

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(golden_folder("SDAR") / "model", tmp_path / "model"))


def edited(folder: Path, **fields) -> Path:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_needed_and_free_bytes_are_said(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 10**9)
    check_room("it", 3 * 10**9, CPU, "less")
    check_room("it", 10**30, "meta", "less")
    with pytest.raises(UserError, match=r"^it needs 3000000001 bytes \(3 GB\), cpu has 3000000000 \(3 GB\) free. Allowed: less$"):  # fmt: skip
        check_room("it", 3 * 10**9 + 1, CPU, "less")
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    check_room("it", 10**30, CPU, "less")


def test_what_is_free_here():
    free = free_bytes(CPU)
    assert SMALL < free < 1 << 50


def test_a_containers_limit_counts(tmp_path):
    assert memory._of_group(tmp_path) is None
    for name, text in {"max": "max", "current": "700", "stat": "anon 9\ninactive_file 50\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._of_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._of_group(tmp_path) == 350


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**30}, f"num_hidden_layers {10**30}, the weight files hold"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers 5000, the weight files hold"),
        ({"hidden_size": 10**30}, "no network can be made of this config"),
        ({"vocab_size": 10**18}, "no network can be made of this config|the config asks for"),
        ({"intermediate_size": 10**12}, "the config asks for"),
    ],
    ids=str,
)
def test_a_config_of_any_size_is_refused_at_once(checkpoint, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        SDARForCausalLM.from_pretrained(edited(checkpoint, **fields))
    assert "\n" not in str(caught.value)


def test_experts_of_any_number(tmp_path):
    folder = Path(shutil.copytree(golden_folder("LLaDA2") / "model", tmp_path / "model"))
    with pytest.raises(UserError, match="no network can be made of this config"):
        LLaDA2MoeModelLM.from_pretrained(edited(folder, num_experts=10**30))


def test_weights_that_do_not_fit_are_not_read(checkpoint, monkeypatch):
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(UserError, match=r"the network needs \d+ bytes .* cpu has 1000 "):
        SDARForCausalLM.from_pretrained(checkpoint)


def test_a_shape_that_does_not_fit_is_not_made(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(UserError, match=r"this shape needs 1638\d{7} bytes \(16.4 GB\), cpu has 1000000000 "):
        random_models(FAMILIES["SDAR"], "sdar-8b", CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 10**12}, "the cache of 1 texts"),
        ({"max_new_tokens": 64, "denoising_steps": 65536, "block_length": 1}, "the trace of 1 texts|random numbers"),
    ],
    ids=str,
)
def test_a_decode_that_does_not_fit(checkpoint, options, message, monkeypatch):
    if options["max_new_tokens"] == 64:
        monkeypatch.setattr(memory, "free_bytes", lambda device: SMALL)
    model = SDARForCausalLM.from_pretrained(edited(checkpoint, max_position_embeddings=10**13))
    with pytest.raises(UserError, match=rf"({message}).* needs \d+ bytes .* Allowed: fewer texts at a time"):
        block_diffusion_generate(model, [[1, 2, 3]], **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_is_too_small():
    device = torch.device("cuda")
    free = free_bytes(device)
    assert 0 < free <= torch.cuda.get_device_properties(device).total_memory
    with pytest.raises(UserError, match=r"it needs \d+ bytes .* cuda has \d+ "):
        check_room("it", 2 * free, device, "less")
    model = SDARForCausalLM.from_pretrained("SDAR/tiny", device=device)
    before = torch.cuda.memory_allocated()
    with pytest.raises(UserError, match="the cache of 1000000 texts"):
        model.new_cache(1_000_000, 2048)
    assert torch.cuda.memory_allocated() == before
    kept = torch.empty(free // 2, dtype=torch.uint8, device=device)
    del kept
    assert free_bytes(device) > free // 2 + (1 << 26), "what torch keeps for later is free"
