"""The fast forward of LLaDA2 against the plain one (`tests.fast_checks`)."""

from __future__ import annotations

import pytest
import torch

from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from llada2.fast import FastLLaDA2
from shared.gpu.fast import fast_forward_of
from shared.gpu.launch import available
from tests import fast_checks as checks
from tests.fast_checks import DEVICE, needs_gpu, needs_kernels

pytestmark = pytest.mark.gpu


def _model(dtype=torch.float32, **overrides) -> LLaDA2MoeModelLM:
    """One dense layer and two of experts."""
    sizes = {
        "vocab_size": checks.VOCABULARY, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "use_bias": False, "num_experts": 24, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        "max_position_embeddings": 512,
    }  # fmt: skip
    return checks.on_device(LLaDA2MoeModelLM(LLaDA2MoeConfig(**(sizes | overrides))), dtype)


@needs_kernels
@pytest.mark.parametrize("window", ["draft", "causal", "verify", "prefill"])
def test_matches_the_plain_forward(window):
    model = _model()
    checks.matches_the_plain_forward(model, window, 1e-5)


@needs_kernels
@pytest.mark.parametrize(
    "overrides",
    [
        {"use_bias": True, "use_qkv_bias": True, "use_qk_norm": False},
        {"partial_rotary_factor": 1.0, "num_shared_experts": 0},
        {
            "head_dim": 16,
            "num_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 1,
            "num_shared_experts": 2,
        },
    ],
)
def test_options_of_the_architecture(overrides):
    model = _model(**overrides)
    for window in ("draft", "verify"):
        checks.matches_the_plain_forward(model, window, 1e-5, [None])


@needs_gpu
@pytest.mark.parametrize("rows", [1, 7, 32])
def test_batches_match(rows):
    model = _model()
    checks.batches_match(model, rows)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 7, 32])
def test_bfloat16_batches_stay_near(rows):
    """Every expert is chosen: rounding can't change the choice, only the sums."""
    model = _model(torch.bfloat16, num_experts=4, n_group=1, topk_group=1, num_experts_per_tok=4)
    checks.batches_match(model, rows)


@needs_kernels
@pytest.mark.parametrize("tokens", [8, 80])
def test_padding_rows_write_nothing_and_change_nothing(tokens):
    model = _model()
    checks.padding_writes_nothing(model, tokens)


@needs_kernels
def test_an_entry_sees_what_another_of_its_row_writes():
    model = _model()
    checks.entries_that_only_write_are_seen(model, 8)


@needs_kernels
def test_branches_share_a_prefix():
    checks.branches_share_a_prefix(_model(), "inside a block")


@needs_kernels
@pytest.mark.parametrize("tokens", [8, 20])
def test_features_are_the_outputs_of_layers(tokens):
    checks.features_are_the_outputs_of_layers(_model(), tokens)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_eager(dtype):
    checks.replays_equal_eager(_model(dtype))


@needs_kernels
def test_experts_are_not_copied():
    model = _model()
    fast = fast_forward_of(model, required=True)
    assert type(fast) is FastLLaDA2
    stacks, experts = model.model.layers[1].mlp.experts, fast.layers[1].mlp
    assert experts.up.data_ptr() == stacks.up_proj.data_ptr()
    assert experts.down.data_ptr() == stacks.down_proj.data_ptr()
    checks.weights_are_held_once(model)


def test_unsupported_models_say_why():
    checks.refusals_say_why(_model())
    if available(DEVICE):
        assert "does not divide" in FastLLaDA2.unsupported(_model(partial_rotary_factor=0.75))
