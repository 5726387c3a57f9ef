"""Forward passes of the recorded checkpoint: logits and caches (``tests/golden/SDAR/forward.*``)."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from sdar import SDARForCausalLM
from tests.family_checks import golden_folder

FOLDER = golden_folder("SDAR")
ENTRIES = json.loads((FOLDER / "forward.json").read_text())["entries"]


@lru_cache(maxsize=1)
def _model() -> SDARForCausalLM:
    return SDARForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)


@lru_cache(maxsize=1)
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "forward.safetensors")


def _cache_of(name: str | None):
    """A cache holding what the named entry left in it, with room for a verify forward."""
    model = _model()
    cache = model.new_cache(rows=1, slots=96)
    if name is not None:
        entry = next(e for e in ENTRIES if e["name"] == name)
        before = _cache_of(entry["cache_before"])
        tensors = _tensors()
        length = tensors[f"{name}.cache.0.key"].shape[2]
        for layer in range(model.config.num_hidden_layers):
            cache.keys[layer, :, :, :length] = tensors[f"{name}.cache.{layer}.key"]
            cache.values[layer, :, :, :length] = tensors[f"{name}.cache.{layer}.value"]
        assert before.lengths[0] <= length
        cache.commit([length])
    return cache


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_golden_forward(entry, backend):
    model, tensors, name = _model(), _tensors(), entry["name"]
    cache = _cache_of(entry["cache_before"])
    length, tokens = cache.lengths[0], entry["query_length"]
    mask = tensors[f"{name}.attention_mask"][0].bool()
    assert mask[:, :length].all(), "the committed prefix is visible to every query"
    model.backend = backend
    try:
        logits = model(
            tensors[f"{name}.input_ids"], tensors[f"{name}.position_ids"], cache.window(tokens), mask[:, length:]
        )
    finally:
        model.backend = "sdpa"
    assert _relative_error(logits, tensors[f"{name}.logits"]) <= 1e-4
    if "cache" in entry["outputs"]:
        assert entry["store_kv"]
        cache.commit([tokens])
        for layer in range(model.config.num_hidden_layers):
            end = cache.lengths[0]
            assert _relative_error(cache.keys[layer, :, :, :end], tensors[f"{name}.cache.{layer}.key"]) <= 1e-4
            assert _relative_error(cache.values[layer, :, :, :end], tensors[f"{name}.cache.{layer}.value"]) <= 1e-4
