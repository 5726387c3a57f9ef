"""The definition of the LLaDA2 decoders: one text, no cache, plain Python in the order of the papers.

Every forward sees the whole sequence from position 0 under an explicit mask. Slow on purpose. Forwards are counted as the decoder with a cache
spends them, so commits only where they cost one; ``nocache`` has no prefill and no commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llada2.decoding import resolve
from llada2.modeling_llada2_moe import LLaDA2MoeModelLM
from llada2.options import NoCacheOptions, PlainSavings
from shared.acceptance import estimate, normalized_entropy
from shared.draft import How
from shared.errors import UserError
from shared.masks import block_causal, token_causal
from shared.options import Acceptance, Cache
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
    decoded: int  # tokens the block had gained before
    edits: dict[int, int] = field(default_factory=dict)
    chosen: dict[int, tuple[int, How]] = field(default_factory=dict)
    verified: bool = False

    @property
    def span(self) -> list[int]:
        """The first run of masked positions."""
        return [i for k, i in enumerate(self.masked) if i == self.masked[0] + k]

    @property
    def as_drafted(self) -> bool:
        return all(self.tokens[i] == token for i, (token, _) in self.chosen.items())


@dataclass
class ReferenceText:
    """Ids without the prompt, the steps, and the forwards in order as ``(kind, tokens)``."""

    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    forwards: list[tuple[str, int]] = field(default_factory=list)


class Reference:
    """`generate` decodes one prompt. ``uniforms`` are consumed in the published order and must suffice."""

    def __init__(self, model: LLaDA2MoeModelLM, options: NoCacheOptions, uniforms: Sequence[float] = ()):
        self.model, self.options = model, resolve(model, options)
        self.blocks, self.sampling = self.options.blocks, options.sampling
        self.unmask, self.editing = options.unmask, options.editing
        self.cached, self.speculative = options.decoder != "nocache", options.decoder == "ssd_policy"
        self.savings = getattr(options, "savings", PlainSavings())
        self.cache_options = getattr(options, "cache", Cache())
        self.acceptance = getattr(options, "acceptance", Acceptance())
        self.uniforms: Iterator[float] = iter(uniforms)
        self.switch_on = False  # score_hysteresis
        self.arms: dict[int, list[list[float]]] = {}  # contextual_bandit_ucb: bucket -> rewards of (skip, verify)
        self.decisions = 0
        self.out = ReferenceText()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int]) -> ReferenceText:
        length, mask_id, self.prompt = self.blocks.block_length, self.blocks.mask_id, len(prompt)
        if not prompt or mask_id in prompt:
            raise UserError(f"the prompt is {list(prompt)}. Allowed: some ids, none of them the mask's ({mask_id})")
        total = math.ceil((self.prompt + self.blocks.max_new_tokens) / length) * length
        self.x = list(prompt) + [mask_id] * (total - self.prompt)
        self.prefilled = self.prompt // length * length
        if self.cached and self.prefilled:
            self.out.forwards.append(("prefill", self.prefilled))
        for end in range(self.prefilled + length, total + 1, length):
            self.block(end - length)
            stopped = set(self.blocks.stopping_criteria_idx) & set(self.x[self.prompt : end])
            last = end == total or bool(self.blocks.eos_early_stop and stopped)
            if self.cached and self.commit_costs_a_forward(last, self.out.steps[-1]):
                self.out.forwards.append(("commit", length))
            if last:
                break
        tokens = self.x[self.prompt : end][: self.blocks.max_new_tokens]
        stop = next((k for k, t in enumerate(tokens) if t in self.blocks.stopping_criteria_idx), len(tokens))
        self.out.tokens = tokens[: stop + (not self.blocks.trim_stop_tokens)]
        return self.out

    def commit_costs_a_forward(self, last: bool, step: Step) -> bool:
        """Does keeping a finished block take a forward of its own? Not where its last ``step`` has computed the same keys."""
        causal, savings = self.cache_options.cache_ver, self.savings
        if not step.masked:
            encoded = savings.reuse_draft and not step.edits and self.cache_options.draft_ver == causal
        else:
            whole = step.span[-1] == self.blocks.block_length - 1 or not getattr(savings, "short_verify", True)
            encoded = step.verified and whole and step.as_drafted and causal and savings.reuse_verify
        return not encoded and not (savings.skip_last_commit if last else savings.fuse_commit)

    def block(self, start: int) -> None:
        """Denoise and edit ``x[start : start + L]`` until nothing is masked and nothing changes, or the post steps are used up."""
        length, post, decoded = self.blocks.block_length, 0, 0
        for _ in range(length + self.editing.max_post_steps + 1):
            masked = [i for i in range(length) if self.x[start + i] == self.blocks.mask_id]
            post += not masked
            if post > self.editing.max_post_steps:
                return
            step = self.draft(start, masked, decoded)
            self.edit(step)
            if self.speculative and self.wants_verify(step) and masked:
                self.verify(step)
            self.fill(step)
            for i, token in [*step.edits.items(), *((i, token) for i, (token, _) in step.chosen.items())]:
                self.x[start + i] = token
            self.out.steps.append(step)
            decoded += len(step.chosen)
            if self.speculative and self.options.routing.do_verify_policy == "contextual_bandit_ucb" and masked:
                self.arms[self.bucket][step.verified].append(len(step.chosen) / (1 + step.verified))
            if not masked and not step.edits:
                return
        raise RuntimeError(f"block at {start}: still masked; the model predicts the mask token")

    def bias(self, end: int) -> Tensor:
        """``[end, end]``: what is added to the attention scores of encoded tokens, -inf where one is not seen."""
        allowed = token_causal(end) if self.cache_options.cache_ver else block_causal(end, self.blocks.block_length)
        bias = torch.zeros(end, end).masked_fill(~allowed, -math.inf)
        if self.blocks.as_bias:
            reach = min(end, self.prefilled if self.cached else end)
            bias[:reach, :reach] = allowed[:reach, :reach].float()
        return bias

    def forward(self, kind: str, ids: list[int], positions: list[int], bias: Tensor, counted: int) -> Tensor:
        """Logits ``[L, V]`` of the last L tokens."""
        self.out.forwards.append((kind, counted))
        before, self.model.backend = self.model.backend, "reference" if self.blocks.as_bias else self.model.backend
        mask = bias if self.blocks.as_bias else bias == 0  # both hide what has -inf
        try:
            logits = self.model(torch.tensor([ids]), torch.tensor([positions]), None, mask)
        finally:
            self.model.backend = before
        logits = logits[0, -self.blocks.block_length :].float()
        if self.sampling.suppress_mask:
            logits[:, self.blocks.mask_id] = -math.inf
        return logits

    def draft(self, start: int, masked: list[int], decoded: int) -> Step:
        """Denoise the block: it sees everything before it and all of itself; with ``draft_ver`` leading known tokens are causal."""
        length, end = self.blocks.block_length, start + self.blocks.block_length
        bias = self.bias(end)
        if self.cache_options.cache_ver:
            bias[start:, start:] = 0
        if self.cache_options.draft_ver:
            known = masked[0] if masked else length
            bias[start : start + known, start:].masked_fill_(~token_causal(length)[:known], -math.inf)
        kind, counted = ("draft", length) if self.cached else ("full", end)
        logits = self.forward(kind, self.x[:end], list(range(end)), bias, counted)
        uniform = None
        if self.sampling.temperature >= GREEDY_BELOW:
            uniform = torch.tensor([next(self.uniforms) for _ in range(length)])
        drawn = sample(logits, uniform, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        return Step(start, self.x[start:end], masked, *(x.tolist() for x in drawn), logits, decoded)

    def edit(self, step: Step) -> None:
        """Known tokens after the prompt that the model would replace with enough confidence."""
        for i, old in enumerate(step.known):
            generated = i not in step.masked and step.start + i >= self.prompt
            if generated and step.confidence[i] > self.editing.editing_threshold and step.tokens[i] != old:
                step.edits[i] = step.tokens[i]

    def confident(self, step: Step) -> list[int]:
        free = [i for i in step.masked if i not in step.chosen]
        return [i for i in free if step.confidence[i] > self.unmask.confidence_threshold]

    def fill(self, step: Step) -> None:
        """Masked positions by confidence: all above the threshold, or the surest ones where those are fewer than the step still owes."""
        if self.acceptance.always_check_high_confidence:
            sure = sorted(self.confident(step), key=lambda i: -step.confidence[i])
            step.chosen |= {i: (step.tokens[i], How.CONFIDENT) for i in sure}
        due = min(self.unmask.num_to_transfer, len(step.masked)) - len(step.chosen)
        if due > 0:
            free = [i for i in step.masked if i not in step.chosen]
            surest = sorted(sorted(free, key=lambda i: -step.confidence[i])[:due])
            high = self.confident(step)
            step.chosen |= {i: (step.tokens[i], How.UNMASKED) for i in (high if len(high) >= due else surest)}

    def transform(self, logits: Tensor) -> Tensor:
        return transform(logits, self.sampling.target_temperature, self.sampling.top_k, self.sampling.top_p)

    def verifier_logits(self, step: Step) -> Tensor:
        """``[L, V]``: the block-size-one model on the drafted and edited block, one mask query per position (S2D2, the 2L layout)."""
        length, start, end = self.blocks.block_length, step.start, step.start + self.blocks.block_length
        drafted = [step.tokens[i] if i in step.masked else step.edits.get(i, t) for i, t in enumerate(step.known)]
        bias = torch.full((end + length, end + length), -math.inf)
        bias[:start, :start] = self.bias(start)
        bias[start:, :start] = 0
        causal = token_causal(length)
        bias[start:end, start:end].masked_fill_(causal, 0)
        bias[end:, start:end].masked_fill_(causal.tril(-1), 0)
        bias[end:, end:].fill_diagonal_(0)
        ids = self.x[:start] + drafted + [self.blocks.mask_id] * length
        return self.forward("verify", ids, [*range(end), *range(start, end)], bias, 2 * length)

    def verify(self, step: Step) -> None:
        """Accept a prefix of the span; the first token that is not accepted is replaced, and only later ones with a high ratio are kept."""
        logits, step.verified, rule = self.verifier_logits(step), True, self.acceptance
        target, best = self.transform(logits).softmax(-1), logits.argmax(-1).tolist()
        exact = rule.acceptance == "exact" and self.sampling.temperature < GREEDY_BELOW
        ratio = [float(target[i, t]) / max(step.confidence[i], 1e-12) for i, t in enumerate(step.tokens)]
        ratio = [min(1.0, r**rule.ssd_ratio_tempering_factor) if r < 1 else 1.0 for r in ratio]
        uniform = {} if exact else {i: next(self.uniforms) for i in step.span}
        for i in step.span:
            if step.tokens[i] == best[i] if exact else uniform[i] < ratio[i]:
                step.chosen[i] = (step.tokens[i], How.ACCEPTED)
                continue
            if exact:
                step.chosen[i] = (best[i], How.RESAMPLED)
            elif rule.allow_resample:
                step.chosen[i] = (self.resample(step, target, i), How.RESAMPLED)
            else:
                step.chosen[i] = (step.tokens[i], How.KEPT)
            break
        if rule.ssd_ratio_threshold >= 0:
            for i in step.masked if rule.ssd_threshold_all_spans else step.span:
                if ratio[i] >= rule.ssd_ratio_threshold:
                    step.chosen.setdefault(i, (step.tokens[i], How.RATIO))

    def resample(self, step: Step, target: Tensor, i: int) -> int:
        """A token from the normalised positive part of ``q - p``, or from ``q`` where that has no mass."""
        law = (target[i] - self.transform(step.logits[i]).softmax(-1)).clamp_min(0)
        law = law / law.sum() if 0 < float(law.sum()) < math.inf else target[i]
        return int(inverse_cdf(law, torch.tensor(next(self.uniforms))))

    def wants_verify(self, step: Step) -> bool:
        """The routing policies. A step without masks has the score -inf."""
        routing, confident = self.options.routing, len(self.confident(step))
        match routing.do_verify_policy:
            case "always" | "never" as policy:
                return policy == "always"
            case "mask_span_length":
                few = confident < min(routing.min_ssd_span_length, len(step.masked))
                return len(step.span) >= routing.min_ssd_span_length or (routing.legacy_ssd_span_strategy and few)
            case "contextual_bandit_ucb":
                return bool(step.masked) and self.bandit(step)
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

    def bandit(self, step: Step) -> bool:
        options, length = self.options.bandit, self.blocks.block_length
        where = step.span if options.ucb_entropy_source == "span" else step.masked
        mean_entropy = float(normalized_entropy(self.transform(step.logits))[where].mean())
        self.bucket = 0
        for value, low, high, bins in (
            (len(step.span), 1, length, options.ucb_span_length_bins),
            (step.decoded / length, 0, 1, options.ucb_block_progress_bins),
            (mean_entropy, 0, 1, options.ucb_entropy_bins),
        ):
            value = min(max(value, low), high)
            inside = 0 if bins <= 1 or high <= low else min(bins - 1, int(bins * (value - low) / (high - low)))
            self.bucket = self.bucket * bins + inside
        self.decisions += 1
        skip, verify = (
            sum(a) / len(a) + options.ucb_beta * math.sqrt(math.log(self.decisions) / len(a)) if a else math.inf
            for a in self.arms.setdefault(self.bucket, [[], []])
        )
        return verify >= skip


def generate(
    model: LLaDA2MoeModelLM, prompt: Sequence[int], options: NoCacheOptions, uniforms: Sequence[float] = ()
) -> ReferenceText:
    """Decode one prompt by the definition."""
    return Reference(model, options, uniforms).generate(prompt)
