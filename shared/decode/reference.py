"""What the definitions of all families have in common: one text, plain Python, in the order of the papers.

A family's ``reference.py`` says what a forward sees, when a block is verified and what a step fills; whether to verify (S2D2, routing) and what the
verifier's logits decide (S2D2, acceptance) stand here. Of the decoders' own code only numeric leaves are used: the transform, draws, estimators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shared.options import Acceptance, Cache
from shared.policy.acceptance import estimate, normalized_entropy
from shared.policy.sampling import GREEDY_BELOW, inverse_cdf, log_weights, sample
from shared.trace import How


@dataclass
class Step:
    """One draft forward over a block of L positions, as lists over in-block positions, and what it led to.

    ``known``: ids before the step. ``logits [L, V]``. ``decoded``: the block's progress, which the bandit looks at. ``chosen``: position ->
    (token, how) of masked ones, in order of choice. Where several blocks are in flight the lists cover all of them: ``open`` are the positions that a
    threshold may fill (None: all), ``first_total`` is the size of the first block, which ``decoded`` is about (None: L, one block).
    """

    start: int
    known: list[int]
    masked: list[int]
    tokens: list[int]
    confidence: list[float]
    logits: Tensor
    decoded: int
    chosen: dict[int, tuple[int, How]] = field(default_factory=dict)
    verified: bool = False
    open: list[int] | None = None
    first_total: int | None = None

    @property
    def span(self) -> list[int]:
        """The first run of masked positions."""
        return [i for k, i in enumerate(self.masked) if i == self.masked[0] + k]

    @property
    def free(self) -> list[int]:
        """Masked positions that the step has not decided yet."""
        return [i for i in self.masked if i not in self.chosen]

    @property
    def as_drafted(self) -> bool:
        return all(self.tokens[i] == token for i, (token, _) in self.chosen.items())

    def take(self, positions: Sequence[int], how: How) -> None:
        """Decide for the drafts of ``positions``, in this order."""
        self.chosen |= {i: (self.tokens[i], how) for i in positions}


@dataclass
class ReferenceText:
    """Ids without the prompt, the positions chosen at each step (in order), and forwards by kind."""

    tokens: list[int] = field(default_factory=list)
    order: list[list[int]] = field(default_factory=list)
    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prefill", "draft", "verify", "commit"), 0))


@dataclass(frozen=True)
class Encoded:
    """A token that a forward has encoded; ``sees`` are indices into the list of all that were, its own among them. So what a cache would hold stands there as
    tokens that still see what they saw then."""

    token: int
    position: int
    sees: tuple[int, ...]


def logits_of(model, tokens: Sequence[Encoded]) -> Tensor:
    """Logits ``[T, V]`` of the network over ``tokens``, each seeing what it says."""
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for index, token in enumerate(tokens):
        mask[index, list(token.sees)] = True
    ids, positions = ([getattr(t, name) for t in tokens] for name in ("token", "position"))
    return model(torch.tensor([ids]), torch.tensor([positions]), None, mask)[0]


class Reference:
    """Base of a family's definition. ``options`` are resolved; ``length`` is how many tokens a draft is about.

    ``uniforms`` are consumed in the published order and must suffice.
    """

    keep_rejected = True  # where a rejected draft is not replaced: is it kept, or does it stay masked?

    def __init__(self, options: Any, uniforms: Sequence[float], length: int):
        self.options, self.length = options, length
        self.blocks, self.sampling, self.unmask = options.blocks, options.sampling, options.unmask
        self.cache_options = getattr(options, "cache", Cache())
        self.acceptance = getattr(options, "acceptance", Acceptance())
        self.policy = options.routing.do_verify_policy if hasattr(options, "routing") else "never"
        self.uniforms: Iterator[float] = iter(uniforms)
        self.switch_on = False  # score_hysteresis
        self.arms: dict[int, list[list[float]]] = {}  # contextual_bandit_ucb: bucket -> rewards of (skip, verify)
        self.decisions = 0

    @property
    def sampled(self) -> bool:
        """Are drafts drawn?"""
        return self.sampling.temperature >= GREEDY_BELOW

    def suppress_mask(self, logits: Tensor) -> Tensor:
        """``logits [..., V]`` in float32, without the mask token unless the options allow it."""
        logits = logits.float()
        if self.sampling.suppress_mask:
            logits[..., self.blocks.mask_id] = -math.inf
        return logits

    def draw(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """A token and its confidence for every row of ``logits [L, V]``."""
        uniform = torch.tensor([next(self.uniforms) for _ in logits]) if self.sampled else None
        drawn = sample(logits, uniform, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        return drawn[0].tolist(), drawn[1].tolist()

    def transform(self, logits: Tensor) -> Tensor:
        """Log-weights as the verifier and the estimators see them."""
        return log_weights(logits, self.sampling)

    def draft_distribution(self, step: Step, i: int) -> Tensor:
        """``[V]``: ``p`` of the residual ``q - p`` at position ``i``."""
        return self.transform(step.logits[i]).softmax(-1)

    def confident(self, step: Step) -> list[int]:
        """Positions still free that may be filled, and whose draft is above ``confidence_threshold``."""
        may = step.free if step.open is None else [i for i in step.free if i in step.open]
        return [i for i in may if step.confidence[i] > self.unmask.confidence_threshold]

    def take_confident(self, step: Step) -> None:
        """``always_check_high_confidence``: whatever was decided, those too, the surest first."""
        if self.acceptance.always_check_high_confidence:
            step.take(sorted(self.confident(step), key=lambda i: -step.confidence[i]), How.CONFIDENT)

    def accept_span(self, step: Step, logits: Tensor) -> None:
        """Accept a prefix of the span by the verifier's ``logits [L, V]``; the first token that is not accepted is replaced, and only later ones with a
        high ratio are kept."""
        rule, step.verified = self.acceptance, True
        target, best = self.transform(logits).softmax(-1), logits.argmax(-1).tolist()
        exact = rule.acceptance == "exact" and not self.sampled
        ratio = [float(target[i, t]) / max(step.confidence[i], 1e-12) for i, t in enumerate(step.tokens)]
        ratio = [min(1.0, r**rule.ssd_ratio_tempering_factor) if r < 1 else 1.0 for r in ratio]
        uniform = {} if exact else {i: next(self.uniforms) for i in step.span}
        passed = [step.tokens[i] == best[i] if exact else uniform[i] < ratio[i] for i in step.span]
        if rule.least_confidence is not None:
            passed = [p and step.confidence[i] > rule.least_confidence for p, i in zip(passed, step.span, strict=True)]
        for i, accepted in zip(step.span, passed, strict=True):
            if accepted:
                step.take([i], How.ACCEPTED)
                continue
            if exact:
                step.chosen[i] = (best[i], How.RESAMPLED)
            elif rule.allow_resample:
                if rule.least_target is None or float(target[i, step.tokens[i]]) >= rule.least_target:
                    step.chosen[i] = (self.resample(step, target[i], i), How.RESAMPLED)
            elif self.keep_rejected:
                step.take([i], How.KEPT)
            break
        self.passed = {i for i, p in zip(step.span, passed, strict=True) if p}
        if rule.ssd_ratio_threshold >= 0:
            reach = step.masked if rule.ssd_threshold_all_spans else step.span
            late = [i for i in reach if i not in step.chosen and ratio[i] >= rule.ssd_ratio_threshold]
            step.take(late, How.RATIO)

    def resample(self, step: Step, target: Tensor, i: int) -> int:
        """A token from the normalised positive part of ``q - p``, or from ``q`` (``target [V]``) where that has no mass."""
        left = (target - self.draft_distribution(step, i)).clamp_min(0)
        left = left / left.sum() if 0 < float(left.sum()) < math.inf else target
        return int(inverse_cdf(left, torch.tensor(next(self.uniforms))))

    def wants_verify(self, step: Step) -> bool:
        """The routing policies. A step without masks has the score -inf."""
        if self.policy in ("always", "never"):
            return self.policy == "always"
        if self.policy == "contextual_bandit_ucb":
            return bool(step.masked) and self.bandit(step)
        routing, confident = self.options.routing, len(self.confident(step))
        if self.policy == "mask_span_length":
            few = confident < min(routing.min_ssd_span_length, len(step.masked))
            return len(step.span) >= routing.min_ssd_span_length or (routing.legacy_ssd_span_strategy and few)
        alpha = estimate(self.transform(step.logits), torch.tensor(step.confidence), self.options.estimation).tolist()
        gain = sum(math.prod(alpha[j] for j in step.span[: k + 1]) for k in range(len(step.span)))
        price = confident if routing.do_verify_score_type == "difference_dynamic" else 1
        score = gain - routing.score_penalty_coef * price if step.masked else -math.inf
        if self.policy == "score_threshold":
            return score >= routing.do_verify_score_threshold
        off, on = routing.hysteresis_threshold_off, routing.hysteresis_threshold_on
        self.switch_on = score >= off if self.switch_on else score > on
        return self.switch_on

    def bandit(self, step: Step) -> bool:
        """``contextual_bandit_ucb``: the arm with the higher upper confidence bound in this context; ties verify."""
        options = self.options.bandit
        where = step.span if options.ucb_entropy_source == "span" else step.masked
        mean_entropy = float(normalized_entropy(self.transform(step.logits))[where].mean())
        self.bucket = 0
        for value, low, high, bins in (
            (len(step.span), 1, len(step.known), options.ucb_span_length_bins),
            (step.decoded / (step.first_total or self.length), 0, 1, options.ucb_block_progress_bins),
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

    def observe(self, step: Step) -> None:
        """What the bandit learns from a step: tokens per forward."""
        if self.policy == "contextual_bandit_ucb" and step.masked:
            self.arms[self.bucket][step.verified].append(len(step.chosen) / (1 + step.verified))
