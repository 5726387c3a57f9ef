"""Forward passes of the recorded checkpoints, with and without their adapters (``tests/golden/D2F-*/forward.*``)."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from d2f.modeling_d2f import BACKENDS
from shared.network.masks import block_causal
from tests.family_checks import golden_folder

NAMES = list(BACKENDS)


@lru_cache(maxsize=4)
def model_of(name: str, adapter: bool = False):
    folder = golden_folder(f"D2F-{name}")
    return BACKENDS[name].from_pretrained(folder / "model", adapter=folder / "adapter" if adapter else None)


@lru_cache(maxsize=2)
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(golden_folder(f"D2F-{name}") / "forward.safetensors")


def cut(bias: torch.Tensor) -> torch.Tensor:
    """A recorded additive mask ``[1, 1, T, S]`` as bool ``[T, S]``."""
    return bias[0, 0] == 0


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-5


def positions(start: int, tokens: int) -> torch.Tensor:
    return torch.arange(start, start + tokens)[None]


@pytest.mark.parametrize("name", NAMES)
def test_golden_whole_prompt_without_mask(name):
    recorded = tensors(name)
    ids = recorded["full.input_ids"]
    check(model_of(name)(ids, positions(0, ids.shape[1])), recorded["full.logits"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [False, True])
def test_golden_first_pass(name, adapter):
    recorded = tensors(name)
    ids, mask = recorded["prefill.input_ids"], cut(recorded["prefill.attention_bias"])
    got = model_of(name, adapter)(ids, positions(0, ids.shape[1]), None, mask)
    check(got, recorded["lora.logits" if adapter else "prefill.logits"])


def cache_after_prefill(name: str):
    """The recorded cache of the first pass: keys before rotary for llada, which is turned here."""
    model, recorded = model_of(name), tensors(name)
    cache = model.new_cache(1, 64)
    ids, mask = recorded["prefill.input_ids"], cut(recorded["prefill.attention_bias"])
    model(ids, positions(0, ids.shape[1]), cache.window(ids.shape[1]), mask)
    cache.commit([recorded["prefill.cache_key.0"].shape[2]])
    return cache


@pytest.mark.parametrize("name", NAMES)
def test_golden_cache_keeps_the_recorded_values(name):
    cache, recorded = cache_after_prefill(name), tensors(name)
    for layer in range(len(cache.keys)):
        check(cache.values[layer, :, :, : cache.lengths[0]], recorded[f"prefill.cache_value.{layer}"])


@pytest.mark.parametrize("name", NAMES)
def test_golden_two_blocks_in_flight(name):
    cache, recorded = cache_after_prefill(name), tensors(name)
    ids, start = recorded["denoise.input_ids"], cache.lengths[0]
    mask = cut(recorded["denoise.attention_bias"])
    assert mask[:, :start].all(), "the cached prefix is visible"
    got = model_of(name)(ids, positions(start, ids.shape[1]), cache.window(ids.shape[1]), mask[:, start:])
    check(got, recorded["denoise.logits"])


@pytest.mark.parametrize("name", NAMES)
def test_golden_a_finished_block_is_cached_by_the_pass_of_the_next(name):
    cache, recorded = cache_after_prefill(name), tensors(name)
    ids, start = recorded["grow.input_ids"], cache.lengths[0]
    tokens = ids.shape[1]
    mask = block_causal(tokens, recorded["grow.cache_key.0"].shape[2] - start)
    check(model_of(name)(ids, positions(start, tokens), cache.window(tokens), mask), recorded["grow.logits"])
    cache.commit([recorded["grow.cache_key.0"].shape[2] - start])
    check(cache.values[0, :, :, : cache.lengths[0]], recorded["grow.cache_value.0"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [1, 4])
def test_golden_verify(name, target):
    cache, recorded = cache_after_prefill(name), tensors(name)
    ids, start = recorded[f"verify{target}.input_ids"], cache.lengths[0]
    tokens = ids.shape[1]
    half = tokens if name == "dream" else tokens // 2
    at = torch.cat([positions(start, half)] * (tokens // half), 1)
    mask = cut(recorded[f"verify{target}.attention_bias"])
    got = model_of(name)(ids, at, cache.window(tokens), mask[:, start:])
    check(got, recorded[f"verify{target}.logits"])
