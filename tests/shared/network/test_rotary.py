from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from shared.network.configuration import DecoderConfig
from shared.network.rotary import Rotary, rotate

position = st.integers(0, 4000)


def turned(x: torch.Tensor, position: int, theta: float = 10_000.0) -> torch.Tensor:
    """``x [D]`` rotated to ``position``."""
    tables = Rotary(len(x), theta).tables(torch.tensor([[position]]), torch.float32)
    return rotate(x[None, None, None], *tables)[0, 0, 0]


def vectors(seed: int, dim: int) -> torch.Tensor:
    return torch.randn(2, dim, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), position, st.sampled_from([2, 8, 16]))
def test_norm_is_preserved(seed, place, dim):
    x = vectors(seed, dim)[0]
    assert torch.allclose(turned(x, place).norm(), x.norm(), rtol=1e-5)


@given(st.integers(0, 99), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_scores_depend_on_the_distance_alone(seed, a, b, shift):
    q, k = vectors(seed, 8)
    assert torch.allclose(turned(q, a) @ turned(k, b), turned(q, a + shift) @ turned(k, b + shift), atol=2e-3)


def test_position_zero_is_the_identity():
    x = vectors(0, 8)[0]
    assert torch.equal(turned(x, 0), x)


def test_pairs_are_half_a_head_apart():
    # D = 4, theta 100: pairs (0, 2) and (1, 3) turn by 1 and by 100 ** -0.5 = 0.1 a position
    got = turned(torch.tensor([1.0, 1.0, 0.0, 0.0]), 3, theta=100.0)
    want = [math.cos(3.0), math.cos(0.3), math.sin(3.0), math.sin(0.3)]
    assert torch.allclose(got, torch.tensor(want), atol=1e-6)


def test_shapes_and_dtype():
    places = torch.tensor([[0, 1, 1], [7, 5, 6]])  # rows of a batch stand at different positions; positions may repeat
    cos, sin = Rotary(8, 1e6).tables(places, torch.bfloat16)
    assert cos.shape == sin.shape == (2, 1, 3, 8)
    assert cos.dtype == torch.bfloat16
    assert torch.equal(cos[0, 0, 1], cos[0, 0, 2])
    assert rotate(torch.zeros(2, 5, 3, 8, dtype=torch.bfloat16), cos, sin).shape == (2, 5, 3, 8)


def test_angles_are_computed_in_float32():
    """bfloat16 positions would round 4097 to 4096."""
    far = [Rotary(8, 1e4).tables(torch.tensor([[p]]), torch.bfloat16)[0] for p in (4096, 4097)]
    assert not torch.equal(*far)


def test_channels_past_the_tables_pass_through():
    x = vectors(0, 12)[0]
    tables = Rotary(8, 1e4).tables(torch.tensor([[5]]), torch.float32)
    got = rotate(x.view(1, 1, 1, 12), *tables)[0, 0, 0]
    assert torch.equal(got[8:], x[8:])
    assert torch.equal(got[:8], rotate(x[:8].view(1, 1, 1, 8), *tables)[0, 0, 0])


def test_plain_tables_are_these_bits():
    """Recorded decodes stand on them; ``1 / theta ** e``, as transformers has it, differs in the last place."""
    places, exponent = torch.arange(200)[None], torch.arange(0, 128, 2) / 128
    angle = places.float()[:, None, :, None] * (1e6**-exponent).repeat(2)
    for got, want in zip(Rotary(128, 1e6).tables(places, torch.bfloat16), (angle.cos(), angle.sin()), strict=True):
        assert torch.equal(got, want.bfloat16())


SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_scaled_tables_are_those_of_transformers(scaling):
    shape = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "max_position_embeddings": 2048}
    shape |= {"rope_theta": 10_000.0, "rope_scaling": scaling}
    config, places = DecoderConfig(**shape), torch.tensor([[0, 1, 700, 2047]])
    assert config.problem() is None
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**shape))
    want = theirs(torch.zeros(1), places)
    plain = Rotary(32, 10_000.0).tables(places, torch.float32)
    with torch.device("meta"):  # where models are built
        rotary = Rotary.of(config)
    for got, wanted, unscaled in zip(rotary.tables(places, torch.float32), want, plain, strict=True):
        assert torch.allclose(got[:, 0], wanted, atol=1e-4)
        assert torch.allclose(got, unscaled, atol=1e-2) == (scaling["rope_type"] == "default")
    assert rotary.frequencies(places.device)[1] == theirs.attention_scaling


def test_a_part_of_each_head():
    config = DecoderConfig(hidden_size=64, num_attention_heads=2, partial_rotary_factor=0.25)
    assert Rotary.of(config).dim == 8


def test_frequencies_made_in_inference_mode_serve_training():
    rotary, x = Rotary(8, 1e4), torch.ones(1, 1, 1, 8, requires_grad=True)
    with torch.inference_mode():
        rotary.tables(torch.tensor([[3]]), torch.float32)
    rotate(x, *rotary.tables(torch.tensor([[3]]), torch.float32)).sum().backward()
    assert x.grad.isfinite().all()


def test_rotation_in_full_precision():
    """As LLaDA's ``rope_full_precision``: tables stay float32, what comes out has the dtype of what went in."""
    config = DecoderConfig(head_dim=8, rope_full_precision=True)
    x, places = vectors(0, 8)[0].bfloat16(), torch.tensor([[1001]])
    tables = Rotary.of(config).tables(places, torch.bfloat16)
    assert tables[0].dtype == torch.float32
    got = rotate(x.view(1, 1, 1, 8), *tables)[0, 0, 0]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, turned(x.float(), 1001).bfloat16())
    assert Rotary.of(config).tables(places, torch.float64)[0].dtype == torch.float64
