"""LLaDA's switches against a forward written out in plain tensor code, from a checkpoint under the released names."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from shared.errors import UserError
from shared.network.llada import LLaDAConfig, LLaDAModelLM

SIZES = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "vocab_size": 11, "max_sequence_length": 16}  # fmt: skip
IDS = torch.tensor([[1, 5, 2, 9, 0]])
VARIANTS = {
    "as the sizes say": {},
    "n_kv_heads null": {"n_kv_heads": None},
    "multi_query_attention": {"n_kv_heads": None, "multi_query_attention": True},
    "mlp_hidden_size null": {"mlp_hidden_size": None, "mlp_ratio": 3},
    "weight_tying": {"weight_tying": True},
    "include_bias": {"include_bias": True},
    "include_qkv_bias": {"include_qkv_bias": True},
    "scale_logits": {"scale_logits": True},
    "embedding_size": {"embedding_size": 13},
}


def saved(folder, **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LLaDAModelLM(LLaDAConfig(**SIZES | config))
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)  # biases as well
    model.save_pretrained(folder)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps({"model_type": "llada", **SIZES, **config}))  # as a released one, and no more
    return folder


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def rotated(x):
    """``x [T, heads, D]`` turned by its positions, halves apart."""
    tokens, _, size = x.shape
    angles = torch.arange(tokens)[:, None] / 500000.0 ** (torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None].double() for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin


def definition(state: dict, ids: torch.Tensor, scale_logits: bool) -> torch.Tensor:
    """Logits ``[T, V]`` in float64 of what the released keys hold. All tokens see each other."""
    state = {k.removeprefix("model.transformer."): v.double() for k, v in state.items()}

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x, size = state["wte.weight"][ids], SIZES["d_model"] // SIZES["n_heads"]
    for i in range(SIZES["n_layers"]):
        at = f"blocks.{i}."
        h = rms(x, state[at + "attn_norm.weight"])
        q, k, v = (linear(h, f"{at}{n}_proj").view(len(ids), -1, size) for n in "qkv")
        repeat = q.shape[1] // k.shape[1]
        q, k, v = rotated(q), rotated(k).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        seen = torch.einsum("thd,shd->hts", q, k).div(size**0.5).softmax(-1)
        x = x + linear(torch.einsum("hts,shd->thd", seen, v).flatten(1), at + "attn_out")
        h = rms(x, state[at + "ff_norm.weight"])
        x = x + linear(F.silu(linear(h, at + "ff_proj")) * linear(h, at + "up_proj"), at + "ff_out")
    logits = rms(x, state["ln_f.weight"]) @ state.get("ff_out.weight", state["wte.weight"]).T
    return logits / SIZES["d_model"] ** 0.5 if scale_logits else logits


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(tmp_path, name):
    config = VARIANTS[name]
    model = LLaDAModelLM.from_pretrained(saved(tmp_path, **config), dtype=torch.float64)
    state = load_file(tmp_path / "model.safetensors")
    got = model(IDS, torch.arange(IDS.shape[1])[None])[0]
    want = definition(state, IDS[0], config.get("scale_logits", False))
    assert got.shape == (5, config.get("embedding_size", SIZES["vocab_size"]))
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


def test_shapes_and_keys_of_the_variants(tmp_path):
    """Where a variant changes what a checkpoint holds, it is that which is loaded."""
    states = {n: load_file(saved(tmp_path / n, **c) / "model.safetensors") for n, c in VARIANTS.items()}
    block = "model.transformer.blocks.0."
    rows = {n: len(s[f"{block}k_proj.weight"]) for n, s in states.items()}
    assert (rows["as the sizes say"], rows["n_kv_heads null"], rows["multi_query_attention"]) == (8, 16, 4)
    assert len(states["mlp_hidden_size null"][f"{block}ff_proj.weight"]) == 48
    assert "model.transformer.ff_out.weight" not in states["weight_tying"]
    assert f"{block}q_proj.bias" in states["include_qkv_bias"]
    assert f"{block}attn_out.bias" not in states["include_qkv_bias"]
    assert f"{block}ff_out.bias" in states["include_bias"]
    assert not any(k.endswith("bias") for k in states["as the sizes say"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"block_type": "sequential"},
            "block_type 'sequential' is not supported; released LLaDA checkpoints have 'llama'",
        ),
        ({"block_group_size": 2}, "block_group_size 2 is not supported"),
        ({"layer_norm_type": "default"}, "layer_norm_type 'default' is not supported"),
        ({"layer_norm_with_affine": False}, "layer_norm_with_affine False is not supported"),
        ({"attention_layer_norm": True}, "attention_layer_norm True is not supported"),
        ({"input_emb_norm": True}, "input_emb_norm True is not supported"),
        ({"alibi": True}, "alibi True is not supported"),
        ({"rope": False}, "rope False is not supported"),
        ({"rope_full_precision": False}, "rope_full_precision False is not supported"),
        ({"activation_type": "gelu"}, "activation_type 'gelu' is not supported"),
        ({"include_qkv_bias": "yes"}, "include_qkv_bias is 'yes'"),
        ({"n_heads": 3}, "n_heads"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, config, message):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError) as error:
        LLaDAModelLM.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
