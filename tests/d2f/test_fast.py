"""The fast forwards of LLaDA and Dream against the plain ones (`tests.fast_checks`)."""

from __future__ import annotations

import pytest
import torch

from shared.gpu.fast import FastForward
from shared.network.dream import DreamConfig, DreamModel
from shared.network.llada import LLaDAConfig, LLaDAModelLM
from tests import fast_checks as checks
from tests.fast_checks import needs_gpu, needs_kernels

pytestmark = pytest.mark.gpu
SIZES = {
    "vocab_size": checks.VOCABULARY, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
    "rope_theta": 1e4, "max_position_embeddings": 512,
}  # fmt: skip


def _model(name: str, dtype=torch.float32, **overrides):
    kind, config = {"llada": (LLaDAModelLM, LLaDAConfig), "dream": (DreamModel, DreamConfig)}[name]
    kv_heads = {"llada": 6, "dream": 2}[name]
    return checks.on_device(kind(config(**{**SIZES, "num_key_value_heads": kv_heads, **overrides})), dtype)


each_network = pytest.mark.parametrize("name", ["llada", "dream"])


@needs_kernels
@each_network
@pytest.mark.parametrize("window", ["draft", "causal", "verify", "prefill"])
def test_matches_the_plain_forward(name, window):
    checks.matches_the_plain_forward(_model(name), window, 1e-5)


@needs_kernels
def test_matches_with_tied_weights_and_biases_of_attention():
    checks.matches_the_plain_forward(_model("llada", tie_word_embeddings=True, include_qkv_bias=True), "verify", 1e-5)


@needs_gpu
@each_network
@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_match(name, rows, dtype):
    checks.batches_match(_model(name, dtype), rows)


@needs_gpu
@each_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_eager(name, dtype):
    checks.replays_equal_eager(_model(name, dtype))


@needs_kernels
@each_network
def test_fusing_holds_no_weight_twice(name):
    checks.weights_are_held_once(_model(name))


@each_network
def test_unsupported_models_say_why(name):
    checks.refusals_say_why(_model(name))


@needs_kernels
@pytest.mark.parametrize(("switch", "reason"), [("include_bias", "no bias"), ("scale_logits", "do not scale")])
def test_what_the_kernels_lack_is_said(switch, reason):
    assert reason in FastForward.unsupported(_model("llada", **{switch: True}))
