"""DualDiffusion's pipeline as an algorithm: through text, so that the two vocabularies may differ. `mdlm_dvd.dual_pipeline` is its published door.

An iteration drafts, gives the draft to the verifier in its own vocabulary, lets it fill what is masked, and judges the draft by one of the five published
functions. What is rejected is masked again for the next iteration, and what was accepted stays wherever it is; with ``keep_later`` off the text is cut at its
first mask, as published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdlm_dvd.algorithms._common import special_ids
from mdlm_dvd.options import Region, Unmask
from mdlm_dvd.src.llada import Schedule, chosen, predicted
from mdlm_dvd.src.model import ModelBroker
from mdlm_dvd.src.texts import Ask, Texts
from mdlm_dvd.src.token_utils import convert_tokens, same_vocabulary
from mdlm_dvd.verification_algos import PUBLISHED_VERIFICATION
from shared.errors import UserError, unknown_name
from shared.trace import How

_BY_PROBABILITY = Unmask()


def run_step(
    drafter,
    verifier,
    prompts,
    step_idx,
    total_steps,
    algo_state,
    gen_length,
    verification="trust_verifier",
    max_iterations=1,
    num_drafter_steps=16,
    num_verifier_steps=1,
    draft_threshold=0.95,
    threshold=0.9,
    remask_threshold=0,
    keep_later=True,
    block_length=None,
) -> dict:
    """One iteration for every prompt that is not done. ``verification``: a name in `PUBLISHED_VERIFICATION`, or a function of that form."""
    if not callable(verification) and verification not in PUBLISHED_VERIFICATION:
        raise unknown_name("verification", verification, PUBLISHED_VERIFICATION)
    counts = {
        "max_iterations": max_iterations,
        "num_drafter_steps": num_drafter_steps,
        "num_verifier_steps": num_verifier_steps,
    }
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < (name != "num_drafter_steps"):
            raise UserError(
                f"{name} is {value!r}. Allowed: a whole number, at least {int(name != 'num_drafter_steps')}"
            )
    if step_idx == 0:
        rule = verification if callable(verification) else PUBLISHED_VERIFICATION[verification]
        how = Iteration(
            rule,
            num_drafter_steps,
            num_verifier_steps,
            draft_threshold,
            threshold,
            remask_threshold,
            keep_later,
            block_length,
        )
        algo_state = {"pairs": [Pair(drafter, verifier, p, gen_length, how) for p in prompts]}
    before = drafter.forwards, verifier.forwards
    live = [pair for pair in algo_state["pairs"] if not pair.done]
    remasked = [pair.iterate(last=step_idx + 1 >= max_iterations) for pair in live]
    same = drafter is verifier
    return {
        "algo_state": algo_state,
        "metrics": {
            "drafter_nfe": 0 if same else drafter.forwards - before[0],
            "verifier_nfe": verifier.forwards - before[1],
            "iterations": 1,
            "tokens_remasked": sum(remasked),
        },
        "results": [{"text": p.text(), "tokens": p.ids, "prompt": p.prompt} for p in algo_state["pairs"]],
        "done": all(pair.done for pair in algo_state["pairs"]),
    }


@dataclass(frozen=True)
class Iteration:
    """How an iteration goes: the verification function, most steps of each model, and the thresholds of drafting, judging and stopping."""

    rule: Callable
    drafter_steps: int
    verifier_steps: int
    draft_threshold: float
    threshold: float
    remask_threshold: int
    keep_later: bool
    block_length: int | None


class Pair:
    """One prompt between two models. ``ids``: what is decided, in the drafter's vocabulary, masks among it while it is not ``done``."""

    def __init__(self, drafter: ModelBroker, verifier: ModelBroker, prompt: Any, length: int, how: Iteration):
        self.models, self.prompt, self.how, self.length = (
            {"drafter": drafter, "verifier": verifier},
            prompt,
            how,
            length,
        )
        ids = {role: special_ids(broker, Region()) for role, broker in self.models.items()}
        self.masks, self.stops = {role: mask for role, (mask, _) in ids.items()}, ids["drafter"][1]
        same = same_vocabulary(drafter.tokenizer, verifier.tokenizer)
        self.same = same and self.masks["drafter"] == self.masks["verifier"]
        self.ids, self.done, self.remasked = [self.masks["drafter"]] * length, False, []

    def iterate(self, last: bool) -> int:
        """Draft, verify, judge. Returns how many tokens are masked again."""
        how = self.how
        texts = self.texts("drafter", self.ids)
        self.write("drafter", texts, how.drafter_steps, how.draft_threshold)
        drafted = texts.region([0])[0].tolist()
        given = self.convert(drafted, "drafter", "verifier")
        if not given:
            self.ids, self.done = [], True
            return 0
        texts = self.texts("verifier", given)
        draft = texts.region([0])
        masked = draft == texts.mask_id
        logits = self.write("verifier", texts, how.verifier_steps, None)
        if logits is None:  # nothing was masked: the draft is judged all the same
            logits = self.models["verifier"].logits(texts, [0], draft, "verify")
        written = texts.region([0])
        said = torch.where(masked, written, logits.argmax(-1))
        asked = {"threshold": how.threshold, "confidence_threshold": how.threshold}
        _, rejected = how.rule(draft, said, texts.mask_id, texts.mask_id, verifier_logits=logits[0], **asked)
        rejected = {k for k in rejected if not masked[0, k]}
        trusted = how.rule is not PUBLISHED_VERIFICATION["no_verification"]
        if last or len(rejected) <= how.remask_threshold:
            self.ids = self.without_masks(written[0].tolist()) if trusted else self.without_masks(given)
            self.done = True
            return 0
        kept = [texts.mask_id if k in rejected or masked[0, k] else i for k, i in enumerate(draft[0].tolist())]
        if not how.keep_later and texts.mask_id in kept:
            kept = kept[: kept.index(texts.mask_id)]
        ids = self.convert(kept, "verifier", "drafter")[: self.length]
        self.ids = ids + [self.masks["drafter"]] * (self.length - len(ids))
        self.remasked.append(len(rejected))
        return len(rejected)

    def without_masks(self, ids: list[int]) -> list[int]:
        """The verifier's ``ids`` in the drafter's vocabulary, what is still masked left out, up to the first stop token."""
        found = [i for i in self.convert(ids, "verifier", "drafter") if i != self.masks["drafter"]]
        return found[: next((k for k, i in enumerate(found) if i in self.stops), len(found))]

    def texts(self, role: str, ids: list[int]) -> Texts:
        """A canvas of one text with the region ``ids``, in that role's vocabulary."""
        broker = self.models[role]
        device = torch.device(getattr(broker.model_state["model"], "device", "cpu"))
        prompt = list(self.prompt) if not isinstance(self.prompt, str) else broker.prompt_ids(self.prompt)
        texts = Texts([prompt], Ask(len(ids), self.masks[role], device=device, whole=True))
        first = texts.lengths[0]
        texts.canvas.tokens[0, first : first + len(ids)] = torch.tensor(ids, dtype=torch.long, device=device)
        return texts

    def convert(self, ids: list[int], source: str, target: str) -> list[int]:
        """``ids`` of the role ``source`` in the vocabulary of the role ``target``; the same ids where there is but one."""
        if self.same:
            return list(ids)
        tokenizers = [self.models[role].tokenizer for role in (source, target)]
        return convert_tokens(self.masks[source], self.masks[target], ids, *tokenizers)

    def write(self, role: str, texts: Texts, steps: int, threshold: float | None) -> Tensor | None:
        """At most ``steps`` steps of a model alone over what is masked: above the ``threshold``, or (None) in even shares. Returns the logits ``[1, G, V]`` of
        the last of them."""
        share = min(steps, texts.gen_length)
        schedule = Schedule(
            texts.gen_length,
            self.how.block_length if threshold is not None else None,
            None if threshold is not None else share,
            texts.ask.device,
        )
        logits = None
        for number in range(steps):
            region = texts.region([0])
            masked = region == texts.mask_id
            if not masked.any():
                break
            logits = self.models[role].logits(texts, [0], region, "draft" if role == "drafter" else "verify")
            found = predicted(logits, _BY_PROBABILITY)
            at = torch.tensor([number], device=region.device)
            take = chosen(found, masked, schedule, at, threshold)
            texts.write([0], take, found.tokens, How.UNMASKED, found.confidence)
        return logits

    def text(self) -> str:
        """What is decided, without special tokens."""
        return self.models["drafter"].tokenizer.decode(self.ids, skip_special_tokens=True)
