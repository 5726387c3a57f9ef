"""Every rule by which a verifier keeps or takes back drafted tokens. Tensors in, decisions out; algorithms and pipelines have no rule of their own.

The first half are DualDiffusion's five functions under their names: sequences ``[1, n]`` in, ``(verified, indices to mask again)`` out, both for row 0, the
verifier's sequence already in the drafter's vocabulary. The second half are rules over regions ``[b, G]``: DVD's two and ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_dvd.src.utils import probability_of

Verified = tuple[Tensor, set[int]]


def exact_match_verification(
    drafter_output: Tensor, verifier_output: Tensor, drafter_mask_id: int, verifier_mask_id: int, **_
) -> Verified:
    """Mask again where both have a token and the two differ. A drafter's mask is ``drafter_mask_id``, a verifier's ``verifier_mask_id``."""
    length = min(drafter_output.shape[1], verifier_output.shape[1])
    drafted, verified = drafter_output[0, :length], verifier_output[0, :length]
    both = (drafted != drafter_mask_id) & (verified != verifier_mask_id)
    return verifier_output.clone(), _indices(both & (drafted != verified))


def confidence_threshold_verification(
    drafter_output: Tensor,
    verifier_output: Tensor,
    drafter_mask_id: int,
    verifier_mask_id: int,
    threshold: float = 0.9,
    verifier_logits: Tensor | None = None,
    raw_verifier_output: Tensor | None = None,
    **_,
) -> Verified:
    """Mask again what the verifier gives a probability below ``threshold``.

    ``verifier_logits``: ``[n, V]`` or ``[steps, n, V]``, whose last step counts; fewer than the sequence has tokens are those of its end, and without any
    nothing is masked. ``raw_verifier_output`` are the ids to look up, in the verifier's vocabulary.
    """
    return verifier_output.clone(), _unsure(
        verifier_output, drafter_mask_id, verifier_mask_id, threshold, verifier_logits, raw_verifier_output
    )


def disagreement_with_confidence_verification(
    drafter_output: Tensor,
    verifier_output: Tensor,
    drafter_mask_id: int,
    verifier_mask_id: int,
    confidence_threshold: float = 0.9,
    disagreement_threshold: float = 0.3,
    verifier_logits: Tensor | None = None,
    raw_verifier_output: Tensor | None = None,
    **_,
) -> Verified:
    """Mask again what either of the two rules above does. ``disagreement_threshold`` is part of the published signature and decides nothing there."""
    verified, differing = exact_match_verification(drafter_output, verifier_output, drafter_mask_id, verifier_mask_id)
    unsure = _unsure(
        verifier_output,
        drafter_mask_id,
        verifier_mask_id,
        confidence_threshold,
        verifier_logits,
        raw_verifier_output,
    )
    return verified, differing | unsure


def trust_verifier(drafter_output: Tensor, verifier_output: Tensor, *_, **__) -> Verified:
    """Take what the verifier says."""
    return verifier_output.clone(), set()


def no_verification(drafter_output: Tensor, verifier_output: Tensor, *_, **__) -> Verified:
    """Take what the drafter says."""
    return drafter_output.clone(), set()


def _indices(found: Tensor) -> set[int]:
    return set(found.nonzero()[:, 0].tolist())


def _unsure(
    output: Tensor, drafter_mask: int, verifier_mask: int, threshold: float, logits: Tensor | None, raw: Tensor | None
) -> set[int]:
    """Indices of tokens that are no masks and whose probability is below ``threshold``."""
    if logits is None:
        return set()
    logits = logits[-1] if logits.dim() == 3 else logits
    ids, mask = (output[0], drafter_mask) if raw is None else (raw[0], verifier_mask)
    count = min(len(ids), len(logits))
    ids, logits, first = ids[len(ids) - count :], logits[len(logits) - count :], len(ids) - count
    low = (ids != mask) & (probability_of(logits, ids.clamp(max=logits.shape[-1] - 1)) < threshold)
    return {first + k for k in _indices(low)}


PUBLISHED_VERIFICATION: dict[str, Callable[..., Verified]] = {
    f.__name__: f
    for f in (
        exact_match_verification,
        confidence_threshold_verification,
        disagreement_with_confidence_verification,
        trust_verifier,
        no_verification,
    )
}


@dataclass(frozen=True)
class Judged:
    """What a verifier says of drafts: ``accepted [b, G]`` of the drafted positions, and the ``tokens [b, G]`` that stand there then."""

    accepted: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Claim:
    """Drafts before a verifier: ``tokens [b, G]`` at the positions ``drafted [b, G]``, the ``logits [b, G, V]`` of the verifier, and those of the drafter
    where a rule asks for them (`NEEDS_DRAFTER`)."""

    tokens: Tensor
    drafted: Tensor
    logits: Tensor
    drafter_logits: Tensor | None = None


def accept_all(claim: Claim, **_) -> Judged:
    """No verification."""
    return Judged(claim.drafted, claim.tokens)


def accept_probable(claim: Claim, *, accept_threshold: float, **_) -> Judged:
    """Keep a draft from this probability of the verifier's on (DVD, ``threshold_verifier``)."""
    return Judged(claim.drafted & (probability_of(claim.logits, claim.tokens) >= accept_threshold), claim.tokens)


def accept_exact(claim: Claim, **_) -> Judged:
    """Keep a draft that is the verifier's likeliest token (DVD, ``top_k_intersection``)."""
    return Judged(claim.drafted & (claim.logits.argmax(-1) == claim.tokens), claim.tokens)


def accept_disagreement(claim: Claim, *, accept_threshold: float, **_) -> Judged:
    """Keep a draft that passes both rules above (DualDiffusion's hybrid)."""
    sure = accept_probable(claim, accept_threshold=accept_threshold).accepted
    return Judged(sure & accept_exact(claim).accepted, claim.tokens)


def accept_topk_sets(claim: Claim, *, set_size: int, min_prob: float, **_) -> Judged:
    """Commit the verifier's likeliest token among the ``set_size`` likeliest of both; nothing where no token is in both sets, or that token has less than
    ``min_prob``. Of equally likely tokens the drafter's likelier one, then the smaller id."""
    size = min(set_size, claim.logits.shape[-1])
    verifier, drafter = claim.logits.float().softmax(-1), claim.drafter_logits.float().softmax(-1)
    shared = _largest(verifier, size) & _largest(drafter, size)
    best = verifier.masked_fill(~shared, -1)
    tied = shared & (best == best.max(-1, keepdim=True).values)
    tokens = drafter.masked_fill(~tied, -1).argmax(-1)
    sure = verifier.gather(-1, tokens[..., None])[..., 0] >= min_prob
    return Judged(claim.drafted & shared.any(-1) & sure, tokens)


def _largest(values: Tensor, size: int) -> Tensor:
    """The ``size`` largest of ``values [..., V]``."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(size, -1).indices, True)


ACCEPT_RULES: dict[str, Callable[..., Judged]] = {
    "all": accept_all,
    "threshold": accept_probable,
    "exact": accept_exact,
    "disagreement": accept_disagreement,
    "topk_sets": accept_topk_sets,
}
NEEDS_DRAFTER = frozenset({"topk_sets"})
