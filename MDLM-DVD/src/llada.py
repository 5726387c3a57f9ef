"""LLaDA's decode, a step at a time: a schedule of tokens, what a model predicts, and which predictions a step writes (Nie et al. 2025, algorithms 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdlm_dvd.src.model import ModelBroker
from mdlm_dvd.src.texts import Ask, Texts
from mdlm_dvd.src.utils import draws, quota, top, top_of_text
from shared.errors import UserError
from shared.policy.sampling import GREEDY_BELOW, inverse_cdf
from shared.trace import How


class Schedule:
    """``steps`` steps over a region of ``length`` tokens in blocks of ``block_length``: each block gets an even share of the steps (``capped``: no more than
    it has tokens), and each step of a block an even share of its masks, larger shares first."""

    def __init__(
        self, length: int, block_length: int | None, steps: int | None, device: torch.device, capped: bool = True
    ):
        self.block_length = min(block_length or length, length)
        blocks = -(-length // self.block_length)
        self.steps = length if steps is None else steps
        if self.steps < blocks:
            raise UserError(
                f"steps is {steps}. Allowed: at least {blocks}, one for each block of {self.block_length} tokens"
            )
        if steps is None:  # a token a step, also where the last block is shorter
            shares = [min(self.block_length, length - k * self.block_length) for k in range(blocks)]
        else:
            shares = [self.steps // blocks + (k < self.steps % blocks) for k in range(blocks)]
            if capped:
                shares = [min(s, self.block_length, length - k * self.block_length) for k, s in enumerate(shares)]
        self.steps = sum(shares)
        block = [k for k, share in enumerate(shares) for _ in range(share)]
        left = [share - n for share in shares for n in range(share)]
        self._block, self._left = torch.tensor([block, left], device=device)
        self._of = torch.arange(length, device=device) // self.block_length

    def allowed(self, masked: Tensor, number: Tensor) -> Tensor:
        """``[b, G]``: the masks of ``masked [b, G]`` up to the end of the block that step ``number [b]`` of each row is in."""
        return masked & (self._of <= self._block[self._within(number)][:, None])

    def quota(self, allowed: Tensor, number: Tensor) -> Tensor:
        """``[b]``: how many of them that step writes."""
        return quota(allowed.sum(-1), self._left[self._within(number)])

    def open_step(self, masked: Tensor, number: Tensor) -> Tensor:
        """``[b]``: ``number [b]``, or the first step of the first block that has masks where that is later."""
        first = torch.where(masked, self._of, 1 << 30).amin(-1)
        return torch.maximum(number, torch.searchsorted(self._block, first))

    def first_open(self, masked: Tensor) -> Tensor:
        """``[b, G]``: the masks in each row's first block that has any."""
        first = torch.where(masked, self._of, 1 << 30).amin(-1, keepdim=True)
        return masked & (self._of == first)

    def _within(self, number: Tensor) -> Tensor:
        return number.clamp(max=self.steps - 1)


class Predicted(NamedTuple):
    """At every position of a region ``[b, G]``: a token, its probability, and what positions are ranked by."""

    tokens: Tensor
    confidence: Tensor
    score: Tensor


def predicted(
    logits: Tensor, unmask: Any, temperature: float = 0.0, texts: Texts | None = None, rows: Sequence[int] = ()
) -> Predicted:
    """What ``logits [b, G, V]`` say, with the options ``unmask`` (`mdlm_dvd.options.Unmask`, its token ids filled in). A draw takes a number of its row for
    every position, random ranking one more."""
    if unmask.logits_eos_inf:
        logits = logits.index_fill(-1, torch.tensor(unmask.eos_token_id, device=logits.device), -torch.inf)
    if temperature < GREEDY_BELOW:
        tokens = logits.argmax(-1)
    else:
        uniform = draws(texts.canvas.uniforms, texts.index(rows), logits.shape[1])
        tokens = inverse_cdf((logits / temperature).softmax(-1), uniform)
    weighed = logits
    if unmask.confidence_eos_eot_inf:
        ends = torch.tensor([unmask.eos_token_id, unmask.eot_token_id], device=logits.device)
        weighed = logits.index_fill(-1, ends, -torch.inf)
    chosen = weighed.gather(-1, tokens[..., None])[..., 0]
    confidence = (chosen - weighed.logsumexp(-1)).exp()
    if unmask.remasking == "random":
        score = draws(texts.canvas.uniforms, texts.index(rows), logits.shape[1])
    else:
        score = chosen if unmask.remasking == "max_logit" else confidence
    return Predicted(tokens, confidence, score)


def guided(
    broker: ModelBroker, texts: Texts, rows: Sequence[int], region: Tensor, kind: str, cfg_scale: float
) -> Tensor:
    """``[b, G, V]``: logits with classifier-free guidance, ``u + (cfg_scale + 1) (c - u)``, where ``u`` is without the prompt; one pass where it is off."""
    given = broker.logits(texts, rows, region, kind)
    if cfg_scale == 0:
        return given
    without = broker.logits(texts, rows, region, kind, hide_prompt=True)
    logits = without + (cfg_scale + 1) * (given - without)
    logits[..., texts.mask_id] = -torch.inf
    return logits


def chosen(
    found: Predicted,
    masked: Tensor,
    schedule: Schedule,
    number: Tensor,
    threshold: float | None,
    before: Sequence[int] | None = None,
) -> Tensor:
    """``[b, G]``: what step ``number [b]`` of each row writes: its share of the schedule, or, with a ``threshold``, everything above it in the first open
    block, the best one at least. ``before``: as `mdlm_dvd.src.utils.top_of_text` wants it, where ties go as published."""
    if threshold is None:
        allowed = schedule.allowed(masked, number)
        count = schedule.quota(allowed, number)
        return top(found.score, allowed, count) if before is None else top_of_text(found.score, allowed, count, before)
    open_ = schedule.first_open(masked)
    best = top(found.score, open_, torch.ones_like(number))
    return best | (open_ & (found.confidence > threshold))


def tie_order(texts: Texts, rows: Sequence[int], unmask: Any) -> list[int] | None:
    """What `chosen` is given as ``before``: prompt lengths where candidates of confidence 0 are to be expected."""
    return [texts.lengths[i] for i in rows] if unmask.confidence_eos_eot_inf else None


def generate_per_step(
    broker: ModelBroker,
    prompt: Sequence[int],
    n: int,
    k: int,
    *,
    gen_length: int,
    block_length: int | None = None,
    cfg_scale: float = 0.0,
    unmask: Any,
    mask_id: int,
) -> tuple[Tensor, Tensor]:
    """DualDiffusion's ``generate_per_step``: exactly ``n`` steps, each of which writes ``k`` tokens up to the end of its block or as many as are masked there; masks may
    remain. Returns the region ``[G]`` and the logits of every step ``[n, G, V]``."""
    texts = Texts([prompt], Ask(gen_length, mask_id, device=broker.network.device, whole=True))
    schedule, said = Schedule(gen_length, block_length, n, texts.ask.device, capped=False), []
    for step in range(n):
        region = texts.region([0])
        logits = guided(broker, texts, [0], region, "draft", cfg_scale)
        found = predicted(logits, unmask)
        allowed = schedule.allowed(region == mask_id, torch.tensor([step], device=region.device))
        take = top(found.score, allowed, torch.tensor([k], device=region.device))
        texts.write([0], take, found.tokens, How.UNMASKED, found.confidence, -found.score)
        said.append(logits[0])
    return texts.region([0])[0], torch.stack(said)
