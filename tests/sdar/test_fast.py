"""The fast forward against the plain one: same logits, same cache, whatever the batch, the mask and the padding.

On a GPU, or in triton's interpreter with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import pytest
import torch

from sdar import SDARConfig, SDARForCausalLM
from sdar.fast import FastSDAR, unsupported
from shared import triton_ops as ops
from shared.graphs import GraphRunner, Shape
from shared.masks import block_causal, token_causal, two_copy_verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
needs_kernels = pytest.mark.skipif(not ops.available(DEVICE), reason="no CUDA device, and triton does not interpret")


def _model(dtype=torch.float32, **overrides) -> SDARForCausalLM:
    sizes = {
        "vocab_size": 200, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e4, "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(0)
    model = SDARForCausalLM(SDARConfig(**(sizes | overrides)))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.2 if "norm" in name else 0.15)
    return model.to(DEVICE, dtype).eval().requires_grad_(False)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _filled(model, lengths, slots=256):
    cache = model.new_cache(len(lengths), slots)
    cache.keys.normal_()
    cache.values.normal_()
    cache.commit(lengths)
    return cache


def _compare(model, fast, cache, rows, tokens, mask, tolerance, logits_at=None, **kwargs):
    batch = len(rows)
    ids = torch.randint(200, (batch, tokens), device=DEVICE)
    positions = torch.randint(500, (batch, tokens), device=DEVICE)
    keys, values = cache.keys.clone(), cache.values.clone()
    at = logits_at
    if at == "some":
        at = torch.randint(tokens, (batch, 3), device=DEVICE)
    want = model(ids, positions, cache.window(tokens, rows), mask, logits_at=at)
    want_keys, want_values = cache.keys.clone(), cache.values.clone()
    cache.keys.copy_(keys)
    cache.values.copy_(values)
    index = torch.tensor(rows, device=DEVICE)
    got = fast(ids, positions, cache, index, cache.length[index], mask, logits_at=at, **kwargs)
    assert got.shape == want.shape
    assert _error(got, want) <= tolerance
    assert _error(cache.keys, want_keys) <= tolerance
    assert _error(cache.values, want_values) <= tolerance


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("rows", "tokens", "mask"),
    [([0], 16, None), ([2, 0], 8, "causal"), ([1], 32, "verify"), ([2, 0, 1], 32, "verify"), ([1, 2], 80, "blocks")],
)
def test_matches_the_plain_forward(rows, tokens, mask, tie):
    masks = {
        "causal": token_causal,
        "verify": lambda t, d: two_copy_verify(t // 2, d),
        "blocks": lambda t, d: block_causal(t, 4, d),
    }
    mask = masks[mask](tokens, DEVICE) if mask else None
    model = _model(tie_word_embeddings=tie)
    fast = FastSDAR(model)
    cache = _filled(model, [70, 0, 33])
    for at in (None, slice(2, 5), "some"):
        _compare(model, fast, cache, rows, tokens, mask, 1e-5, at)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("tokens", [16, 32, 80])
def test_bfloat16_stays_near(tokens):
    model = _model(torch.bfloat16)
    cache = _filled(model, [70, 0, 33])
    _compare(model, FastSDAR(model), cache, [0, 2], tokens, token_causal(tokens, DEVICE), 3e-2)


@pytest.mark.gpu
@needs_kernels
def test_padding_rows_write_nothing_and_change_nothing():
    model = _model()
    fast, cache = FastSDAR(model), _filled(model, [20, 40, 60])
    ids, positions = torch.randint(200, (3, 8), device=DEVICE), torch.arange(8, device=DEVICE).expand(3, 8)
    for tokens in (8, 80):
        ids = torch.randint(200, (3, tokens), device=DEVICE)
        positions = torch.arange(tokens, device=DEVICE).expand(3, tokens)
        alone = fast(ids[1:2], positions[1:2], cache, torch.tensor([2], device=DEVICE), cache.length[2:])
        written = cache.keys.clone()
        padded = fast(ids, positions, cache, torch.tensor([-1, 2, -1], device=DEVICE), cache.length[[0, 2, 1]])
        assert _error(padded[1:2], alone) <= 1e-5
        assert padded.isfinite().all()
        assert _error(cache.keys, written) <= 1e-5
        assert torch.equal(cache.keys[:, :2], written[:, :2])


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("tokens", [8, 16])
def test_an_entry_sees_what_another_of_its_row_writes(tokens):
    """A commit riding with a draft of the next block: the same as one after the other."""
    model = _model()
    fast, cache = FastSDAR(model), _filled(model, [20, 40, 60])
    ids = torch.randint(200, (3, tokens), device=DEVICE)
    positions = torch.arange(tokens, device=DEVICE) + torch.tensor([[60], [40 + tokens], [40]], device=DEVICE)
    window = cache.window(tokens, [2, 1, 1], ahead=[0, tokens, 0])
    mask = torch.stack([torch.ones(tokens, tokens, dtype=torch.bool)] * 2 + [token_causal(tokens)]).to(DEVICE)
    got = fast(ids, positions, cache, window.row_index, window.prefix, mask, leading=2)
    fast(ids[2:], positions[2:], cache, window.row_index[2:], window.prefix[2:], mask[2:])
    want = fast(ids[:2], positions[:2], cache, window.row_index[:2], window.prefix[:2])
    assert got.shape == want.shape
    assert _error(got, want) <= 1e-5
    assert _error(model(ids, positions, window, mask, leading=2), want) <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_eager(dtype):
    model = _model(dtype)
    fast, cache = FastSDAR(model), _filled(model, [20, 40, 60])

    def forward(input_ids, position_ids, rows, prefixes, local_mask, logits_at, leading):
        return fast(input_ids, position_ids, cache, rows, prefixes, local_mask, leading=leading, logits_at=logits_at)

    runner, before = GraphRunner(forward, DEVICE), cache.keys.clone()
    runner.capture([Shape(1, 16), Shape(2, 16), Shape(2, 32, picks=16), Shape(8, 16), Shape(4, 16, riders=4)])
    assert torch.equal(cache.keys, before), "capturing writes nothing"
    for tokens, rows, picks, riders in [
        (16, [1], 0, 0), (16, [2, 0], 0, 0), (32, [1], 16, 0), (16, [0, 1, 2], 0, 0), (16, [0, 1, 2, 2], 0, 1),
    ]:  # fmt: skip
        b = len(rows)
        ids = torch.randint(200, (b, tokens), device=DEVICE)
        positions = torch.randint(500, (b, tokens), device=DEVICE)
        at = torch.arange(16, 32, device=DEVICE).expand(b, -1).contiguous() if picks else None
        window = cache.window(tokens, rows, ahead=[0] * (b - riders - 1) + [tokens if riders else 0] + [0] * riders)
        where, prefix = window.row_index, window.prefix
        mask = two_copy_verify(tokens // 2, DEVICE).expand(b, -1, -1)
        eager = forward(ids, positions, where, prefix, mask, at, b - riders).clone()
        graph = runner(ids, positions, where, prefix, mask, at, b - riders)
        assert graph.shape == eager.shape
        assert _error(graph, eager) <= (1e-5 if dtype == torch.float32 else 3e-2)
        if Shape(b - riders, tokens, picks, riders) in runner.captured:
            assert torch.equal(graph.argmax(-1), eager.argmax(-1))


@pytest.mark.gpu
@needs_kernels
def test_fusing_holds_no_weight_twice():
    model = _model()
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    fast = FastSDAR(model)
    layer = model.model.layers[0]
    assert layer.self_attn.k_proj.weight.untyped_storage().data_ptr() == fast.layers[0].qkv.untyped_storage().data_ptr()
    assert layer.mlp.up_proj.weight.untyped_storage().data_ptr() == fast.layers[0].gate_up.untyped_storage().data_ptr()
    assert all(torch.equal(weight, plain[name]) for name, weight in model.state_dict().items())


def test_unsupported_models_say_why():
    if not ops.available(DEVICE):
        assert "CUDA" in unsupported(_model())
    else:
        assert unsupported(_model()) is None
        assert "attention_bias" in unsupported(_model(attention_bias=True))
        assert "float16" in unsupported(_model(torch.float16))
