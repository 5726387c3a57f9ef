"""DVD's ``top_k_intersection``: a proposal stays that is the verifier's likeliest token."""

from __future__ import annotations

from mdlm_dvd.algorithms._common import takes
from mdlm_dvd.algorithms._proposals import propose_and_refill
from mdlm_dvd.options import StepOptions
from mdlm_dvd.verification_algos import accept_exact


@takes(StepOptions)
def run_step(drafter, verifier, texts, options, step_idx, state) -> dict:
    """Both models once."""
    return propose_and_refill(drafter, verifier, texts, options, step_idx, accept_exact)
