"""The definition of the SDAR decoders: one text, no cache, no batch, plain Python in the order of the paper.

Every forward sees the whole sequence from position 0 under an explicit mask. Slow on purpose; tests hold `decoding.py` to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdar.decoding import resolve
from sdar.modeling_sdar import SDARForCausalLM
from sdar.options import StandardOptions
from shared.decode import reference
from shared.decode.reference import ReferenceText, Step
from shared.policy.acceptance import entropy
from shared.trace import How


class Reference(reference.Reference):
    """`generate` decodes one prompt. The state is what the method needs: the sequence, and which keys each token may see."""

    def __init__(self, model: SDARForCausalLM, options: StandardOptions, uniforms: Sequence[float] = ()):
        options = resolve(model, options)
        super().__init__(options, uniforms, options.blocks.block_length)
        self.model, self.speculative, self.out = model, hasattr(options, "routing"), ReferenceText()

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
        logits = self.model(torch.tensor([ids]), torch.tensor([positions]), None, seen)
        return self.suppress_mask(logits[0, rows])

    def block(self, start: int, prompt_length: int) -> bool:
        """Decode ``x[start : start + L]``. True if the last step's verify forward saw the block as it is now."""
        length, steps = self.blocks.block_length, self.blocks.denoising_steps
        schedule = [max(1, length // steps + (s < length % steps)) for s in range(steps)]
        decoded = 0
        for s in range(2 * steps):
            step = self.draft(start, decoded)
            need = min(schedule[s % steps], len(step.masked))
            if self.wants_verify(step):
                self.verify(step)
            self.take_confident(step)
            if len(step.chosen) < need:
                step.take(self.by_rule(step, need - len(step.chosen), s >= steps), How.UNMASKED)
            for i, (token, _) in step.chosen.items():
                self.x[start + i] = token
            self.out.order.append([start + i for i in step.chosen])
            decoded += len(step.chosen)
            self.observe(step)
            if all(t != self.blocks.mask_id for t in self.x[start : start + length]):
                if self.cache_options.cache_ver:
                    for i in range(start, start + length):
                        self.seen[i, i + 1 :] = False
                whole = step.span[-1] == length - 1 or not self.options.savings.short_verify
                return step.verified and whole and step.as_drafted
        raise RuntimeError(f"block at {start}: masks left after {2 * steps} steps")

    def draft(self, start: int, decoded: int) -> Step:
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
        return Step(start, self.x[start:end], masked, *self.draw(logits), logits, decoded)

    def verify(self, step: Step) -> None:
        """Verify the span at block size one, one mask query per position (the 2L layout)."""
        length, start, end = self.blocks.block_length, step.start, step.start + self.blocks.block_length
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
        self.accept_span(step, self.forward(ids, positions, seen, slice(end, end + length)))

    def by_rule(self, step: Step, due: int, overtime: bool) -> list[int]:
        """Positions the unmasking rule takes among those still masked, in its order."""
        free = step.free
        due = min(due, len(free))
        by_confidence = sorted(free, key=lambda i: -step.confidence[i])
        rule = self.unmask.remasking_strategy
        if rule == "sequential":
            return free[:due]
        if rule == "low_confidence_static":
            return by_confidence[:due]
        if rule == "low_confidence_dynamic":
            high = [i for i in by_confidence if step.confidence[i] > self.unmask.confidence_threshold]
            return high if len(high) >= due else by_confidence[:due]
        if rule == "entropy_bounded":
            cost = entropy(step.logits).tolist()
        else:
            cost = [-sum(c * math.log(c) for c in (max(c, 1e-12) for c in step.confidence))] * len(step.confidence)
        free.sort(key=lambda i: cost[i])
        count, spent = 0, 0.0
        while count < len(free) and spent + cost[free[count]] < self.unmask.eb_threshold:
            spent += cost[free[count]]
            count += 1
        count = max(count, due if overtime else 1)
        return free[: min(count, due) if self.speculative else count]


def generate(
    model: SDARForCausalLM, prompt: Sequence[int], options: StandardOptions, uniforms: Sequence[float] = ()
) -> ReferenceText:
    """Decode one prompt by the definition. ``uniforms`` are consumed in the published order and must suffice."""
    return Reference(model, options, uniforms).generate(prompt)
