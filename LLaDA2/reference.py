"""The definition of the LLaDA2 decoders: one text, no cache, plain Python in the order of the papers.

Every forward sees the whole sequence from position 0 under an explicit mask. Slow on purpose. Forwards are counted as the decoder with a cache
spends them, so commits only where they cost one; ``nocache`` has no prefill and no commit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llada2.decoding import resolve
from llada2.modeling_llada2_moe import LLaDA2MoeModelLM
from llada2.options import NoCacheOptions
from shared.decode import reference
from shared.errors import UserError
from shared.network.masks import block_causal, token_causal
from shared.trace import How


@dataclass
class Step(reference.Step):
    """Also of known positions: ``edits``, position -> token."""

    edits: dict[int, int] = field(default_factory=dict)


@dataclass
class ReferenceText:
    """Ids without the prompt, the steps, and the forwards in order as ``(kind, tokens)``."""

    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    forwards: list[tuple[str, int]] = field(default_factory=list)


class Reference(reference.Reference):
    """`generate` decodes one prompt."""

    def __init__(self, model: LLaDA2MoeModelLM, options: NoCacheOptions, uniforms: Sequence[float] = ()):
        options = resolve(model, options)
        super().__init__(options, uniforms, options.blocks.block_length)
        self.model, self.editing = model, options.editing
        self.cached = options.decoder != "nocache"
        self.savings = options.savings
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
            if post and self.options.skips_post_steps:
                for _ in range(length if self.sampled else 0):
                    next(self.uniforms)  # those of the post step that is skipped
                return
            step = self.draft(start, masked, decoded)
            self.edit(step)
            if self.wants_verify(step) and masked:
                self.verify(step)
            self.fill(step)
            for i, token in [*step.edits.items(), *((i, token) for i, (token, _) in step.chosen.items())]:
                self.x[start + i] = token
            self.out.steps.append(step)
            decoded += len(step.chosen)
            self.observe(step)
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
        mask = bias if self.blocks.as_bias else bias == 0  # both hide what has -inf
        logits = self.model(torch.tensor([ids]), torch.tensor([positions]), None, mask)
        return self.suppress_mask(logits[0, -self.blocks.block_length :])

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
        return Step(start, self.x[start:end], masked, *self.draw(logits), logits, decoded)

    def edit(self, step: Step) -> None:
        """Known tokens after the prompt that the model would replace with enough confidence."""
        for i, old in enumerate(step.known):
            generated = i not in step.masked and step.start + i >= self.prompt
            if generated and step.confidence[i] > self.editing.editing_threshold and step.tokens[i] != old:
                step.edits[i] = step.tokens[i]

    def fill(self, step: Step) -> None:
        """Masked positions by confidence: all above the threshold, or the surest ones where those are fewer than the step still owes."""
        self.take_confident(step)
        due = min(self.unmask.num_to_transfer, len(step.masked)) - len(step.chosen)
        if due > 0:
            surest = sorted(sorted(step.free, key=lambda i: -step.confidence[i])[:due])
            high = self.confident(step)
            step.take(high if len(high) >= due else surest, How.UNMASKED)

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
        self.accept_span(step, self.verifier_logits(step))


def generate(
    model: LLaDA2MoeModelLM, prompt: Sequence[int], options: NoCacheOptions, uniforms: Sequence[float] = ()
) -> ReferenceText:
    """Decode one prompt by the definition."""
    return Reference(model, options, uniforms).generate(prompt)
