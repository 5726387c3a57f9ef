"""The cascade with the rule ``topk_sets``: what stands is the verifier's likeliest token among the likeliest few of both."""

from __future__ import annotations

import functools

from mdlm_dvd.algorithms import cascade
from shared.errors import UserError


@functools.wraps(cascade.run_step)
def run_step(*step, **given) -> dict:
    """One round. Raises `UserError` for a rule of another name."""
    if (rule := given.get("accept", "topk_sets")) not in ("exact", "topk_sets"):  # exact: the default of the options
        raise UserError(f"accept is {rule!r}. Allowed with topk_sets: none; or --algorithm cascade --accept {rule}")
    return cascade.run_step(*step, **{**given, "accept": "topk_sets"})
