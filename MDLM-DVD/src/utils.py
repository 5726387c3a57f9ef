"""Leaves of LLaDA's decoding (Nie et al. 2025, algorithms 4 and 5): quotas, noise, confidence, and which positions a step takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.policy.uniforms import Uniforms


def quota(masks: Tensor, steps_left: int | Tensor) -> Tensor:
    """How many of ``masks [b]`` positions the next of ``steps_left`` steps takes: an even share, the larger shares first."""
    return (masks + steps_left - 1).div(steps_left, rounding_mode="floor")


def transfer_schedule(masks: Tensor, steps: int) -> Tensor:
    """``[b, steps]``: the quotas of all steps, for ``masks [b]`` positions."""
    shares, left = [], masks
    for k in range(steps):
        shares.append(quota(left, steps - k))
        left = left - shares[-1]
    return torch.stack(shares, 1)


def gumbel_scores(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Scores whose argmax is a draw at ``temperature``: ``exp(logits) / (-ln uniform) ** temperature``, in float64; the logits themselves at 0."""
    if temperature == 0:
        return logits
    return logits.double().exp() / (-uniform.double().log()) ** temperature


def ranks(scores: Tensor) -> Tensor:
    """``[b, G]``: the place of each score among those of its row, the largest first; of equal ones the left one."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1)


def top(scores: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    """``[b, G]``: the ``count [b]`` largest scores among the positions ``allowed [b, G]``, all of them where there are fewer."""
    return allowed & (ranks(scores.masked_fill(~allowed, -torch.inf)) < count[:, None])


def top_of_text(scores: Tensor, allowed: Tensor, count: Tensor, before: Sequence[int]) -> Tensor:
    """`top` with equal scores in the order of ``torch.topk`` over the whole text, ``before`` tokens of prompt included: what the published code does, which
    shows where candidates for the end of a text, all of confidence 0, come last."""
    take = torch.zeros_like(allowed)
    for k, (row, most, first) in enumerate(
        zip(scores.masked_fill(~allowed, -torch.inf), count.tolist(), before, strict=True)
    ):
        text = torch.nn.functional.pad(row, (first, 0), value=-torch.inf)
        take[k, text.topk(min(most, len(row))).indices - first] = True
    return take & allowed


def probability_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """``[...]``: the softmax probability of ``tokens [...]`` under ``logits [..., V]``."""
    logits = logits.float()
    return (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)).exp()


def draws(uniforms: Uniforms, rows: Tensor, width: int) -> Tensor:
    """The next ``width`` numbers of ``rows [b]``, as ``[b, width]``."""
    return uniforms.take(rows, width, width)
