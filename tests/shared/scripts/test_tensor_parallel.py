"""Two processes holding one model give what one process gives. Run as a script, this file is one of the processes."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from fast_dllm_v2 import Fast_dLLM_QwenForCausalLM
from fast_dllm_v2.generate_policy_utils import generate_ssd_policy as generate_ssd_policy_v2
from fast_dllm_v2.generate_utils import generate_fast
from sdar import generate, generate_ssd_policy
from sdar.modeling_sdar import SDARForCausalLM
from shared.errors import UserError
from shared.gpu.fast import FastForward, fast_forward_of
from shared.network.masks import block_causal, two_copy_verify
from shared.scripts import tensor_parallel
from shared.scripts.distributed import World, check_agreement
from shared.scripts.tensor_parallel import Group
from tests import programs

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "tests" / "golden" / "SDAR" / "model"  # 4 heads, 2 key-value heads
TINY = ROOT / "SDAR" / "tiny"  # 6 heads, 3 key-value heads
PROMPTS = [[5, 17, 99, 3, 42, 7, 7, 1, 200], [11, 12], [150 + k for k in range(21)]]
EXACT = {"acceptance": "exact", "cache_ver": True, "do_verify_policy": "always"}
DECODES = {
    "plain greedy": (generate, {}),
    "plain sampled": (generate, {"temperature": 1.0, "top_k": 50, "top_p": 0.95}),
    "plain static": (generate, {"remasking_strategy": "low_confidence_static", "denoising_steps": 2}),
    "block size one": (generate, {"block_length": 1, "denoising_steps": 1, "temperature": 0.7}),
    "exact greedy": (generate_ssd_policy, EXACT | {"block_length": 8}),
    "exact sampled": (generate_ssd_policy, EXACT | {"temperature": 1.0, "draft_ver": True}),
    "policy": (generate_ssd_policy, {"do_verify_policy": "score_threshold", "temperature": 0.8, "block_length": 8}),
    "bandit": (generate_ssd_policy, {"do_verify_policy": "contextual_bandit_ucb", "cache_ver": True}),
    "published": (generate_ssd_policy, {"round_to_blocks": True, "fuse_commit": False, "short_verify": False}),
}


SHIFTED = ROOT / "tests" / "golden" / "Fast-dLLM-v2" / "model"  # its queries, keys and values have biases
SHIFTED_DECODES = {
    "fast": (generate_fast, {"temperature": 0.8}),
    "exact": (generate_ssd_policy_v2, EXACT | {"draft_ver": True, "small_block_length": 8}),
    "cached": (generate_ssd_policy_v2, {"use_block_cache": True, "temperature": 1.0, "small_block_length": 4}),
}


def shifted(model) -> dict[str, list]:
    """Tokens and forwards of Fast-dLLM v2, whose projections have biases."""
    flat = {"max_new_tokens": 20, "block_length": 8, "mask_id": 255, "batch_size": 2, "seed": 7}
    outputs = {name: decode(model, PROMPTS, **(flat | more)) for name, (decode, more) in SHIFTED_DECODES.items()}
    return {name: [(c.tokens, c.trace.forwards, c.uniforms_used) for c in o.completions] for name, o in outputs.items()}


def forwards(model) -> dict[str, torch.Tensor]:
    """Logits of a prefill, a draft over its cache, a verify of picked positions, and a forward that asks for none."""
    torch.manual_seed(0)
    ids, positions = torch.randint(250, (2, 24)), torch.arange(24).expand(2, -1)
    cache = model.new_cache(2, 32)
    out = {"prefill": model(ids[:, :12], positions[:, :12], cache.window(12), block_causal(12, 4, "cpu"))}
    cache.commit([12, 8])
    out["draft"] = model(ids[:, 12:16], positions[:, 12:16], cache.window(4))
    picks = torch.tensor([[1, 3], [0, 2]])
    verify = model(ids[:, 16:], positions[:, 16:], cache.window(8), two_copy_verify(4, "cpu"), logits_at=picks)
    none = model(ids, positions, logits_at=slice(0, 0))
    return out | {"verify": verify, "none": none}


def decode(model, name: str):
    """Tokens, traces, uniforms used and confidences of a batch of prompts, two rows in flight."""
    module, flat = DECODES[name]
    flat = {"max_new_tokens": 20} | flat
    output = module.block_diffusion_generate(model, PROMPTS, batch_size=2, seed=7, **flat)
    traces = [c.trace.to_json() for c in output.completions]
    confidence = torch.tensor([x for trace in traces for x in trace.pop("confidence_of")])
    return [(c.tokens, c.uniforms_used) for c in output.completions], traces, confidence


@torch.inference_mode()
def measure(model) -> dict:
    """All that is compared between one and two processes."""
    logits = {"float32": forwards(model), "float64": forwards(model.double())}
    model.float()
    return {"logits": logits, "decodes": {name: decode(model, name) for name in DECODES}}


def process(folder: Path) -> None:
    """One of the processes: what `measure` gives, and whether the others have the same bits."""
    torch.set_num_threads(1)
    world = World.from_environment(int(os.environ["WORLD_SIZE"]))
    model = tensor_parallel.load(SDARForCausalLM, MODEL, world)
    found = measure(model)
    # Sums are no copies: that both processes end up with the same ones is a property of the backend.
    noise = torch.Generator().manual_seed(world.rank)
    sizes = [(1, 1), (3, 7), (16, 64), (33, 1000), (64, 4096)]
    hidden = [model.group.sum(torch.randn(size, generator=noise)) for size in sizes]
    found["agree"] = [model.group.agree(x) for x in [*hidden, *found["logits"]["float32"].values()] if x.numel()]
    found["kv_heads"] = model.new_cache(1, 4).keys.shape[2]
    output = generate.block_diffusion_generate(model, PROMPTS, max_new_tokens=8)
    found["shifted"] = shifted(tensor_parallel.load(Fast_dLLM_QwenForCausalLM, SHIFTED, world))
    merged = world.gather(output)
    found["gathered"] = merged and (merged.tokens == output.tokens, merged.batch_forwards == output.batch_forwards)
    (folder / f"{world.rank}.pkl").write_bytes(pickle.dumps(found))
    world.leave()


@pytest.fixture(scope="module")
def one() -> dict:
    return measure(SDARForCausalLM.from_pretrained(MODEL))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    done = programs.run_ranks(["-m", "tests.shared.scripts.test_tensor_parallel", str(folder)], ROOT, 2)
    assert [p.returncode for p in done] == [0, 0], [p.stderr for p in done]
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-13)])
def test_logits_of_two_processes_are_those_of_one(one, two, dtype, bound):
    for name, want in one["logits"][dtype].items():
        for found in two:
            got = found["logits"][dtype][name]
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            error = (got - want).abs().max() / want.abs().max() if want.numel() else 0
            assert error < bound, name


@pytest.mark.parametrize("name", DECODES)
def test_tokens_and_traces_of_two_processes_are_those_of_one(one, two, name):
    *want, confidence = one["decodes"][name]
    for found in two:
        *got, same = found["decodes"][name]
        assert got == want
        torch.testing.assert_close(same, confidence, rtol=1e-4, atol=1e-6)
    assert torch.equal(two[0]["decodes"][name][2], two[1]["decodes"][name][2])


def test_a_network_with_biases(two):
    want = shifted(Fast_dLLM_QwenForCausalLM.from_pretrained(SHIFTED))
    assert [found["shifted"] for found in two] == [want, want]


def test_processes_have_the_same_bits(two):
    assert all(all(found["agree"]) for found in two)
    assert all(torch.equal(a, b) for a, b in zip(*(f["logits"]["float32"].values() for f in two), strict=True))


def test_each_process_caches_its_own_heads(two):
    assert [found["kv_heads"] for found in two] == [1, 1]


def test_only_the_leader_reports_and_forwards_count_once(two):
    assert [found["gathered"] for found in two] == [(True, True), None]


def load_parts(size: int, path: Path = MODEL) -> list[dict[str, torch.Tensor]]:
    groups = [Group(rank, size, torch.device("cpu")) for rank in range(size)]
    parts = [tensor_parallel.shard(SDARForCausalLM, path, group) for group in groups]
    return [{k.replace(".linear.", "."): v for k, v in part.state_dict().items()} for part in parts]


def test_parts_make_up_the_checkpoint():
    whole, parts = SDARForCausalLM.from_pretrained(MODEL).state_dict(), load_parts(2)
    for key, want in whole.items():
        pieces = [part[key] for part in parts]
        cut = next((d for d in range(want.dim()) if pieces[0].shape[d] < want.shape[d]), None)
        assert torch.equal(want, pieces[0] if cut is None else torch.cat(pieces, cut)), key
        assert all(p.is_contiguous() for p in pieces), key
        assert (cut is None) == ("norm" in key or "embed" in key), key


def test_a_part_reads_its_slices_alone(monkeypatch):
    read = []

    def counting(folder, expected, *, part, **how):
        def counted(key, weight):
            tensor = part(key, weight)
            read.append(tensor.numel() / torch.Size(weight.get_shape()).numel())
            return tensor

        return read_state_dict(folder, expected, part=counted, **how)

    read_state_dict = tensor_parallel.read_state_dict
    monkeypatch.setattr(tensor_parallel, "read_state_dict", counting)
    load_parts(2)
    assert set(read) == {0.5, 1.0}


def test_a_tied_head_is_a_view_of_the_embedding(tmp_path):
    model = SDARForCausalLM.from_pretrained(MODEL)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    part = load_parts(2, tmp_path)[1]
    assert torch.equal(part["lm_head.weight"], part["model.embed_tokens.weight"][128:])
    assert part["lm_head.weight"].untyped_storage().data_ptr() == part["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        (TINY, 2, r"^tensor_parallel 2 does not divide num_key_value_heads 3 of this model. Allowed: 1$"),
        (MODEL, 4, r"^tensor_parallel 4 does not divide num_key_value_heads 2 of this model. Allowed: 1, 2$"),
    ],
)
def test_what_does_not_divide_is_refused_before_processes_meet(path, size, message):
    with pytest.raises(UserError, match=message):
        tensor_parallel.load(SDARForCausalLM, path, World(0, size, 0, tensor=size))


@pytest.mark.parametrize("field", ["intermediate_size", "vocab_size"])
def test_every_cut_size_must_divide(field):
    config = SDARForCausalLM.read_config(MODEL)[1]
    setattr(config, field, 127)
    with pytest.raises(UserError, match=f"does not divide {field} 127 of this model. Allowed: 1$"):
        tensor_parallel.check_divides(config, 2)


def test_a_bias_is_added_once():
    group, linear = Group(0, 1, torch.device("cpu")), torch.nn.Linear(8, 4)
    layer = tensor_parallel.RowParallel(linear, group)
    object.__setattr__(group, "sum", lambda x: 2 * x)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), 2 * (x @ linear.weight.T) + linear.bias)


def test_a_part_is_no_model_for_code_that_forgets_the_others():
    part = tensor_parallel.shard(SDARForCausalLM, MODEL, Group(0, 2, torch.device("cpu")))
    for module in (part.lm_head, part.model.layers[0].self_attn.o_proj, part.model.layers[0].mlp.down_proj):
        assert not hasattr(module, "weight")
    assert "several" in FastForward.unsupported(part)
    assert fast_forward_of(part) is None


def test_models_are_shared_out_among_processes():
    worlds = [World(rank, 4, rank, tensor=2) for rank in range(4)]
    assert [w.share(range(5)) for w in worlds] == [[0, 2, 4], [0, 2, 4], [1, 3], [1, 3]]
    assert [w.leads for w in worlds] == [True, False, True, False]
    with pytest.raises(UserError, match="tensor_parallel 2 does not divide the number of processes, 1"):
        World.from_environment(2)


def test_disagreement_is_an_error(one):
    a, b = (
        generate.block_diffusion_generate(SDARForCausalLM.from_pretrained(MODEL), [p], max_new_tokens=4)
        for p in PROMPTS[:2]
    )
    check_agreement([a, a, b, b, None, None], 2)
    check_agreement([a, b, None], 1)
    for outputs in ([a, b], [a, None]):
        with pytest.raises(RuntimeError, match="ranks 0 and 1 hold one model and decoded different tokens"):
            check_agreement(outputs, 2)


if __name__ == "__main__":
    process(Path(sys.argv[1]))
