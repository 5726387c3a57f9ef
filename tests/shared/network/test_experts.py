"""Routing by hand, and the two ways to run experts against their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shared.network.experts import group_limited_top_k, mix_chosen, mix_dense, mix_experts


def route(scores, bias=None, top_k=2, groups=3, top_groups=2, scale=1.0):
    scores = torch.tensor([scores])
    bias = torch.zeros_like(scores[0]) if bias is None else torch.tensor(bias)
    experts, weights = group_limited_top_k(scores, bias, top_k, groups, top_groups, scale)
    return experts[0].tolist(), weights[0].tolist()


def test_the_best_expert_of_a_weak_group_is_out():
    # Groups of two sum to 1.0, 1.1 and 1.2: the first is out although it holds the best expert.
    experts, weights = route([0.9, 0.1, 0.5, 0.6, 0.7, 0.5])
    assert experts == [4, 3]
    assert weights == pytest.approx([0.7 / 1.3, 0.6 / 1.3])


def test_bias_moves_the_choice_and_not_the_weights():
    experts, weights = route([0.9, 0.1, 0.5, 0.6, 0.7, 0.5], bias=[0.5, 0.0, 0.0, 0.0, 0.0, 0.0], scale=2.5)
    assert experts == [0, 4]
    assert weights == pytest.approx([2.5 * 0.9 / 1.6, 2.5 * 0.7 / 1.6])


def test_a_single_expert_is_not_normalised():
    assert route([0.1, 0.2, 0.4, 0.3, 0.0, 0.0], top_k=1) == ([2], [pytest.approx(0.4)])


def layer(tokens: int, count: int, top_k: int):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    experts = draw(tokens, count).topk(top_k).indices
    return (
        draw(tokens, 6),
        experts,
        draw(tokens, top_k).sigmoid(),
        draw(count, 4, 6),
        draw(count, 4, 6),
        draw(count, 6, 4),
    )


@pytest.mark.parametrize("mix", [mix_dense, mix_chosen])
@pytest.mark.parametrize(("tokens", "count", "top_k"), [(1, 4, 1), (7, 4, 2), (3, 40, 3), (5, 2, 2)])
def test_sum_of_experts(mix, tokens, count, top_k):
    x, experts, weights, gate, up, down = layer(tokens, count, top_k)
    want = torch.zeros_like(x)
    for n in range(tokens):
        for e, w in zip(experts[n], weights[n], strict=True):
            want[n] += w * (down[e] @ (F.silu(gate[e] @ x[n]) * (up[e] @ x[n])))
    got = mix(x, experts, weights, gate, up, down)
    assert torch.allclose(got, want, atol=1e-12)


def test_gradients_reach_chosen_experts_alone():
    x, experts, weights, *stacks = layer(3, 8, 1)
    stacks = [s.requires_grad_() for s in stacks]
    mix_experts(x, experts, weights, *stacks).sum().backward()
    chosen = set(experts.flatten().tolist())
    for stack in stacks:
        assert {e for e in range(8) if stack.grad[e].any()} == chosen
