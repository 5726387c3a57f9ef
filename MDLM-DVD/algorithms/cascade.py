"""Several cached steps of the drafter, one verify of all it wrote, and accepted tokens stay wherever they are.

By default the verifier judges each token after those before it, as it would write one token at a time; the first that it would not have written it replaces. With
``accept exact`` the text is then its own at block size one. In the other modes it sees more of the draft, and also writes what it is sure of itself, so that a
round brings no less than a step of the verifier alone. With ``accept all`` nothing is verified: its own decode fills what the drafter left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdlm_dvd.algorithms._common import drafter_step, takes
from mdlm_dvd.options import CascadeOptions, Unmask
from mdlm_dvd.src.llada import Schedule, chosen, predicted
from mdlm_dvd.src.texts import Texts
from mdlm_dvd.src.utils import probability_of, top
from mdlm_dvd.verification_algos import ACCEPT_RULES, NEEDS_DRAFTER, Claim
from shared.trace import How

_ALONE = Unmask()  # how each of the models fills masks: by probability


@takes(CascadeOptions)
def run_step(drafter, verifier, texts, options, step_idx, state) -> dict:
    """One round, or, once the rounds are over, one step of the verifier alone."""
    if "schedule" not in state:
        length, blocks = texts.gen_length, options.region.block_length
        state["schedule"] = Schedule(length, blocks, options.unmask.steps, texts.ask.device)
        state["number"] = torch.zeros(len(texts), dtype=torch.long, device=texts.ask.device)
    unverified, rounds = options.acceptance.accept == "all", options.acceptance.max_iterations
    if step_idx >= 1 if unverified else rounds is not None and step_idx >= rounds:
        return fill(verifier, texts, state)
    draft = propose(drafter, texts, options, state["schedule"])
    if unverified:
        return keep_all(texts, draft)
    return verify(verifier, texts, options, state["schedule"], draft)


class Draft(NamedTuple):
    """What a drafter wrote beside the canvas: the ``region [b, G]`` with its ``tokens [b, G]`` at ``drafted [b, G]``, and, where a rule needs them, its
    ``logits [b, G, V]`` at each when it was written."""

    region: Tensor
    tokens: Tensor
    drafted: Tensor
    confidence: Tensor
    logits: Tensor | None


def propose(drafter, texts: Texts, options: CascadeOptions, schedule: Schedule) -> Draft:
    """``draft_steps`` forwards of the drafter: each fills the first open block with what it is sure of, the likeliest at least. A text whose draft has come
    to its end costs no more of them."""
    rows, wanted = texts.live, options.acceptance.accept in NEEDS_DRAFTER
    region = texts.region(rows)
    tokens, confidence = region.clone(), torch.zeros(region.shape, device=region.device)
    kept, going = None, list(range(len(rows)))
    for _ in range(options.draft.draft_steps):
        if not going:
            break
        some, at = [rows[k] for k in going], torch.tensor(going, device=region.device)
        before = region[at]
        logits = drafter_step(drafter, texts, some, before, options.draft.draft_cache)
        found = predicted(logits, _ALONE)
        masked = before == texts.mask_id
        take = chosen(found, masked, schedule, torch.zeros_like(at), options.draft.draft_threshold)
        region[at] = torch.where(take, found.tokens, before)
        tokens[at] = torch.where(take, found.tokens, tokens[at])
        confidence[at] = torch.where(take, found.confidence, confidence[at])
        if wanted:
            kept = torch.zeros(*region.shape, logits.shape[-1], device=region.device) if kept is None else kept
            kept[at] = torch.where(take[..., None], logits, kept[at])
        going = unfinished(texts, region, going)
    return Draft(region, tokens, region != texts.region(rows), confidence, kept)


def unfinished(texts: Texts, region: Tensor, rows: Sequence[int]) -> list[int]:
    """Which of ``rows`` have a mask before the first stop token of their ``region [b, G]``. One host read."""
    stops = torch.isin(region, texts.stops)
    before_stop = stops.cumsum(-1) == 0
    left = ((region == texts.mask_id) & before_stop).any(-1).tolist()
    return [k for k in rows if left[k]]


def keep_all(texts: Texts, draft: Draft) -> dict:
    """Nothing is verified."""
    rows = texts.live
    texts.write(rows, draft.drafted, draft.tokens, How.UNMASKED, draft.confidence)
    texts.end_step(rows)
    return {"drafted_count": int(draft.drafted.sum())}


def fill(verifier, texts: Texts, state: dict) -> dict:
    """One step of the verifier's own decode over what is still masked."""
    rows, schedule = texts.live, state["schedule"]
    region, index = texts.region(rows), texts.index(rows)
    masked = region == texts.mask_id
    found = predicted(verifier.logits(texts, rows, region, "verify"), _ALONE)
    number = schedule.open_step(masked, state["number"][index])
    take = chosen(found, masked, schedule, number, None)
    texts.write(rows, take, found.tokens, How.FILLED, found.confidence)
    state["number"][index] = number + 1
    texts.end_step(rows)
    return {}


def verify(verifier, texts: Texts, options: CascadeOptions, schedule: Schedule, draft: Draft) -> dict:
    """Judge a draft and keep what passes. At block size one (``ordered``) that ends with the first rejection, which is replaced; otherwise the verifier adds
    what it is sure of in the first open block, one token at least where nothing passed."""
    rows, acceptance = texts.live, options.acceptance
    before = texts.region(rows)
    masked = before == texts.mask_id
    logits = judging_logits(verifier, texts, rows, draft, before, acceptance)
    how = {k: getattr(acceptance, k) for k in ("accept_threshold", "set_size", "min_prob")}
    judged = ACCEPT_RULES[acceptance.accept](Claim(draft.tokens, draft.drafted, logits, draft.logits), **how)
    found, accepted = predicted(logits, _ALONE), judged.accepted
    if acceptance.verify_mode == "ordered":
        passed = (accepted | ~masked).cumprod(-1).bool()
        accepted, first = passed & masked, (~passed).cumsum(-1) == 1
        texts.write(rows, accepted, judged.tokens, How.ACCEPTED, probability_of(logits, judged.tokens))
        texts.write(rows, first & ~passed, found.tokens, How.RESAMPLED, found.confidence)
    else:
        texts.write(rows, accepted, judged.tokens, How.ACCEPTED, probability_of(logits, judged.tokens))
        open_ = schedule.first_open(masked & ~accepted)
        least = acceptance.fill_threshold
        sure = open_ & (found.confidence > (2.0 if least is None else least))
        texts.write(rows, sure, found.tokens, How.FILLED, found.confidence)
        idle = ~(accepted | sure).any(-1)
        must = top(found.score, open_ & idle[:, None], idle.long())
        texts.write(rows, must, found.tokens, How.FORCED, found.confidence)
    sent, kept = draft.drafted.sum(-1), accepted.sum(-1)
    texts.note_verify(rows, sent, kept)
    texts.end_step(rows)
    return {"drafted_count": int(sent.sum()), "accepted_count": int(kept.sum())}


def judging_logits(verifier, texts: Texts, rows: Sequence[int], draft: Draft, before: Tensor, acceptance) -> Tensor:
    """``[b, G, V]``: what the verifier says of drafts, as ``verify_mode`` has it. ``leave_out`` masks a group after the other; of places that were not drafted
    it is what the first of these passes says."""
    mode = acceptance.verify_mode
    if mode != "leave_out":
        beside = None if mode == "visible" else mode
        return verifier.logits(texts, rows, draft.region, "verify", beside=beside)
    group = (draft.drafted.cumsum(-1) - 1) % acceptance.verify_groups
    passes = draft.drafted.sum(-1).clamp(1, acceptance.verify_groups).tolist()
    logits = None
    for k in range(max(passes)):
        some = [n for n, most in enumerate(passes) if most > k]
        at = torch.tensor(some, device=before.device)
        hidden = (draft.drafted & (group == k))[at]
        region = torch.where(hidden, before[at], draft.region[at])
        said = verifier.logits(texts, [rows[n] for n in some], region, "verify")
        logits = said if logits is None else logits.index_copy(0, at, torch.where(hidden[..., None], said, logits[at]))
    return logits
