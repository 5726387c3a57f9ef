"""Forward passes of the recorded checkpoint (``tests/golden/LLaDA2/forward.*``), and the checkpoint layout."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from shared.errors import UserError
from shared.network import loading
from shared.network.masks import block_causal, token_causal
from shared.scripts.distributed import World
from shared.scripts.tensor_parallel import load
from tests.family_checks import golden_folder

FOLDER = golden_folder("LLaDA2")
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "reference"])


@lru_cache(maxsize=1)
def recorded() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "forward.safetensors")


@lru_cache(maxsize=1)
def loaded() -> LLaDA2MoeModelLM:
    return LLaDA2MoeModelLM.from_pretrained(FOLDER / "model", dtype=torch.float32)


@pytest.fixture
def model():
    yield loaded()
    loaded().backend = "sdpa"


def error(got: torch.Tensor, name: str) -> float:
    """Largest difference, in units of the largest recorded value."""
    want = recorded()[name]
    return float((got - want).abs().max() / want.abs().max())


def prefilled(model):
    """A cache holding the recorded prompt, and the logits of its prefill."""
    ids, positions = recorded()["prefill.input_ids"], recorded()["prefill.position_ids"]
    cache = model.new_cache(rows=1, slots=64)
    mask = recorded()["prefill.block_mask_01"][0, 0].bool()
    logits = model(ids, positions, cache.window(ids.shape[1]), mask)
    cache.commit([ids.shape[1]])
    return cache, logits


def cache_error(cache, layer: int, prefix: str) -> float:
    end = cache.lengths[0]
    kept = {"key": cache.keys[layer, :, :, :end], "value": cache.values[layer, :, :, :end]}
    return max(error(tensor, f"{prefix}.cache_{kind}.{layer}") for kind, tensor in kept.items())


@BACKENDS
def test_golden_prefill(model, backend):
    model.backend = backend
    cache, logits = prefilled(model)
    assert error(logits, "prefill.logits_block_causal") <= 1e-4
    for layer in range(model.config.num_hidden_layers):
        assert cache_error(cache, layer, "prefill") <= 1e-4


def test_golden_mask_added_to_the_scores(model):
    """The published decoders add the 0/1 mask, which masks nothing (``as_bias``). The reference attention does it, unasked."""
    bias = recorded()["prefill.block_mask_01"][0, 0]
    logits = model(recorded()["prefill.input_ids"], recorded()["prefill.position_ids"], None, bias)
    assert error(logits, "prefill.logits_as_bias") <= 1e-4
    assert error(logits, "prefill.logits_block_causal") > 1e-2


@BACKENDS
def test_golden_no_mask(model, backend):
    model.backend = backend
    logits = model(recorded()["prefill.input_ids"], recorded()["prefill.position_ids"])
    assert error(logits, "full.logits_no_mask") <= 1e-4


def test_golden_hidden_states_and_layer(model):
    hidden, seen = [], {}
    handles = [layer.register_forward_pre_hook(lambda m, args: hidden.append(args[0])) for layer in model.model.layers]
    handles.append(model.model.norm.register_forward_hook(lambda m, args, out: hidden.append(out)))
    for name, module in (("attention", model.model.layers[1].attention), ("moe", model.model.layers[1].mlp)):
        handles.append(
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
        )
    try:
        prefilled(model)
    finally:
        for handle in handles:
            handle.remove()
    assert error(torch.stack(hidden), "prefill.hidden_states") <= 1e-4
    for name, (given, returned) in seen.items():
        assert error(given, f"layer.{name}_input") <= 1e-4
        assert error(returned, f"layer.{name}_output") <= 1e-4


def test_golden_router(model):
    gate, x = model.model.layers[1].mlp.gate, recorded()["layer.moe_input"].flatten(0, 1)
    experts, weights = gate(x)
    assert torch.equal(experts, recorded()["router.topk_index"])
    assert error(weights, "router.topk_weight") <= 1e-5


@BACKENDS
def test_golden_denoise_verify_and_commit(model, backend):
    model.backend = backend
    cache, _ = prefilled(model)
    tensors = recorded()
    denoised = model(tensors["denoise.input_ids"], tensors["denoise.position_ids"], cache.window(8))
    assert error(denoised, "denoise.logits") <= 1e-4
    allowed = tensors["verify.attention_mask"][0] == 0
    assert allowed[:, :, : cache.lengths[0]].all(), "the committed prefix is visible to every query"
    verified = model(
        tensors["verify.input_ids"], tensors["verify.position_ids"], cache.window(16), allowed[:, :, cache.lengths[0] :]
    )
    assert error(verified, "verify.logits") <= 1e-4
    model(tensors["commit.input_ids"], tensors["denoise.position_ids"], cache.window(8), logits_at=slice(0, 0))
    cache.commit([8])
    assert cache_error(cache, model.config.num_hidden_layers - 1, "commit") <= 1e-4


@BACKENDS
def test_golden_verify_without_cache(model, backend):
    model.backend = backend
    tensors = recorded()
    allowed = tensors["verify_nocache.attention_mask"][0] == 0
    logits = model(tensors["verify_nocache.input_ids"], tensors["verify_nocache.position_ids"], None, allowed)
    assert error(logits, "verify_nocache.logits") <= 1e-4


def random_model(**changed) -> LLaDA2MoeModelLM:
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1,
        "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "use_bias": False,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LLaDA2MoeModelLM(LLaDA2MoeConfig(**sizes | changed)).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        for layer in model.model.layers[model.config.first_k_dense_replace :]:
            layer.mlp.gate.expert_bias.normal_(std=0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"use_bias": True, "use_qkv_bias": True},
        {"use_qk_norm": False},
        {"num_shared_experts": None},
        {"num_shared_experts": 2, "first_k_dense_replace": 0},
        {"num_experts": 64, "n_group": 8, "topk_group": 4},  # so many that chosen experts run one by one
    ],
    ids=lambda c: "-".join(c) or "plain",
)
def test_a_cached_block_is_the_end_of_a_whole_forward(changed):
    """Two rows of different lengths: prefill and one block with the cache, against one forward of everything."""
    model, block = random_model(**changed), 4
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    starts = [4, 8]
    cache = model.new_cache(rows=2, slots=12)
    positions = torch.arange(8).expand(2, -1)
    model(ids[:, :8], positions, cache.window(8), block_causal(8, block), logits_at=slice(0, 0))
    cache.commit(starts)
    blocks = torch.stack([ids[i, s : s + block] for i, s in enumerate(starts)])
    got = model(blocks, torch.tensor(starts)[:, None] + torch.arange(block), cache.window(block))
    for i, s in enumerate(starts):
        end = s + block
        whole = model(ids[i : i + 1, :end], torch.arange(end)[None], None, block_causal(end, block))
        assert torch.allclose(got[i], whole[0, s:], atol=1e-5)
    picked = model(blocks, torch.tensor(starts)[:, None] + torch.arange(block), cache.window(block), logit_rows=1)
    assert torch.allclose(picked, got[:1], atol=1e-5)


def test_a_mask_that_masks():
    """Later tokens change nothing before them."""
    model = random_model()
    ids, positions = torch.arange(6)[None], torch.arange(6)[None]
    changed = torch.where(torch.arange(6) == 5, 30, ids)
    one, other = (model(x, positions, None, token_causal(6)) for x in (ids, changed))
    assert torch.allclose(one[:, :5], other[:, :5], atol=1e-6)
    assert not torch.allclose(one[:, 5], other[:, 5], atol=1e-3)


def test_checkpoint_has_one_tensor_an_expert(tmp_path):
    model = random_model().float()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    stack = model.model.layers[1].mlp.experts.down_proj
    assert torch.equal(state["model.layers.1.mlp.experts.3.down_proj.weight"], stack[3])
    assert not any(name.endswith("experts.down_proj") for name in state)
    again = LLaDA2MoeModelLM.from_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    assert torch.equal(again(ids, ids), model(ids, ids))
    assert set(load_file(FOLDER / "model" / "model.safetensors")) == set(loaded().state_dict())


EXPERT = "model.layers.2.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(EXPERT.format(7)), r"lacks model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight"),
        (lambda s: s.update({EXPERT.format(8): torch.zeros(8, 16)}), r"does not know: .*experts\.8\.up_proj\.weight"),
        (
            lambda s: s.update({EXPERT.format(0): torch.zeros(16, 8)}),
            r"experts\.0\.up_proj\.weight is \[16, 8\], the config asks for \[8, 16\]",
        ),
        (
            lambda s: s.update({"model.layers.2.mlp.experts.up_proj": torch.zeros(8, 8, 16)}),
            r"does not know: model\.layers\.2\.mlp\.experts\.up_proj",
        ),
    ],
    ids=["missing", "one too many", "shape", "stacked"],
)
def test_experts_that_do_not_fit_are_named(tmp_path, change, message):
    random_model().float().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        LLaDA2MoeModelLM.from_pretrained(tmp_path)


def test_experts_may_lie_in_any_shards_and_pieces(tmp_path, monkeypatch):
    model = random_model().float()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {f"{k}.safetensors": sorted(state)[k::3] for k in range(3)}
    for file, names in files.items():
        save_file({name: state[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for piece in (loading.PIECE, 1, 3000):
        monkeypatch.setattr(loading, "PIECE", piece)
        again = LLaDA2MoeModelLM.from_pretrained(tmp_path)
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_state_dict_goes_into_another_model():
    one, other = random_model(), LLaDA2MoeModelLM(random_model().config).double()
    other.load_state_dict(one.state_dict())
    ids = torch.arange(5)[None]
    assert torch.equal(other(ids, ids), one(ids, ids))


MEASURE = """
import sys
from pathlib import Path
from llada2 import LLaDA2MoeModelLM

def kilobytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

small, large, dtype = sys.argv[1:]
LLaDA2MoeModelLM.from_pretrained(small)  # what is imported on the way is none of the weights
before = kilobytes("VmRSS")
model = LLaDA2MoeModelLM.from_pretrained(large, dtype=dtype)
held = sum(p.nbytes for p in model.parameters())
print((kilobytes("VmHWM") - before) * 1024 / held)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_the_memory_of_the_weights_once(tmp_path, dtype):
    """In a process of its own: 200 MB of them or twice that, most of it experts, as they are in the file or cast."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 64, "num_hidden_layers": 3}
    with torch.device("meta"):
        empty = LLaDA2MoeModelLM(LLaDA2MoeConfig(**{**random_model().config.to_dict(), **sizes}))
    model = empty.to(torch.bfloat16).to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().zero_()
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(FOLDER / "model"), str(tmp_path), dtype]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert 0.9 < float(ran.stdout) < 1.3


def test_the_expert_bias_is_not_rounded(tmp_path):
    """A bfloat16 one would send tokens to other experts, here half of them."""
    gate = random_model().float().model.layers[1].mlp.gate
    gate.weight.zero_()
    gate.expert_bias.copy_(1 + torch.arange(8) / 1000)
    want = gate(torch.ones(1, 16))[0]
    assert len(gate.expert_bias.bfloat16().unique()) < 4
    narrow = gate.bfloat16()
    assert (narrow.weight.dtype, narrow.expert_bias.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(narrow(torch.ones(1, 16, dtype=torch.bfloat16))[0], want)
    assert narrow.double().expert_bias.dtype == torch.float64


@pytest.mark.parametrize("saved", [None, torch.bfloat16])
def test_the_expert_bias_is_saved_and_loaded_as_it_is(tmp_path, saved):
    model, name = random_model().float(), "model.layers.1.mlp.gate.expert_bias"
    model.save_pretrained(tmp_path, dtype=saved)
    assert load_file(tmp_path / "model.safetensors")[name].dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        again = LLaDA2MoeModelLM.from_pretrained(tmp_path, dtype=dtype)
        assert again.dtype == dtype
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({"n_group": 3}, "num_experts 8 does not split into n_group 3"),
        ({"n_group": 0}, "n_group is 0. Allowed: a whole number, at least 1"),
        ({"n_group": None}, "n_group is None. Allowed: a whole number"),
        ({"topk_group": 5}, "topk_group is 5"),
        ({"topk_group": None}, "topk_group is None. Allowed: a whole number"),
        ({"num_experts": 0}, "num_experts is 0. Allowed: a whole number, at least 1"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5. Allowed: 1 to 4"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1. Allowed: null, or"),
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0. Allowed"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5. Allowed: above 0, at most 1"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor is None"),
        ({"partial_rotary_factor": 0.4}, "0.4 of head_dim 8 rotates 3 channels. Allowed: an even number"),
        ({"block_size": 0}, "block_size is 0. Allowed: a whole number, at least 1"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace is None"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_built(changed, message):
    with pytest.raises(ValueError, match=message):
        random_model(**changed)


def test_a_config_that_cannot_be_built_is_one_line(tmp_path):
    random_model().float().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_group": None}))
    with pytest.raises(UserError, match=r"^[^\n]*n_group is None\. Allowed: a whole number, at least 1$"):
        LLaDA2MoeModelLM.from_pretrained(tmp_path)


def test_a_network_without_experts_needs_no_numbers_of_them():
    nothing = {"num_experts": 0, "num_experts_per_tok": 0, "n_group": 0, "topk_group": None}
    model = random_model(first_k_dense_replace=3, **nothing)
    assert model(torch.arange(4)[None], torch.arange(4)[None]).isfinite().all()
    assert not any("experts" in name for name in model.state_dict())


def test_experts_are_not_cut_over_processes():
    with pytest.raises(UserError, match=r"tensor_parallel is 2\. Allowed: 1, LLaDA2MoeModelLM"):
        load(LLaDA2MoeModelLM, FOLDER / "model", World(0, 2, 0, tensor=2))


def test_special_ids_of_the_released_family(tmp_path):
    config = LLaDA2MoeConfig(num_hidden_layers=0, hidden_size=4, num_attention_heads=1, num_key_value_heads=1)
    with torch.device("meta"):
        model = LLaDA2MoeModelLM(config)
    assert model.special_ids() == (156895, (156892,))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [156892, 156895]}))
    model.folder = tmp_path
    assert model.special_ids() == (156895, (156892,)), "a checkpoint may list its mask token"
    with pytest.raises(UserError, match="mask_id 156895 is also a stop id"):
        model.special_ids(stop_ids=(156892, 156895))
    assert loaded().special_ids() == (255, (254,))
