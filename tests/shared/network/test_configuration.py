from __future__ import annotations

import json

import pytest
import torch

from fast_dllm_v2 import Fast_dLLM_QwenConfig
from llada2 import LLaDA2MoeConfig
from sdar import SDARConfig
from shared.network.configuration import DecoderConfig
from shared.network.rotary import Rotary

CPU = torch.device("cpu")

FAMILIES = pytest.mark.parametrize("config", [DecoderConfig, SDARConfig, Fast_dLLM_QwenConfig, LLaDA2MoeConfig])


NAMES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "hidden_act": "activation_type",
    "tie_word_embeddings": "weight_tying",
}


class OlmoStyle(DecoderConfig):
    """Names of another make."""

    family = "Olmo-style"
    attribute_map = NAMES


@FAMILIES
def test_class_defaults_can_be_built(config):
    assert config().problem() is None


@FAMILIES
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": "192"}, "hidden_size is '192'. Allowed: a whole number, at least 1"),
        ({"vocab_size": 0}, "vocab_size is 0. Allowed: a whole number, at least 1"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0. Allowed: a whole number, at least 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'. Allowed: a whole number, at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0. Allowed: a whole number, at least 1"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True. Allowed: a whole number, at least 1"),
        ({"head_dim": "16"}, "head_dim is '16'. Allowed: a whole number, at least 1"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None. Allowed: a whole number, at least 1"),
        ({"mask_token_id": "7"}, "mask_token_id is '7'. Allowed: null, or a whole number, at least 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'. Allowed: a number above 0"),
        ({"rope_theta": 0}, "rope_theta is 0. Allowed: a number above 0"),
        ({"initializer_range": None}, "initializer_range is None. Allowed: a number above 0"),
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
    ids=str,
)
def test_wrong_values_are_named(config, changed, message):
    problem = config(**changed).problem()
    assert problem.startswith(message)
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SDARConfig(num_key_value_heads=3), "num_attention_heads 32 is not a multiple of num_key_value_heads 3"),
        (SDARConfig(head_dim=5), "partial_rotary_factor 1.0 of head_dim 5 rotates 5 channels. Allowed: an even number"),
        (SDARConfig(block_size="16"), "block_size is '16'. Allowed: a whole number, at least 1"),
        (SDARConfig(attention_bias=0), "attention_bias is 0. Allowed: true, false"),
        (SDARConfig(tie_word_embeddings="false"), "tie_word_embeddings is 'false'. Allowed: true, false"),
        (SDARConfig(intermediate_size=None), "intermediate_size is None. Allowed: a whole number, at least 1"),
        (SDARConfig(hidden_act="gelu"), "hidden_act 'gelu' is not supported; released SDAR checkpoints have 'silu'"),
        (Fast_dLLM_QwenConfig(bd_size=0), "bd_size is 0. Allowed: a whole number, at least 1"),
        (LLaDA2MoeConfig(use_qk_norm="no"), "use_qk_norm is 'no'. Allowed: true, false"),
        (LLaDA2MoeConfig(routed_scaling_factor="2"), "routed_scaling_factor is '2'. Allowed: a number above 0"),
        (OlmoStyle(d_model="64"), "d_model is '64'. Allowed: a whole number, at least 1"),
        (OlmoStyle(n_heads=4, n_kv_heads=3), "n_heads 4 is not a multiple of n_kv_heads 3"),
        (OlmoStyle(activation_type="swiglu"), "activation_type 'swiglu' is not supported; released Olmo-style"),
    ],
    ids=lambda v: "" if isinstance(v, str) else type(v).__name__,
)
def test_wrong_values_of_one_family(config, message):
    assert config.problem().startswith(message)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("yarn", "rope_scaling is 'yarn'. Allowed: null, or an object with rope_type"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_scaling has rope_type 'dynamic'. Allowed: default, linear, yarn, llama3"),
        ({"type": "longrope"}, "rope_scaling has rope_type 'longrope'"),
        ({"rope_type": ["yarn"]}, "rope_scaling has rope_type ['yarn']"),
        ({"rope_type": "yarn"}, "rope_scaling has factor None. Allowed: a number above 0"),
        ({**YARN, "factor": "4"}, "rope_scaling has factor '4'. Allowed: a number above 0"),
        ({**YARN, "beta_fast": "32"}, "rope_scaling has beta_fast '32'. Allowed: null, or a number above 0"),
        ({**YARN, "truncate": False}, "rope_scaling has truncate, which yarn does not use. Allowed: factor, original_max"),
        ({**YARN, "original_max_position_embeddings": 4096}, "rope_scaling has factor 4.0 and original_max_position_embeddings 4096, but"),
        ({**YARN, "original_max_position_embeddings": None}, "rope_scaling has factor 4.0 and original_max_position_embeddings None"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_scaling has low_freq_factor None. Allowed: a number above 0"),
    ],
    ids=str,
)  # fmt: skip
def test_rope_scaling_that_cannot_be_served(scaling, message):
    assert SDARConfig(rope_scaling=scaling).problem().startswith(message)


@pytest.mark.parametrize("scaling", [None, {}, {"type": "default"}, YARN, {**YARN, "original_max_position_embeddings": 8192, "mscale": None}])  # fmt: skip
def test_rope_scaling_that_can(scaling):
    assert SDARConfig(rope_scaling=scaling).problem() is None
    unscaled = LLaDA2MoeConfig(rope_scaling=scaling).problem()
    assert (unscaled is None) == (scaling in (None, {}, {"type": "default"})), "LLaDA2 was released without"


@FAMILIES
@pytest.mark.parametrize("kind", ["default", None])
def test_rope_parameters_of_newer_configs(config, kind):
    new = {"rope_type": kind} if kind else {}
    read = config(rope_parameters={**new, "rope_theta": 500000.0, "partial_rotary_factor": 0.5})
    assert read.problem() is None
    assert (read.rope_theta, read.rope_scaling, read.partial_rotary_factor) == (500000.0, None, 0.5)
    old = config(rope_theta=500000.0, partial_rotary_factor=0.5)
    assert torch.equal(Rotary.of(read).frequencies(CPU)[0], Rotary.of(old).frequencies(CPU)[0])


def test_scaling_in_rope_parameters():
    read = SDARConfig(rope_scaling=None, rope_parameters={**YARN, "rope_theta": 1e6})
    assert (read.problem(), read.rope_theta, read.rope_scaling) == (None, 1e6, YARN)
    again = SDARConfig(**read.to_dict())
    assert (again.problem(), again.rope_theta, again.rope_scaling) == (None, 1e6, YARN)


@FAMILIES
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float16", "torch.float16"])
def test_both_names_of_the_dtype(config, name, value):
    read = config(**{name: value})
    assert read.problem() is None
    assert read.torch_dtype == torch.float16
    assert config(**{"dtype": value, "torch_dtype": "float16"}).problem() is None


@FAMILIES
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'. Allowed: null, or an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters has full_attention, an object"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0, rope_parameters has 500000.0"),
        ({"rope_parameters": {"rope_theta": "5e5"}}, "rope_theta is '5e5'. Allowed: a number above 0"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'. Allowed: null, float32, bfloat16, float16, float64"),
        ({"torch_dtype": 16}, "torch_dtype is '16'. Allowed: null, float32"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16' and dtype 'float16'. Allowed: one"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is there ('awq'). Allowed: none"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'. Allowed: full_att"),
        ({"layer_types": 3}, "layer_types has 3"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'. Allowed: null, a whole number, at least 0, or a list of them"),
        ({"eos_token_id": [1, None]}, "eos_token_id is [1, None]"),
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_network_and_is_not_served(config, changed, message):
    assert config(**changed).problem().startswith(message)


def test_rope_parameters_of_an_unknown_kind():
    assert "rope_type 'dynamic'" in SDARConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}).problem()
    assert LLaDA2MoeConfig(rope_parameters=YARN).problem().startswith("rope_scaling {")


def test_what_follows_from_other_fields():
    config = OlmoStyle(d_model=64, n_heads=4, weight_tying=True)
    assert (config.num_key_value_heads, config.n_kv_heads, config.head_dim) == (4, 4, 16)
    assert config.tie_word_embeddings is True
    assert SDARConfig(hidden_size=64, num_attention_heads=4, head_dim=None).head_dim == 128
    assert (
        Fast_dLLM_QwenConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=None).num_key_value_heads == 4
    )


@pytest.mark.parametrize("config", [SDARConfig(hidden_size=64, mask_token_id=5, tie_word_embeddings=True), OlmoStyle(d_model=64, weight_tying=True)])  # fmt: skip
def test_written_and_read_again(tmp_path, config):
    """Under the checkpoint's own names; a key nobody knows is kept."""
    config.extra = [1]
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert ("d_model" in written, "hidden_size" in written) in ((True, False), (False, True))
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.hidden_size, again.tie_word_embeddings, again.extra) == (64, True, [1])
