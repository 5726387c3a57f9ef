"""The definition of the SDAR decoders: one text, no cache, no batch, plain Python in the order of the paper.

Every forward sees the whole sequence from position 0 under an explicit mask. Slow on purpose; tests hold `decoding.py` to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdar.decoding import resolve
from sdar.modeling_sdar import SDARForCausalLM
from sdar.options import Options, StandardOptions
from shared.acceptance import entropy, estimate, normalized_entropy
from shared.options import Acceptance, Cache
from shared.sampling import inverse_cdf, sample, transform


@dataclass
class ReferenceText:
    """Ids without the prompt, the positions chosen at each step (in order), and forwards by kind."""

    tokens: list[int] = field(default_factory=list)
    order: list[list[int]] = field(default_factory=list)
    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prefill", "draft", "verify", "commit"), 0))


@dataclass
class Step:
    """One drafted block, as lists over in-block positions."""

    masked: list[int]
    span: list[int]
    tokens: list[int]
    confidence: list[float]
    logits: Tensor
    weights: Tensor  # transformed draft logits, as the verifier and the estimators see them


class Reference:
    """`generate` decodes one prompt. The state is what the method needs: the sequence, and which keys each token may see."""

    def __init__(self, model: SDARForCausalLM, options: StandardOptions, uniforms: Sequence[float] = ()):
        self.model, self.options = model, resolve(model, options)
        self.blocks, self.sampling = self.options.blocks, self.options.sampling
        self.speculative = isinstance(options, Options)
        self.cache_options = self.options.cache if self.speculative else Cache()
        self.acceptance = self.options.acceptance if self.speculative else Acceptance()
        self.uniforms: Iterator[float] = iter(uniforms)
        self.out = ReferenceText()
        self.switch_on = False  # score_hysteresis
        self.arms: dict[int, list[list[float]]] = {}  # contextual_bandit_ucb: bucket -> rewards of (skip, verify)
        self.decisions = 0

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int]) -> ReferenceText:
        length, mask_id = self.blocks.block_length, self.blocks.mask_id
        total = math.ceil((len(prompt) + self.blocks.max_new_tokens) / length) * length
        self.x = list(prompt) + [mask_id] * (total - len(prompt))
        self.seen = torch.zeros(total, total, dtype=torch.bool)  # seen[i, j]: token i was encoded seeing token j
        first = len(prompt) // length * length
        for i in range(first):
            self.seen[i, : i + 1 if self.cache_options.cache_ver else (i // length + 1) * length] = True
        self.out.forwards["prefill"] += first > 0
        end = first
        for start in range(first, total, length):
            verified = self.block(start, len(prompt))
            end = start + length
            stopped = any(t in self.blocks.stopping_criteria_idx for t in self.x[len(prompt) : end])
            last = stopped or end == total
            self.out.forwards["commit"] += self.commit_costs_a_forward(last, verified)
            if last:
                break
        self.out.tokens = self.trimmed(len(prompt), end, total)
        return self.out

    def commit_costs_a_forward(self, last: bool, verified: bool) -> bool:
        """Does keeping a finished block take a forward of its own? ``verified``: a causal forward over its final tokens just happened."""
        savings = self.options.savings
        if last:
            return not savings.skip_last_commit and not (
                savings.reuse_verify and verified and self.cache_options.cache_ver
            )
        return not savings.fuse_commit and not (savings.reuse_verify and verified and self.cache_options.cache_ver)

    def trimmed(self, prompt: int, end: int, total: int) -> list[int]:
        whole = self.blocks.round_to_blocks
        tokens = self.x[prompt : total if whole and not self.blocks.trim_stop_tokens else end]
        tokens = tokens if whole else tokens[: self.blocks.max_new_tokens]
        if self.blocks.trim_stop_tokens:
            for k, token in enumerate(tokens):
                if token in self.blocks.stopping_criteria_idx:
                    return tokens[:k]
        return tokens

    def forward(self, ids: list[int], positions: list[int], seen: Tensor, rows: slice) -> Tensor:
        logits = self.model(torch.tensor([ids]), torch.tensor([positions]), None, seen)[0, rows].float()
        if self.sampling.suppress_mask:
            logits[:, self.blocks.mask_id] = float("-inf")
        return logits

    def block(self, start: int, prompt_length: int) -> bool:
        """Decode ``x[start : start + L]``. True if the last step's verify forward saw the block as it is now."""
        length, steps = self.blocks.block_length, self.blocks.denoising_steps
        schedule = [max(1, length // steps + (s < length % steps)) for s in range(steps)]
        decoded_so_far = 0
        for s in range(2 * steps):
            step = self.draft(start)
            need = min(schedule[s % steps], len(step.masked))
            chosen: dict[int, int] = {}  # in-block position -> token, in order of choice
            verified = self.speculative and self.wants_verify(step, decoded_so_far)
            if verified:
                self.verify(start, step, chosen)
            if self.acceptance.always_check_high_confidence:
                high = [i for i in step.masked if i not in chosen and step.confidence[i] > self.threshold]
                chosen |= {i: step.tokens[i] for i in sorted(high, key=lambda i: -step.confidence[i])}
            if len(chosen) < need:
                chosen |= {i: step.tokens[i] for i in self.unmask(step, chosen, need - len(chosen), s >= steps)}
            for i, token in chosen.items():
                self.x[start + i] = token
            self.out.order.append([start + i for i in chosen])
            decoded_so_far += len(chosen)
            if self.speculative and self.options.routing.do_verify_policy == "contextual_bandit_ucb":
                self.arms[self.bucket][verified].append(len(chosen) / (1 + verified))
            if all(t != self.blocks.mask_id for t in self.x[start : start + length]):
                if self.cache_options.cache_ver:
                    for i in range(start, start + length):
                        self.seen[i, i + 1 :] = False
                whole = step.span[-1] == length - 1 or not self.options.savings.short_verify
                return verified and whole and all(step.tokens[i] == t for i, t in chosen.items())
        raise RuntimeError(f"block at {start}: masks left after {2 * steps} steps")

    @property
    def threshold(self) -> float:
        return self.options.unmask.confidence_threshold

    def draft(self, start: int) -> Step:
        """Denoise the block: it sees everything before it and all of itself; with ``draft_ver`` known leading tokens are causal."""
        length, end = self.blocks.block_length, start + self.blocks.block_length
        masked = [i for i in range(length) if self.x[start + i] == self.blocks.mask_id]
        for i in range(length):
            causal = self.cache_options.draft_ver and i < masked[0]
            self.seen[start + i, :end] = True
            if causal:
                self.seen[start + i, start + i + 1 :] = False
        self.out.forwards["draft"] += 1
        logits = self.forward(self.x[:end], list(range(end)), self.seen[:end, :end], slice(start, end))
        uniform = None
        if self.sampling.temperature >= 1e-6:
            uniform = torch.tensor([next(self.uniforms) for _ in range(length)])
        tokens, confidence = sample(
            logits, uniform, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p
        )
        span = [masked[0]]
        while span[-1] + 1 in masked:
            span.append(span[-1] + 1)
        return Step(masked, span, tokens.tolist(), confidence.tolist(), logits, self.transform(logits))

    def transform(self, logits: Tensor) -> Tensor:
        return transform(logits, self.sampling.target_temperature, self.sampling.top_k, self.sampling.top_p)

    def verify(self, start: int, step: Step, chosen: dict[int, int]) -> None:
        """Accept a prefix of the span under the block-size-one law, one mask query per position (the 2L layout)."""
        length, end = self.blocks.block_length, start + self.blocks.block_length
        drafted = [step.tokens[i] if i in step.masked else self.x[start + i] for i in range(length)]
        seen = torch.zeros(end + length, end + length, dtype=torch.bool)
        seen[:start, :start] = self.seen[:start, :start]
        for i in range(length):
            seen[start + i, : start + i + 1] = True  # a drafted token sees what precedes it and itself
            seen[end + i, : start + i] = True  # its mask query sees what precedes it
            seen[end + i, end + i] = True
        self.out.forwards["verify"] += 1
        ids = self.x[:start] + drafted + [self.blocks.mask_id] * length
        positions = [*range(end), *range(start, end)]
        logits = self.forward(ids, positions, seen, slice(end, end + length))
        target = self.transform(logits).softmax(-1)
        exact = self.acceptance.acceptance == "exact" and self.sampling.temperature < 1e-6
        ratio = [float(target[i, step.tokens[i]]) / max(step.confidence[i], 1e-12) for i in range(length)]
        ratio = [min(1.0, r**self.acceptance.ssd_ratio_tempering_factor) if r < 1 else 1.0 for r in ratio]
        uniform = dict.fromkeys(step.span, 0.0) if exact else {i: next(self.uniforms) for i in step.span}
        for i in step.span:
            best = int(logits[i].argmax())
            if step.tokens[i] == best if exact else uniform[i] < ratio[i]:
                chosen[i] = step.tokens[i]
                continue
            if exact:
                chosen[i] = best
            else:
                chosen[i] = self.resample(step, target, i) if self.acceptance.allow_resample else step.tokens[i]
            break
        if self.acceptance.ssd_ratio_threshold >= 0:
            for i in step.masked if self.acceptance.ssd_threshold_all_spans else step.span:
                if i not in chosen and ratio[i] >= self.acceptance.ssd_ratio_threshold:
                    chosen[i] = step.tokens[i]

    def resample(self, step: Step, target: Tensor, i: int) -> int:
        """A token from the normalised positive part of ``q - p``, or from ``q`` where that has no mass."""
        law = (target[i] - step.weights[i].softmax(-1)).clamp_min(0)
        law = law / law.sum() if 0 < float(law.sum()) < math.inf else target[i]
        return int(inverse_cdf(law, torch.tensor(next(self.uniforms))))

    def unmask(self, step: Step, chosen: dict[int, int], due: int, overtime: bool) -> list[int]:
        """Positions the rule takes among those still masked, in its order."""
        free = [i for i in step.masked if i not in chosen]
        due = min(due, len(free))
        by_confidence = sorted(free, key=lambda i: -step.confidence[i])
        rule = self.options.unmask.remasking_strategy
        if rule == "sequential":
            return free[:due]
        if rule == "low_confidence_static":
            return by_confidence[:due]
        if rule == "low_confidence_dynamic":
            high = [i for i in by_confidence if step.confidence[i] > self.threshold]
            return high if len(high) >= due else by_confidence[:due]
        if rule == "entropy_bounded":
            cost = entropy(step.logits).tolist()
        else:
            cost = [-sum(c * math.log(c) for c in (max(c, 1e-12) for c in step.confidence))] * len(step.confidence)
        free.sort(key=lambda i: cost[i])
        count, spent = 0, 0.0
        while count < len(free) and spent + cost[free[count]] < self.options.unmask.eb_threshold:
            spent += cost[free[count]]
            count += 1
        count = max(count, due if overtime else 1)
        return free[: min(count, due) if self.speculative else count]

    def wants_verify(self, step: Step, decoded_so_far: int) -> bool:
        """The routing policies, one text at a time (S2D2, routing)."""
        routing = self.options.routing
        confident = sum(step.confidence[i] > self.threshold for i in step.masked)
        match routing.do_verify_policy:
            case "always" | "never" as policy:
                return policy == "always"
            case "mask_span_length":
                few = confident < min(routing.min_ssd_span_length, len(step.masked))
                return len(step.span) >= routing.min_ssd_span_length or (routing.legacy_ssd_span_strategy and few)
            case "contextual_bandit_ucb":
                return self.bandit(step, decoded_so_far)
        alpha = estimate(step.weights, torch.tensor(step.confidence), self.options.estimation).tolist()
        gain = sum(math.prod(alpha[j] for j in step.span[: k + 1]) for k in range(len(step.span)))
        price = confident if routing.do_verify_score_type == "difference_dynamic" else 1
        score = gain - routing.score_penalty_coef * price
        if routing.do_verify_policy == "score_threshold":
            return score >= routing.do_verify_score_threshold
        on = score >= routing.hysteresis_threshold_off if self.switch_on else score > routing.hysteresis_threshold_on
        self.switch_on = on
        return on

    def bandit(self, step: Step, decoded_so_far: int) -> bool:
        options, length = self.options.bandit, self.blocks.block_length
        where = step.span if options.ucb_entropy_source == "span" else step.masked
        mean_entropy = float(normalized_entropy(step.weights)[where].mean())
        index = 0
        for value, low, high, bins in (
            (len(step.span), 1, length, options.ucb_span_length_bins),
            (decoded_so_far / length, 0, 1, options.ucb_block_progress_bins),
            (mean_entropy, 0, 1, options.ucb_entropy_bins),
        ):
            value = min(max(value, low), high)
            inside = 0 if bins <= 1 or high <= low else min(bins - 1, int(bins * (value - low) / (high - low)))
            index = index * bins + inside
        self.decisions += 1
        self.bucket = index
        skip, verify = self.arms.setdefault(index, [[], []])
        bound = [
            sum(a) / len(a) + options.ucb_beta * math.sqrt(math.log(self.decisions) / len(a)) if a else math.inf
            for a in (skip, verify)
        ]
        return bound[1] >= bound[0]


def generate(
    model: SDARForCausalLM, prompt: Sequence[int], options: StandardOptions, uniforms: Sequence[float] = ()
) -> ReferenceText:
    """Decode one prompt by the definition. ``uniforms`` are consumed in the published order and must suffice."""
    return Reference(model, options, uniforms).generate(prompt)
