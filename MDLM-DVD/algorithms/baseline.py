"""DVD's ``baseline_cascade``: the verifier alone, places by the largest logit. The drafter is not asked."""

from __future__ import annotations

import torch

from mdlm_dvd.algorithms._common import takes, verifier_step
from mdlm_dvd.options import StepOptions
from mdlm_dvd.src.utils import probability_of, top
from shared.trace import How


@takes(StepOptions)
def run_step(drafter, verifier, texts, options, step_idx, state) -> dict:
    """The verifier once."""
    rows, length = texts.live, texts.gen_length
    steps = options.unmask.steps or length
    share = length // steps + (step_idx < length % steps)
    region = texts.region(rows)
    logits = verifier_step(verifier, texts, rows, region)
    logit, tokens = logits.max(-1)
    take = top(logit, region == texts.mask_id, torch.full((len(rows),), share, device=region.device))
    texts.write(rows, take, tokens, How.FILLED, probability_of(logits, tokens), -logit)
    texts.end_step(rows)
    return {}
