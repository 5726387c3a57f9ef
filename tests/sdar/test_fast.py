"""The fast forward of SDAR against the plain one (`tests.fast_checks`)."""

from __future__ import annotations

import pytest
import torch

from sdar import SDARConfig, SDARForCausalLM
from shared.gpu.fast import fast_forward_of
from shared.gpu.graphs import GraphRunner, Shape, inputs_of
from shared.network.masks import two_copy_verify
from tests import fast_checks as checks
from tests.fast_checks import DEVICE, error, needs_gpu, needs_kernels

pytestmark = pytest.mark.gpu


def _model(dtype=torch.float32, **overrides) -> SDARForCausalLM:
    sizes = {
        "vocab_size": checks.VOCABULARY, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e4, "max_position_embeddings": 512,
    }  # fmt: skip
    return checks.on_device(SDARForCausalLM(SDARConfig(**(sizes | overrides))), dtype)


@needs_kernels
@pytest.mark.parametrize("other", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
@pytest.mark.parametrize("window", checks.WINDOWS)
def test_matches_the_plain_forward(window, other):
    model = _model(**other)
    checks.matches_the_plain_forward(model, window, 1e-5)


@needs_gpu
@pytest.mark.parametrize("window", ["draft", "verify", "prefill"])
def test_bfloat16_stays_near(window):
    model = _model(torch.bfloat16)
    checks.matches_the_plain_forward(model, window, 3e-2)


@needs_kernels
@pytest.mark.parametrize("tokens", [8, 80])
def test_padding_rows_write_nothing_and_change_nothing(tokens):
    model = _model()
    checks.padding_writes_nothing(model, tokens)


@needs_kernels
@pytest.mark.parametrize("tokens", [8, 16])
def test_an_entry_sees_what_another_of_its_row_writes(tokens):
    model = _model()
    checks.entries_that_only_write_are_seen(model, tokens)


@needs_kernels
@pytest.mark.parametrize("window", checks.BRANCHES)
def test_branches_share_a_prefix(window):
    checks.branches_share_a_prefix(_model(), window)


@needs_kernels
@pytest.mark.parametrize("tokens", [8, 20])
def test_features_are_the_outputs_of_layers(tokens):
    checks.features_are_the_outputs_of_layers(_model(), tokens)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_eager(dtype):
    checks.replays_equal_eager(_model(dtype))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_with_padding_and_entries_that_only_write_stay_near(dtype):
    model = _model(dtype)
    fast, cache = fast_forward_of(model, required=True), checks.filled(model, [20, 40, 60])

    def forward(**given):
        return fast(cache=cache, **given)

    runner = GraphRunner(forward, DEVICE)
    runner.capture([Shape(1, 16), Shape(2, 16), Shape(2, 32, picks=16), Shape(8, 16), Shape(4, 16, commit_rows=4)])
    for tokens, rows, picks, commit_rows in [
        (16, [2, 0], 0, 0), (32, [1], 16, 0), (16, [0, 1, 2], 0, 0), (16, [0, 1, 2, 2], 0, 1),
    ]:  # fmt: skip
        b = len(rows)
        ids, positions = (torch.randint(high, (b, tokens), device=DEVICE) for high in (checks.VOCABULARY, 500))
        at = torch.arange(16, 32, device=DEVICE).expand(b, -1).contiguous() if picks else None
        window = cache.window(
            tokens, rows, ahead=[0] * (b - commit_rows - 1) + [tokens if commit_rows else 0] + [0] * commit_rows
        )
        mask = two_copy_verify(tokens // 2, DEVICE).expand(b, -1, -1)
        given = inputs_of(ids, positions, window.where, cache.length, mask, at)
        eager = forward(**given, logit_rows=b - commit_rows).clone()
        graph = runner(given, logit_rows=b - commit_rows)
        assert graph.shape == eager.shape
        assert error(graph, eager) <= (1e-5 if dtype == torch.float32 else 3e-2)


@needs_kernels
def test_fusing_holds_no_weight_twice():
    model = _model()
    checks.weights_are_held_once(model)


def test_unsupported_models_say_why():
    checks.refusals_say_why(_model())
