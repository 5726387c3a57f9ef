"""The shared decoder against transformers' own Qwen2 and Qwen3, and what its forward promises to every family."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from shared.errors import UserError
from shared.network.configuration import DecoderConfig
from shared.network.decoder import DecoderModel, Float32RMSNorm, ForwardContext, RMSNorm, Switches
from shared.network.masks import token_causal
from shared.network.rotary import Rotary

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


class OurQwen2Config(DecoderConfig):
    model_type = "qwen2"


class OurQwen2(DecoderModel):
    config_class = OurQwen2Config

    @staticmethod
    def switches(config) -> Switches:
        return Switches(qkv_bias=True)


class OurQwen3Config(DecoderConfig):
    model_type = "qwen3"
    defaults = DecoderConfig.defaults | {"attention_bias": False}


class OurQwen3(DecoderModel):
    config_class = OurQwen3Config

    @staticmethod
    def switches(config) -> Switches:
        return Switches(qk_norm=True, qkv_bias=config.attention_bias, out_bias=config.attention_bias)


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights, biases and norms, so that none of them can be forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("theirs", "their_config", "ours", "changed"),
    [
        (Qwen2ForCausalLM, Qwen2Config, OurQwen2, {}),
        (Qwen2ForCausalLM, Qwen2Config, OurQwen2, {"tie_word_embeddings": True, "rope_theta": 1e6}),
        (Qwen2ForCausalLM, Qwen2Config, OurQwen2, {"rope_scaling": YARN}),
        (Qwen3ForCausalLM, Qwen3Config, OurQwen3, {"head_dim": 16}),
        (Qwen3ForCausalLM, Qwen3Config, OurQwen3, {"head_dim": 16, "attention_bias": True, "rms_norm_eps": 0.1}),
        (Qwen3ForCausalLM, Qwen3Config, OurQwen3, {"head_dim": 16, "rope_scaling": YARN}),
        (Qwen3ForCausalLM, Qwen3Config, OurQwen3, {"head_dim": 16, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
    ids=lambda v: getattr(v, "__name__", None) if isinstance(v, type) else ("-".join(v) or "plain"),
)  # fmt: skip
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_it_is_the_network_of_transformers(tmp_path, theirs, their_config, ours, changed, backend):
    """A checkpoint that transformers wrote, in a causal forward over tokens at far positions; then cached, in two pieces."""
    config = their_config(**SIZES | {"tie_word_embeddings": False} | changed, attn_implementation="sdpa")
    reference = scramble(theirs(config))
    reference.save_pretrained(tmp_path)
    model = ours.from_pretrained(tmp_path)
    model.backend = backend
    assert set(model.state_dict()) == set(reference.state_dict())
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).expand(2, -1) * torch.tensor([[1], [5]])
    want = reference(ids, attention_mask=token_causal(12).expand(2, 1, -1, -1), position_ids=positions).logits
    assert_close(model(ids, positions, None, token_causal(12)), want)
    cache = model.new_cache(2, 12)
    first = model(ids[:, :7], positions[:, :7], cache.window(7), token_causal(7))
    cache.commit([7, 7])
    second = model(ids[:, 7:], positions[:, 7:], cache.window(5), token_causal(5))
    assert_close(torch.cat([first, second], 1), want)
    if "rope_scaling" in changed:
        model.rotary = Rotary(model.rotary.dim, config.rope_theta)
        with pytest.raises(AssertionError):
            assert_close(model(ids, positions, None, token_causal(12)), want)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_two_orders_of_a_norm():
    """In bfloat16 they round differently."""
    x, weight = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = weight[0]
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-3)
    want = {RMSNorm: weight * unit.bfloat16(), Float32RMSNorm: (weight.float() * unit).bfloat16()}
    assert not torch.equal(*want.values())
    for kind, rounded in want.items():
        norm = kind(64, 1e-3)
        norm.weight = torch.nn.Parameter(weight)
        assert torch.equal(norm(x), rounded)


def test_every_switch_has_its_parameters():
    config = DecoderConfig(**SIZES)

    def names(**on) -> set[str]:
        class Model(DecoderModel):
            @staticmethod
            def switches(config) -> Switches:
                return Switches(**on)

        return {name for name, _ in Model(config).named_parameters() if ".layers.1." in name}

    plain, at = names(), "model.layers.1."
    assert names(qk_norm=True) - plain == {f"{at}self_attn.q_norm.weight", f"{at}self_attn.k_norm.weight"}
    assert names(qkv_bias=True) - plain == {f"{at}self_attn.{p}_proj.bias" for p in "qkv"}
    assert names(out_bias=True) - plain == {f"{at}self_attn.o_proj.bias"}
    assert names(mlp_bias=True) - plain == {f"{at}mlp.{p}_proj.bias" for p in ("gate", "up", "down")}


def qwen3(**changed) -> OurQwen3:
    return scramble(OurQwen3(OurQwen3Config(**SIZES | {"head_dim": 16} | changed)))


def experts() -> LLaDA2MoeModelLM:
    more = {"num_experts": 8, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
    return scramble(LLaDA2MoeModelLM(LLaDA2MoeConfig(**SIZES | {"head_dim": 16} | more)))


MODELS = pytest.mark.parametrize("make", [qwen3, experts])
IDS = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(2))
POSITIONS = torch.arange(6).expand(3, -1)


@MODELS
def test_which_logits_come_back(make):
    model = make()
    whole = model(IDS, POSITIONS)
    assert whole.shape == (3, 6, 50)
    rows = torch.tensor([[5, 0], [2, 2]])
    picked = model(IDS, POSITIONS, logits_at=rows, logit_rows=2)
    assert torch.allclose(picked, whole[:2].gather(1, rows[..., None].expand(-1, -1, 50)), atol=1e-4)
    assert torch.allclose(model(IDS, POSITIONS, logits_at=slice(4, None)), whole[:, 4:], atol=1e-4)
    assert model(IDS, POSITIONS, logits_at=slice(0, 0)).shape == (3, 0, 50)


@MODELS
def test_forms_of_a_local_mask(make):
    """Bool or additive, one for all or one an entry, with a cache and without. The reference attention takes additive ones, unasked."""
    model, causal = make(), token_causal(6)
    want = model(IDS, POSITIONS, None, causal)
    assert not torch.allclose(model(IDS, POSITIONS), want, atol=1e-2)
    additive = torch.where(causal, 0.0, float("-inf"))
    for mask in (causal, causal.expand(3, -1, -1), additive, additive.expand(3, -1, -1)):
        for cache in (None, model.new_cache(3, 6).window(6)):
            assert torch.allclose(model(IDS, POSITIONS, cache, mask), want, atol=1e-4)
    assert model.backend == "sdpa"


@MODELS
def test_a_cache_is_what_has_two_methods(make):
    model, causal = make(), token_causal(6)

    class Growing:
        def __init__(self):
            self.kept = {}

        def update(self, layer, keys, values):
            self.kept[layer] = [torch.cat(pair, -2) for pair in zip(self.kept.get(layer, (keys[:, :, :0], values[:, :, :0])), (keys, values), strict=True)]  # fmt: skip
            return self.kept[layer]

        def mask(self, local_mask):
            return local_mask[None, None]

    cache = Growing()
    first = model(IDS[:, :4], POSITIONS[:, :4], cache, causal[:4, :4])
    second = model(IDS[:, 4:], POSITIONS[:, 4:], cache, causal[4:])
    assert torch.allclose(torch.cat([first, second], 1), model(IDS, POSITIONS, None, causal), atol=1e-4)


def test_a_tied_head_is_the_embedding():
    model = qwen3(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embedding.weight
    assert model.embedding is model.model.embed_tokens


def test_a_config_without_a_network():
    with pytest.raises(UserError, match=r"hidden_size is '32'\. Allowed: a whole number, at least 1"):
        qwen3(hidden_size="32")


def test_layers_can_be_compiled():
    """`train` compiles layer by layer: what layers share must be something a trace can hold."""
    model = qwen3()
    want = model(IDS, POSITIONS, None, token_causal(6))
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert torch.allclose(model(IDS, POSITIONS, None, token_causal(6)), want, atol=1e-5)


def test_attend_stores_keys_as_they_are_used():
    """Rotated, so that a cache never has to know where they stand."""
    seen, q = {}, torch.ones(1, 2, 1, 4)
    cache = type("Store", (), {"update": lambda self, layer, k, v: seen.update({layer: k}) or (k, v)})()
    rope = Rotary(4, 100.0).tables(torch.tensor([[3]]), torch.float32)
    out = ForwardContext(rope, cache, None, "sdpa").attend(7, q, q, 2 * q)
    assert torch.equal(out, torch.full((1, 1, 8), 2.0))
    assert not torch.equal(seen[7], q)
    assert torch.allclose(seen[7].norm(dim=-1), q.norm(dim=-1))
