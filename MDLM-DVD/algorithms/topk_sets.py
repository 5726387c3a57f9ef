"""The cascade with the rule ``topk_sets``: what stands is the verifier's likeliest token among the likeliest few of both."""

from __future__ import annotations

import functools

from mdlm_dvd.algorithms import cascade


@functools.wraps(cascade.run_step)
def run_step(*step, **given) -> dict:
    """One round."""
    return cascade.run_step(*step, **{**given, "accept": "topk_sets"})
