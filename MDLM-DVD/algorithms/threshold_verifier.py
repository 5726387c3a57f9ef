"""DVD's ``threshold_verifier``: a proposal stays from a probability of the verifier's on."""

from __future__ import annotations

from mdlm_dvd.algorithms._common import takes
from mdlm_dvd.algorithms._proposals import propose_and_refill
from mdlm_dvd.options import ThresholdOptions
from mdlm_dvd.verification_algos import accept_probable


@takes(ThresholdOptions)
def run_step(drafter, verifier, texts, options, step_idx, state) -> dict:
    """Both models once."""
    how = {"accept_threshold": options.acceptance.threshold}
    return propose_and_refill(drafter, verifier, texts, options, step_idx, accept_probable, **how)
