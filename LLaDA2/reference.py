"""The definition of the LLaDA2 decoders: one text, no cache, plain Python in the order of the papers.

Every forward sees the whole sequence from position 0 under an explicit mask. Slow on purpose. Forwards are counted as a decoder with a cache
would spend them, except for ``nocache``, which has no prefill and no commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llada2.modeling_llada2_moe import LLaDA2MoeModelLM
from llada2.options import Options
from shared.acceptance import estimate
from shared.draft import How
from shared.errors import UserError
from shared.masks import block_causal, token_causal
from shared.sampling import GREEDY_BELOW, inverse_cdf, sample, transform


@dataclass
class Step:
    """One draft forward over a block, as lists over in-block positions, and what it led to.

    ``edits``: position -> token, for known positions. ``chosen``: position -> (token, how), for masked ones, in order of choice.
    """

    start: int
    known: list[int]
    masked: list[int]
    tokens: list[int]
    confidence: list[float]
    logits: Tensor
    edits: dict[int, int] = field(default_factory=dict)
    chosen: dict[int, tuple[int, How]] = field(default_factory=dict)

    @property
    def span(self) -> list[int]:
        """The first run of masked positions."""
        return [i for k, i in enumerate(self.masked) if i == self.masked[0] + k]


@dataclass
class ReferenceText:
    """Ids without the prompt, the steps, and the forwards in order as ``(kind, tokens)``."""

    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    forwards: list[tuple[str, int]] = field(default_factory=list)


class Reference:
    """`generate` decodes one prompt. ``uniforms`` are consumed in the published order and must suffice."""

    def __init__(self, model: LLaDA2MoeModelLM, options: Options, uniforms: Sequence[float] = ()):
        self.model, self.options, self.sampling = model, options, options.sampling
        self.canvas, self.editing, self.routing = options.canvas, options.editing, options.routing
        stops = None if self.canvas.eos_id is None else (self.canvas.eos_id,)
        self.mask_id, self.stops = model.special_ids(self.canvas.mask_id, stops)
        self.uniforms: Iterator[float] = iter(uniforms)
        self.switch_on = False  # score_hysteresis
        self.out = ReferenceText()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int]) -> ReferenceText:
        if not prompt or self.mask_id in prompt:
            raise UserError(
                f"the prompt is {list(prompt)}. Allowed: some ids, none of them the mask's ({self.mask_id})"
            )
        length, self.prompt = self.canvas.block_length, len(prompt)
        blocks = math.ceil((self.prompt + self.canvas.max_new_tokens) / length)
        self.x = list(prompt) + [self.mask_id] * (blocks * length - self.prompt)
        self.prefilled = self.prompt // length * length
        cached = self.canvas.decoder != "nocache"
        if cached and self.prefilled:
            self.out.forwards.append(("prefill", self.prefilled))
        for end in range(self.prefilled + length, blocks * length + 1, length):
            self.block(end - length)
            if self.canvas.eos_early_stop and set(self.stops) & set(self.x[self.prompt : end]):
                break
            if cached and end < blocks * length:
                self.out.forwards.append(("commit", length))
        tokens = self.x[self.prompt : self.prompt + self.canvas.max_new_tokens]
        stop = next((k for k, t in enumerate(tokens) if t in self.stops), len(tokens))
        self.out.tokens = tokens[: stop + 1]  # the end token is kept
        return self.out

    def block(self, start: int) -> None:
        """Denoise and edit ``x[start : start + L]`` until nothing is masked and nothing changes, or the post steps are used up."""
        length, post = self.canvas.block_length, 0
        for _ in range(length + self.editing.max_post_steps + 1):
            masked = [i for i in range(length) if self.x[start + i] == self.mask_id]
            post += not masked
            if post > self.editing.max_post_steps:
                return
            step = self.draft(start, masked)
            self.edit(step)
            if self.canvas.decoder == "ssd_policy" and self.wants_verify(step) and masked:
                self.verify(step)
            self.fill(step)
            for i, token in [*step.edits.items(), *((i, token) for i, (token, _) in step.chosen.items())]:
                self.x[start + i] = token
            self.out.steps.append(step)
            if not masked and not step.edits:
                return
        raise RuntimeError(f"block at {start}: still masked; the model predicts the mask token")

    def bias(self, end: int) -> Tensor:
        """``[end, end]``: what is added to the attention scores, -inf where a token is not seen."""
        allowed = block_causal(end, self.canvas.block_length)
        bias = torch.zeros(end, end).masked_fill(~allowed, -math.inf)
        if self.canvas.as_bias:
            reach = min(end, end if self.canvas.decoder == "nocache" else self.prefilled)
            bias[:reach, :reach] = allowed[:reach, :reach].float()
        return bias

    def forward(self, kind: str, ids: list[int], positions: list[int], bias: Tensor, counted: int) -> Tensor:
        """Logits ``[L, V]`` of the last L tokens."""
        self.out.forwards.append((kind, counted))
        before, self.model.backend = self.model.backend, "reference"
        try:
            logits = self.model(torch.tensor([ids]), torch.tensor([positions]), None, bias.to(self.model.dtype))
        finally:
            self.model.backend = before
        logits = logits[0, -self.canvas.block_length :].float()
        if self.sampling.suppress_mask:
            logits[:, self.mask_id] = -math.inf
        return logits

    def draft(self, start: int, masked: list[int]) -> Step:
        length, end = self.canvas.block_length, start + self.canvas.block_length
        kind, counted = ("full", end) if self.canvas.decoder == "nocache" else ("draft", length)
        logits = self.forward(kind, self.x[:end], list(range(end)), self.bias(end), counted)
        uniform = None
        if self.sampling.temperature >= GREEDY_BELOW:
            uniform = torch.tensor([next(self.uniforms) for _ in range(length)])
        drawn = sample(logits, uniform, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        return Step(start, self.x[start:end], masked, *(x.tolist() for x in drawn), logits)

    def edit(self, step: Step) -> None:
        """Known tokens after the prompt that the model would replace with enough confidence."""
        for i, old in enumerate(step.known):
            generated = i not in step.masked and step.start + i >= self.prompt
            if generated and step.confidence[i] > self.editing.editing_threshold and step.tokens[i] != old:
                step.edits[i] = step.tokens[i]

    def confident(self, step: Step) -> list[int]:
        free = [i for i in step.masked if i not in step.chosen]
        return [i for i in free if step.confidence[i] > self.editing.confidence_threshold]

    def fill(self, step: Step) -> None:
        """Masked positions by confidence: all above the threshold, or the surest ones where those are fewer than the step still owes."""
        due = min(self.editing.num_to_transfer, len(step.masked)) - len(step.chosen)
        if due > 0:
            free = [i for i in step.masked if i not in step.chosen]
            surest = sorted(sorted(free, key=lambda i: -step.confidence[i])[:due])
            high = self.confident(step)
            step.chosen |= {i: (step.tokens[i], How.UNMASKED) for i in (high if len(high) >= due else surest)}

    def transform(self, logits: Tensor) -> Tensor:
        return transform(logits, self.sampling.target_temperature, self.sampling.top_k, self.sampling.top_p)

    def verify(self, step: Step) -> None:
        """Accept a prefix of the span under the block-size-one law, one mask query per position (S2D2, the 2L layout)."""
        length, start, end = self.canvas.block_length, step.start, step.start + self.canvas.block_length
        drafted = [step.tokens[i] if i in step.masked else step.edits.get(i, t) for i, t in enumerate(step.known)]
        bias = torch.full((end + length, end + length), -math.inf)
        bias[:start, :start] = self.bias(start)
        bias[start:, :start] = 0
        causal = token_causal(length)
        bias[start:end, start:end].masked_fill_(causal, 0)
        bias[end:, start:end].masked_fill_(causal.tril(-1), 0)
        bias[end:, end:].fill_diagonal_(0)
        ids = self.x[:start] + drafted + [self.mask_id] * length
        logits = self.forward("verify", ids, [*range(end), *range(start, end)], bias, 2 * length)
        target, uniform = self.transform(logits).softmax(-1), {i: next(self.uniforms) for i in step.span}
        for i in step.span:
            ratio = float(target[i, step.tokens[i]]) / max(step.confidence[i], 1e-12)
            ratio = min(1.0, ratio**self.options.speculation.ssd_ratio_tempering_factor) if ratio < 1 else 1.0
            if uniform[i] >= ratio:
                step.chosen[i] = (self.resample(step, target, i), How.RESAMPLED)
                break
            step.chosen[i] = (step.tokens[i], How.ACCEPTED)

    def resample(self, step: Step, target: Tensor, i: int) -> int:
        """A token from the normalised positive part of ``q - p``, or from ``q`` where that has no mass."""
        law = (target[i] - self.transform(step.logits[i]).softmax(-1)).clamp_min(0)
        law = law / law.sum() if 0 < float(law.sum()) < math.inf else target[i]
        return int(inverse_cdf(law, torch.tensor(next(self.uniforms))))

    def wants_verify(self, step: Step) -> bool:
        """The routing policies. A step without masks has the score -inf."""
        routing, confident = self.routing, len(self.confident(step))
        match routing.do_verify_policy:
            case "always" | "never" as policy:
                return policy == "always"
            case "mask_span_length":
                few = confident < min(routing.min_ssd_span_length, len(step.masked))
                return len(step.span) >= routing.min_ssd_span_length or (routing.legacy_ssd_span_strategy and few)
        alpha = estimate(self.transform(step.logits), torch.tensor(step.confidence), self.options.estimation).tolist()
        gain = sum(math.prod(alpha[j] for j in step.span[: k + 1]) for k in range(len(step.span)))
        price = confident if routing.do_verify_score_type == "difference_dynamic" else 1
        score = gain - routing.score_penalty_coef * price if step.masked else -math.inf
        if routing.do_verify_policy == "score_threshold":
            return score >= routing.do_verify_score_threshold
        self.switch_on = (
            score >= routing.hysteresis_threshold_off if self.switch_on else score > routing.hysteresis_threshold_on
        )
        return self.switch_on


def generate(
    model: LLaDA2MoeModelLM, prompt: Sequence[int], options: Options, uniforms: Sequence[float] = ()
) -> ReferenceText:
    """Decode one prompt by the definition."""
    return Reference(model, options, uniforms).generate(prompt)
