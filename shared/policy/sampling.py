"""From logits to tokens: one transform, greedy choice, and inverse-CDF draws from given uniforms.

Draws never use ``multinomial`` (it waits for the device): a token is the smallest id whose cumulative probability, added up
in float64 in token-id order, exceeds the uniform.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.gpu import sampling as triton_sampling
from shared.options import Sampling

GREEDY_BELOW = 1e-6  # temperatures under this are greedy, as in the published code


def transform(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Log-weights ``[..., V]`` in float32 whose softmax is the filtered distribution; dropped tokens are ``-inf``.

    Temperature, then top-k (ties with the k-th kept), then top-p on what is left (a token stays while the mass before it is at
    most p; the first always stays). A temperature of 0 leaves the logits as they are, unfiltered.
    """
    logits = logits.float()
    if temperature < GREEDY_BELOW:
        return logits
    return keep_top_p(keep_top_k(logits / temperature, top_k), top_p)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """``logits [..., V]``, less likely ones than the k-th at ``-inf`` (0: all are kept)."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    kth = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """``logits [..., V]``, those at ``-inf`` before which there is more than this mass (1: all are kept)."""
    if top_p >= 1.0:
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # The shifted sum, not the sum less the token's own mass: that rounds, and misses a sum equal to p.
    before = F.pad(ordered.softmax(-1).cumsum(-1)[..., :-1], (1, 0))
    drop = torch.zeros_like(ids, dtype=torch.bool).scatter(-1, ids, before > top_p)
    return logits.masked_fill(drop, float("-inf"))


def log_weights(logits: Tensor, sampling: Sampling) -> Tensor:
    """`transform` at the target's temperature, as verification and estimators see ``logits [..., V]``. Where ``sampling`` has ``top_p_first`` on, the
    filters come in that order and at temperature 0 as well."""
    temperature, top_k, top_p = sampling.target_temperature, sampling.top_k, sampling.top_p
    if not getattr(sampling, "top_p_first", False):
        return transform(logits, temperature, top_k, top_p)
    logits = logits.float() if temperature < GREEDY_BELOW else logits.float() / temperature
    return keep_top_k(keep_top_p(logits, top_p), top_k)


def inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Token ids ``[...]`` drawn from ``probs [..., V]`` at ``uniform [...]`` in [0, 1).

    Where rounding leaves the total below the uniform, the last id of non-zero probability.
    """
    cumulative = probs.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.double()[..., None], right=True)[..., 0]
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn, last)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``(ids [...], probability of each [...])`` of the most likely tokens of ``logits [..., V]``."""
    if logits.is_cuda and triton_sampling.serves(logits):
        return triton_sampling.greedy(logits)
    return triton_sampling.greedy_naive(logits)


def sample(
    logits: Tensor, uniform: Tensor | None, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``(ids [...], confidence [...])``: greedy at temperature 0 (filters ignored), else drawn from the filtered distribution.

    Confidence is the probability the drafter gave its own token under the distribution it was taken from.
    """
    if temperature < GREEDY_BELOW:
        return greedy(logits)
    probs = transform(logits, temperature, top_k, top_p).softmax(-1)
    ids = inverse_cdf(probs, uniform)
    return ids, probs.gather(-1, ids[..., None])[..., 0]
