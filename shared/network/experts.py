"""Mixture-of-experts layers: which experts a token goes to, and the sum of what they return.

Weights are stacked over experts, E: ``gate, up [E, m, H]``, ``down [E, H, m]``. ``N`` tokens, ``K`` experts a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many experts per chosen one, running all of them as one wide MLP is faster than a loop over those that were chosen.
DENSE_UP_TO = 8


def group_limited_top_k(
    scores: Tensor, bias: Tensor, top_k: int, groups: int, top_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """``(experts [N, K], weights [N, K])`` for ``scores [N, E]`` in [0, 1] (DeepSeek-V3, section 2.1.2).

    Experts stand in ``groups`` equal runs. ``scores + bias`` chooses: first the ``top_groups`` groups by the sum of their two best, then the
    ``top_k`` best experts inside them, in descending order. The weights are the scores themselves, normalised where K > 1, times ``scale``.
    """
    choice = (scores + bias).unflatten(-1, (groups, -1))
    best = choice.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1, sorted=False).indices
    kept = torch.zeros_like(choice[..., 0], dtype=torch.bool).scatter(-1, best, True)
    experts = choice.masked_fill(~kept[..., None], float("-inf")).flatten(-2).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * scale


def mix_dense(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every token, as one MLP of width ``E m``; those not chosen have weight zero. Differentiable, without host reads."""
    count, width, _ = gate.shape
    share = torch.zeros(len(x), count, dtype=weights.dtype, device=x.device).scatter(1, experts, weights)
    inner = F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1))
    inner = (inner.unflatten(-1, (count, width)) * share[..., None]).flatten(1)
    return F.linear(inner.to(x.dtype), down.transpose(0, 1).flatten(1))


def mix_chosen(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each chosen expert on its own tokens, one after the other (one host read). Sums are in the dtype of ``weights``."""
    out = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for e in experts.unique().tolist():
        token, slot = (experts == e).nonzero(as_tuple=True)
        inner = F.silu(F.linear(x[token], gate[e])) * F.linear(x[token], up[e])
        out.index_add_(0, token, F.linear(inner, down[e]) * weights[token, slot, None])
    return out.to(x.dtype)


def mix_experts(x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``x [N, H]`` through its ``experts [N, K]``, summed with float32 ``weights [N, K]`` -> ``[N, H]``; each expert is ``down(silu(gate x) * up x)``."""
    few = len(gate) <= DENSE_UP_TO * experts.shape[1]
    return (mix_dense if few else mix_chosen)(x, experts, weights, gate, up, down)
