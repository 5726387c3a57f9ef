"""Forward passes of the recorded checkpoint: logits, caches and block caches (``tests/golden/Fast-dLLM-v2/forward.*``)."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from fast_dllm_v2.modeling_fast import previous_row
from shared.network.masks import block_causal
from tests.family_checks import golden_folder

FOLDER = golden_folder("Fast-dLLM-v2")
RECORDED = json.loads((FOLDER / "forward.json").read_text())
ENTRIES = {e["name"]: e for e in RECORDED["entries"]}


@lru_cache(maxsize=1)
def _model() -> Fast_dLLM_QwenForCausalLM:
    return Fast_dLLM_QwenForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)


@lru_cache(maxsize=1)
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "forward.safetensors")


def _fill(cache, name: str, kind: str, start: int) -> int:
    """Put the recorded keys and values of an entry at ``start``; returns how many tokens they are."""
    tensors = _tensors()
    length = tensors[f"{name}.{kind}.0.key"].shape[2]
    for layer in range(len(cache.keys)):
        cache.keys[layer, :, :, start : start + length] = tensors[f"{name}.{kind}.{layer}.key"]
        cache.values[layer, :, :, start : start + length] = tensors[f"{name}.{kind}.{layer}.value"]
    return length


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return float((got - want).abs().max() / want.abs().max()) <= 1e-4


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", ENTRIES)
def test_golden_forward(name, backend):
    entry, model, tensors = ENTRIES[name], _model(), _tensors()
    ids, cache, params = tensors[f"{name}.input_ids"], model.new_cache(1, 96), entry["params"]
    if entry["cache_before"]:
        cache.commit([_fill(cache, entry["cache_before"], "cache", 0)])
    past, tokens, offset = cache.lengths[0], ids.shape[1], params.get("replace_position") or 0
    mask, width = None, None
    if entry["explicit_attention_mask"]:
        recorded = tensors[f"{name}.attention_mask"].bool()
        assert recorded[..., :past].all(), "the committed prefix is visible to every query"
        mask = recorded[..., past:]
    elif "replace_position" in params:
        width = _fill(cache, "block_cache_init", "block_cache", past)
    else:
        mask = block_causal(tokens, params["block_size"])
    window = cache.window(tokens, offset=offset, width=width)
    model.backend = backend
    try:
        logits = model(ids, past + offset + torch.arange(tokens)[None], window, mask)
    finally:
        model.backend = "sdpa"
    assert _close(logits, tensors[f"{name}.logits"])
    assert _close(logits[:, previous_row(torch.arange(tokens))], tensors[f"{name}.shifted_logits"])
    for kind, start in (("cache", 0), ("block_cache", past)):
        if kind in entry["outputs"]:
            end = start + tensors[f"{name}.{kind}.0.key"].shape[2]
            for layer in range(model.config.num_hidden_layers):
                assert _close(cache.keys[layer, :, :, start:end], tensors[f"{name}.{kind}.{layer}.key"])
                assert _close(cache.values[layer, :, :, start:end], tensors[f"{name}.{kind}.{layer}.value"])


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_again(tmp_path, tied):
    """A tied head is not written, and both kinds give the same logits after a round trip."""
    config = Fast_dLLM_QwenConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = Fast_dLLM_QwenForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" not in load_file(tmp_path / "model.safetensors")) == tied
    again = Fast_dLLM_QwenForCausalLM.from_pretrained(tmp_path)
    ids, positions = torch.arange(6)[None], torch.arange(6)[None]
    torch.testing.assert_close(again(ids, positions), model(ids, positions))


def test_special_ids_of_the_released_family():
    with torch.device("meta"):
        model = Fast_dLLM_QwenForCausalLM(Fast_dLLM_QwenConfig(num_hidden_layers=0))
    assert model.special_ids() == (151665, (151645,))
