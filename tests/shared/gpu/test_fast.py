"""How a model comes to its fast forward. What that computes is in the tests of the families (`tests.fast_checks`)."""

from __future__ import annotations

import pytest

from sdar import SDARConfig, SDARForCausalLM
from shared.errors import UserError
from shared.gpu.fast import FastForward, fast_forward_of
from tests import fast_checks as checks
from tests.fast_checks import needs_kernels

pytestmark = pytest.mark.gpu


class Other(FastForward):
    """Serves no model of one layer."""

    @staticmethod
    def refuses(config) -> str | None:
        return "one layer is too few" if config.num_hidden_layers == 1 else None


def _model(layers: int = 2) -> SDARForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    others = {"head_dim": 16, "max_position_embeddings": 64, "vocab_size": checks.VOCABULARY}
    return checks.on_device(SDARForCausalLM(SDARConfig(**sizes, **others, num_hidden_layers=layers)))


@needs_kernels
def test_it_is_made_once_and_again_when_weights_have_moved():
    model = _model()
    fast = fast_forward_of(model)
    assert type(fast) is FastForward
    assert fast_forward_of(model, required=True) is fast
    model.bfloat16()
    moved = fast_forward_of(model)
    assert moved is not fast
    assert moved.current()


@needs_kernels
def test_a_model_names_the_class():
    model = _model()
    model.fast_class = f"{__name__}:Other"
    assert type(fast_forward_of(model)) is Other
    single = _model(layers=1)
    single.fast_class = model.fast_class
    assert fast_forward_of(single) is None
    with pytest.raises(UserError, match="SDARForCausalLM cannot be used: one layer is too few"):
        fast_forward_of(single, required=True)


@needs_kernels
def test_norms_of_queries_and_keys_are_found_where_there_are_any():
    model = _model()
    attention = model.model.layers[0].self_attn
    norms = [layer.qk_norm for layer in fast_forward_of(model).layers]
    assert norms[0].q_weight is attention.q_norm.weight
    assert norms[1].k_weight is model.model.layers[1].self_attn.k_norm.weight
    other = _model()
    for layer in other.model.layers:
        del layer.self_attn.q_norm, layer.self_attn.k_norm
    assert all(layer.qk_norm.q_weight is layer.qk_norm.k_weight is None for layer in fast_forward_of(other).layers)
