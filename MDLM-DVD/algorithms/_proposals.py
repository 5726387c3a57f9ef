"""The published algorithms' step: the drafter proposes its share of the region, the verifier keeps some of it and fills as many places as failed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mdlm_dvd.algorithms._common import drafter_step, verifier_step
from mdlm_dvd.src.utils import probability_of, top
from mdlm_dvd.verification_algos import Claim
from shared.trace import How


def propose_and_refill(drafter, verifier, texts, options, step_idx, accept: Callable, **how) -> dict:
    """One step, which writes the same number of tokens whatever is kept: ``gen_length / steps``, one more in the first steps where that leaves a rest.
    Places are chosen by the largest logit. The refill reads the pass in which rejected proposals were visible, so that the same token may come back."""
    rows, length = texts.live, texts.gen_length
    steps = options.unmask.steps or length
    share = length // steps + (step_idx < length % steps)
    region = texts.region(rows)
    masked, count = region == texts.mask_id, torch.full((len(rows),), share, device=region.device)
    logit, tokens = drafter_step(drafter, texts, rows, region).max(-1)
    drafted = top(logit, masked, count)
    logits = verifier_step(verifier, texts, rows, torch.where(drafted, tokens, region))
    judged = accept(Claim(tokens, drafted, logits), **how)
    texts.write(rows, judged.accepted, judged.tokens, How.ACCEPTED, probability_of(logits, tokens), -logit)
    best, own = logits.max(-1)
    failed = drafted.sum(-1) - judged.accepted.sum(-1)
    refill = top(best, masked & ~judged.accepted, failed)
    texts.write(rows, refill, own, How.RESAMPLED, probability_of(logits, own), -best)
    texts.note_verify(rows, drafted.sum(-1), judged.accepted.sum(-1))
    texts.end_step(rows)
    return {"drafted_count": int(drafted.sum()), "accepted_count": int(judged.accepted.sum())}
