"""The verifier alone: LLaDA's own decode, in steps or by a confidence threshold. What every other algorithm is compared with."""

from __future__ import annotations

import torch

from mdlm_dvd.algorithms._common import takes
from mdlm_dvd.options import VerifierOptions
from mdlm_dvd.src.llada import Schedule, chosen, guided, predicted, tie_order
from shared.trace import How


@takes(VerifierOptions)
def run_step(drafter, verifier, texts, options, step_idx, state) -> dict:
    """One forward, and the predictions it is sure of."""
    rows, unmask, sampling = texts.live, options.unmask, options.sampling
    if "schedule" not in state:
        steps = None if unmask.confidence_threshold is not None else unmask.steps
        state["schedule"] = Schedule(texts.gen_length, options.region.block_length, steps, texts.ask.device)
    region = texts.region(rows)
    logits = guided(verifier, texts, rows, region, "draft", sampling.cfg_scale)
    found = predicted(logits, unmask, sampling.temperature, texts, rows)
    number = torch.full((len(rows),), step_idx, device=region.device)
    ties = tie_order(texts, rows, unmask)
    take = chosen(found, region == texts.mask_id, state["schedule"], number, unmask.confidence_threshold, ties)
    texts.write(rows, take, found.tokens, How.UNMASKED, found.confidence, -found.score)
    texts.end_step(rows)
    return {}
