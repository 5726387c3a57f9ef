"""The fast forward of Fast-dLLM v2 against the plain one (`tests.fast_checks`)."""

from __future__ import annotations

import pytest
import torch

from fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from tests import fast_checks as checks
from tests.fast_checks import needs_gpu, needs_kernels

pytestmark = pytest.mark.gpu


def _model(dtype=torch.float32, **overrides) -> Fast_dLLM_QwenForCausalLM:
    sizes = {
        "vocab_size": checks.VOCABULARY, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e4, "max_position_embeddings": 512,
    }  # fmt: skip
    return checks.on_device(Fast_dLLM_QwenForCausalLM(Fast_dLLM_QwenConfig(**(sizes | overrides))), dtype)


@needs_kernels
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("window", ["draft", "causal", "prefill", "inside a block", "behind a block"])
def test_matches_the_plain_forward(window, tie):
    model = _model(tie_word_embeddings=tie)
    checks.matches_the_plain_forward(model, window, 1e-5)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_match(rows, dtype):
    model = _model(dtype)
    checks.batches_match(model, rows)


@needs_kernels
@pytest.mark.parametrize("tokens", [8, 80])
def test_padding_rows_write_nothing_and_change_nothing(tokens):
    model = _model()
    checks.padding_writes_nothing(model, tokens)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_eager(dtype):
    checks.replays_equal_eager(_model(dtype))


@needs_kernels
def test_fusing_holds_no_weight_twice():
    model = _model()
    checks.weights_are_held_once(model)


def test_unsupported_models_say_why():
    checks.refusals_say_why(_model())
