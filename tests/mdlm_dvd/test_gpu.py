"""On a GPU: passes through the fast forward and its graphs are those of the plain network, and decoders write the same texts."""

from __future__ import annotations

import pytest
import torch

from mdlm_dvd import decoding
from mdlm_dvd.src.network import Network
from mdlm_dvd.src.texts import Ask, Texts
from shared.network.llada import LLaDAConfig, LLaDAModelLM
from shared.options import Runtime
from tests.fast_checks import needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]
MASK = 255


def network(layers: int = 2, hidden: int = 128, seed: int = 0) -> LLaDAModelLM:
    config = LLaDAConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        max_position_embeddings=512, mask_token_id=MASK, eos_token_id=254,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LLaDAModelLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.08)
    return model.to("cuda", torch.bfloat16)


def texts(model, length: int = 48) -> Texts:
    prompts = [torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 19, 30)]
    return Texts(prompts, Ask(length, MASK, device=model.device, whole=True))


@pytest.mark.parametrize("runtime", [Runtime(), Runtime(graphs=False)], ids=["graphs", "fast"])
@pytest.mark.parametrize("block_length", [None, 16])
@torch.inference_mode()
def test_a_pass_is_that_of_the_plain_network(runtime, block_length):
    model = network()
    some = texts(model)
    region = some.region([0, 1, 2])
    region[:, ::3] = 5
    plain, _ = Network(model, block_length, runtime=Runtime(fast=False, graphs=None)).whole(some, [0, 1, 2], region)
    fast, _ = Network(model, block_length, runtime=runtime).whole(some, [0, 1, 2], region)
    assert (plain - fast).abs().max() < 0.05 * plain.abs().max()


@torch.inference_mode()
def test_a_cached_pass_is_that_without_a_cache():
    model = network()
    some, drafter = texts(model), Network(model, 16)
    whole = Network(model, 16)
    for block in range(3):
        region = some.region([0, 1, 2])
        cached, spent = drafter.cached(some, [0, 1, 2], region)
        plain, _ = whole.whole(some, [0, 1, 2], region)
        masked = region == MASK
        assert (cached - plain)[masked].abs().max() < 0.05 * plain.abs().max()
        assert block == 0 or spent[0].context > 0
        tokens = some.canvas.tokens
        for i in range(3):
            first = some.lengths[i] + 16 * block
            tokens[i, first : first + 16] = torch.arange(16, device=tokens.device)


@pytest.mark.parametrize("name", ["cascade", "verify_exact", "threshold_verifier"])
def test_decoders_run_and_repeat_themselves(name):
    model, drafter = network(), network(1, 64, seed=1)
    decode = getattr(decoding, name if name == "cascade" else f"{name}_generate")
    prompts = [list(range(1, 9)), list(range(20, 45))]
    how = {"drafter": drafter, "max_new_tokens": 40, "truncate_at_eos": False}
    one, two = (decode(model, prompts, **how) for _ in range(2))
    assert one.tokens == two.tokens
    assert all(len(t) == 40 and MASK not in t for t in one.tokens)
