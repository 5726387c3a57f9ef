"""The verifier's own greedy decode, token for token, several of its steps a pass.

A draft is a row of states: what the text would be after the verifier's next step, after the one behind it, and so on. The verifier takes its step from each of
them in one pass. As long as that gives the next state, the draft was right; where it does not, its own step stands. So the text is that of ``llada`` whatever
the drafter proposes. Where a pass over several states costs as much as one over one, steps are saved; a large network with long texts is no such case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdlm_dvd.algorithms._common import drafter_step, takes
from mdlm_dvd.options import ExactOptions
from mdlm_dvd.src.llada import Predicted, Schedule, chosen, predicted, tie_order
from mdlm_dvd.src.texts import Texts
from shared.errors import UserError
from shared.trace import How


@takes(ExactOptions)
def run_step(drafter, verifier, texts, options, step_idx, state) -> dict:
    """Propose states, let the verifier take its step from each, and write the steps that were proposed right and one more."""
    if "schedule" not in state:
        begin(verifier, texts, options, state)
    rows, schedule = texts.live, state["schedule"]
    index, first = texts.index(rows), texts.region(rows)
    number = state["number"][index]
    states = propose(drafter, texts, rows, first, number, options, state)
    logits = verifier.logits_of_states(texts, rows, states, "verify")
    ties = tie_order(texts, rows, options.unmask)
    right = torch.ones(len(rows), dtype=torch.bool, device=first.device)
    accepted = torch.zeros(len(rows), dtype=torch.long, device=first.device)
    for k in range(states.shape[1]):
        region = states[:, k]
        found = predicted(logits[:, k], options.unmask)
        take = chosen(found, region == texts.mask_id, schedule, number + k, None, ties) & right[:, None]
        after = torch.where(take, found.tokens, region)
        drafted = k + 1 < states.shape[1]
        same = (after == states[:, k + 1]).all(-1) & right if drafted else torch.zeros_like(right)
        for rest, how in ((same, How.ACCEPTED), (~same, How.RESAMPLED)):
            texts.write(rows, take & rest[:, None], found.tokens, how, found.confidence, -found.score)
        for name, value in (("tokens", found.tokens), ("score", found.score)):
            state[name][index] = torch.where(right[:, None], value, state[name][index])
        accepted, right = accepted + same, same
    state["number"][index] = number + accepted + 1
    texts.note_verify(rows, torch.full_like(accepted, states.shape[1] - 1), accepted)
    texts.end_step(rows)
    return {"drafted_count": (states.shape[1] - 1) * len(rows), "accepted_count": int(accepted.sum())}


def begin(verifier, texts: Texts, options: ExactOptions, state: dict) -> None:
    """The state of a batch. Raises `UserError` where LLaDA's decode is not the verifier's own."""
    network = verifier.network
    if network is not None and (network.block_length is not None or network.predicts_next):
        raise UserError(
            f"verifier {verifier.name!r} decodes block by block. Allowed with verify_exact: a verifier whose own decode is LLaDA's"
        )
    device, shape = texts.ask.device, (len(texts), texts.gen_length)
    state["schedule"] = Schedule(texts.gen_length, options.region.block_length, options.unmask.steps, device)
    state["number"] = torch.zeros(len(texts), dtype=torch.long, device=device)
    state["tokens"] = torch.zeros(shape, dtype=torch.long, device=device)
    state["score"] = torch.zeros(shape, device=device)


def propose(
    drafter, texts: Texts, rows: Sequence[int], region: Tensor, number: Tensor, options: ExactOptions, state: dict
) -> Tensor:
    """``[b, m, G]``: where the texts are, and where they may be after each of the next steps. The verifier's last prediction costs nothing; before the
    first pass there is none."""
    by_verifier, index = options.lookahead.draft_with == "verifier", texts.index(rows)
    states, count = [region], options.lookahead.lookahead
    if by_verifier and not texts.batch:
        count = 1
    for k in range(count - 1):
        if by_verifier:
            found = predicted_before(state, index)
        else:
            cached = options.lookahead.draft_cache
            found = predicted(drafter_step(drafter, texts, rows, states[-1], cached), options.unmask)
        ties = tie_order(texts, rows, options.unmask)
        take = chosen(found, states[-1] == texts.mask_id, state["schedule"], number + k, None, ties)
        states.append(torch.where(take, found.tokens, states[-1]))
    return torch.stack(states, 1)


def predicted_before(state: dict, index: Tensor) -> Predicted:
    """What the verifier said in the pass before."""
    return Predicted(state["tokens"][index], state["score"][index], state["score"][index])
