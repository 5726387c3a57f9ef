"""The proof that the seams are in the right place: a family with two lanes and branches, in under 100 lines of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from sdar.options import StandardOptions
from shared.decode.calls import Call
from shared.network.masks import token_causal
from shared.policy.sampling import sample
from shared.policy.uniforms import request_uniforms
from shared.trace import How
from tests import toy
from tests.family_checks import draw_prompts

STOP = 7


def model(seed: int, layers: int) -> Fast_dLLM_QwenForCausalLM:
    """A network that predicts the next token, with random weights in float64."""
    config = Fast_dLLM_QwenConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Fast_dLLM_QwenForCausalLM(config).double().eval().requires_grad_(False)


TARGET = model(1, 2)
PROMPTS = draw_prompts(5, low=1, high=12, vocab=60, seed=3)


def options(temperature: float = 0.0, **flat) -> StandardOptions:
    fixed = {"mask_id": 63, "stopping_criteria_idx": (STOP,), "max_new_tokens": 24, "trim_stop_tokens": True}
    return StandardOptions.from_flat({**fixed, "temperature": temperature, **flat})


def alone(prompt: list[int], request: int, temperature: float, seed: int) -> list[int]:
    """The target's own autoregressive text, one forward over everything a token; token ``n`` is drawn with uniform ``n``."""
    ids, numbers = list(prompt), torch.from_numpy(request_uniforms(seed, request, 64))
    for n in range(24):
        positions = torch.arange(len(ids))[None]
        logits = TARGET(torch.tensor([ids]), positions, None, token_causal(len(ids)))[0, -1]
        ids.append(int(sample(logits, numbers[n], temperature)[0]))
        if ids[-1] == STOP:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def drafter(quality: str) -> Fast_dLLM_QwenForCausalLM:
    if quality == "itself":
        return TARGET
    if quality == "another":
        return model(9, 1)
    near = model(1, 2)
    for k, weight in enumerate(near.parameters()):
        torch.manual_seed(k)
        weight.data += 0.02 * torch.randn_like(weight)
    return near


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("quality", ["itself", "near", "another"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_the_targets_own(temperature, quality, branches):
    """Token for token, greedy or sampled with the same uniforms, whatever drafts, in a batch whose rows are at different places."""
    out = toy.decode(
        TARGET, drafter(quality), PROMPTS, options(temperature), Call(seed=5, batch_size=2), branches=branches
    )
    assert out.tokens == [alone(p, k, temperature, 5) for k, p in enumerate(PROMPTS)]
    assert out.lossless.relative_to == "the target's own decoding"
    if quality == "itself" and not temperature:
        assert out.accepted_per_verify > 2.5, "it drafts what it would say"
        assert out.mean_acceptance_length > 3.5


def test_lanes_are_counted_apart():
    near = drafter("near")
    out = toy.decode(TARGET, near, PROMPTS, options(), Call(), branches=2)
    verifies = out.lanes["target"]["verify"].forwards
    assert out.lanes["drafter"]["draft"].forwards == 4 * verifies == 4 * out.verifies
    assert "verify" not in out.lanes["drafter"]
    assert out.lane_forwards_per_token["drafter"] > 3 * out.lane_forwards_per_token["target"] * 0.9
    assert out.sizes["target"].body > 0
    both = out.work()
    assert both["target"]["verify"].read_bytes > 0
    assert set(both) == {"target", "drafter"}
    hows = {How(h) for c in out.completions for h in c.trace.how_of}
    assert hows == {How.PROMPT, How.ACCEPTED, How.RESAMPLED, How.BONUS}


def test_it_is_small():
    assert len((Path(__file__).parent / "toy.py").read_text().splitlines()) < 100
