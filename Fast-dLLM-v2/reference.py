"""The definition of the Fast-dLLM v2 decoders ``fast``, ``ssd`` and ``ssd_policy``: one text, no cache, plain Python in the order of the papers.

Every forward sees the whole text from position 0 under an explicit mask. What a cache would hold stands there as tokens that were encoded before,
each still seeing what it saw then. Slow on purpose. Forwards are counted as the decoder with a cache spends them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fast_dllm_v2.decoding import resolve
from fast_dllm_v2.modeling_fast import Fast_dLLM_QwenForCausalLM
from fast_dllm_v2.options import Cache, StandardOptions
from shared.decode import reference
from shared.decode.cursor import whole_blocks
from shared.decode.reference import Encoded, ReferenceText, Step, logits_of
from shared.network.masks import block_causal, token_causal
from shared.policy.sampling import sample, transform
from shared.trace import How


class Reference(reference.Reference):
    """`generate` decodes one prompt. ``x`` is the text, masks included; ``start`` is where the current small block begins."""

    keep_rejected = False

    def __init__(self, model: Fast_dLLM_QwenForCausalLM, options: StandardOptions, uniforms: Sequence[float] = ()):
        options = resolve(model, options)
        super().__init__(options, uniforms, options.blocks.small_block_length)
        self.model, self.window = model, options.blocks.block_length
        self.block_cache, self.cache_options = options.block_cache, getattr(options, "cache", Cache())
        self.stops = set(options.blocks.stopping_criteria_idx)
        self.encoded: list[Encoded] = []  # the committed text, and behind it what the block cache holds
        self.committed = 0  # of these, tokens of finished blocks: index and position are the same
        self.held: dict[int, int] = {}  # the block cache: position -> index in ``encoded``
        self.causal_rows = 0  # leading rows of the block that draft_ver has made causal
        self.saw_final = False  # did the last verify see the block as it is now?
        self.out = ReferenceText()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int]) -> ReferenceText:
        self.prompt, new, rounded = len(prompt), self.blocks.max_new_tokens, self.blocks.round_to_blocks
        self.total = whole_blocks(self.prompt + new, self.length)
        if rounded:
            self.total = (self.prompt // self.window + new // self.window) * self.window
        self.text_end = self.total + 1 if rounded else self.prompt + new
        room = whole_blocks(max(self.total, self.prompt) + 1, self.window)
        self.x = list(prompt) + [self.blocks.mask_id] * (room - self.prompt)
        self.start = self.prompt // self.length * self.length
        over = self.prefill()
        while not over and self.start < self.total:
            self.small_block()
            over = self.finish()
        self.out.tokens = self.trimmed()
        return self.out

    def prefill(self) -> bool:
        """Encode the prompt's whole blocks. A prompt of nothing else gets its first token; True if the text ends with that."""
        count = self.prompt // self.window * self.window
        if not count:
            return False
        causal = self.cache_options.cache_ver
        seen = token_causal(count) if causal else block_causal(count, self.window)
        logits = self.forward("prefill", self.x[:count], 0, seen)
        self.encoded += self.latest
        self.committed = count
        return count == self.prompt and self.put_next(logits[-1])

    def small_block(self) -> None:
        """Decode ``x[start : start + b]``; what lies behind a stop token need not be decided."""
        for _ in range(2 * self.length):
            if self.complete():
                return
            step = self.draft()
            if self.wants_verify(step):
                self.verify(step)
            self.take_confident(step)
            if not step.chosen:
                self.above_threshold(step)
            for i, (token, _) in step.chosen.items():
                self.x[self.start + i] = token
            self.observe(step)
            self.out.order.append([self.start + i for i in step.chosen])
            self.saw_final = step.verified and step.as_drafted
        if not self.complete():
            raise RuntimeError(f"block at {self.start}: masks left after {2 * self.length} steps")

    def complete(self) -> bool:
        """Is the small block decided, as far as its first stop token?"""
        for position in range(self.start, self.start + self.length):
            if self.x[position] == self.blocks.mask_id:
                return False
            if position >= self.prompt and self.x[position] in self.stops:
                return True
        return True

    def finish(self) -> bool:
        """Commit the block if this small block was its last, and move on. True if the text has ended."""
        end = self.start + self.length
        stopped = bool(self.stops & set(self.x[max(self.start, self.prompt) : end]))
        last, rounded = stopped or end >= self.total, self.blocks.round_to_blocks
        skipped = last and self.options.savings.skip_last_commit and not rounded
        commits = end % self.window == 0 and not stopped and not skipped
        logits = self.commit(end - self.window) if commits else None
        if last and not (rounded and commits):
            return True
        self.start = end
        return commits and self.put_next(logits)

    def put_next(self, logits: Tensor) -> bool:
        """The token that follows the last committed block, from its ``logits [V]``: a step of its own. True if the text ends with it."""
        sampling, drawn = self.sampling, self.sampled and not self.blocks.greedy_next
        uniform = torch.tensor(next(self.uniforms)) if drawn else None
        temperature = sampling.temperature if drawn else 0.0
        token = int(sample(logits, uniform, temperature, sampling.top_k, sampling.top_p)[0])
        self.x[self.start] = token
        self.out.order.append([self.start])
        self.saw_final = False
        return token in self.stops or self.start + 1 >= self.text_end

    def trimmed(self) -> list[int]:
        """What was generated, up to the first position that was never decided."""
        tokens = self.x[self.prompt :]
        tokens = tokens[: tokens.index(self.blocks.mask_id)] if self.blocks.mask_id in tokens else tokens
        tokens = tokens if self.blocks.round_to_blocks else tokens[: self.blocks.max_new_tokens]
        stop = next((k for k, t in enumerate(tokens) if t in self.stops), len(tokens))
        return tokens[: stop + (not self.blocks.trim_stop_tokens)]

    def forward(self, kind: str | None, ids: list[int], first: int, seen: Tensor, beside: Sequence[int] = ()) -> Tensor:
        """Logits ``[T, V]`` of ``ids`` at the positions from ``first`` on; row ``t`` predicts the token after it. ``kind`` None is not counted.

        Each sees everything committed, the encoded tokens at the indices ``beside``, and by ``seen [T, T]`` each other. ``latest`` is what the forward
        encoded, for callers that keep it.
        """
        if kind:
            self.out.forwards[kind] += 1
        before = len(self.encoded)
        others = (*range(self.committed), *beside)
        rows = [(*others, *(before + j for j, sees in enumerate(row) if sees)) for row in seen.tolist()]
        self.latest = [Encoded(t, first + i, row) for i, (t, row) in enumerate(zip(ids, rows, strict=True))]
        return self.suppress_mask(logits_of(self.model, self.encoded + self.latest)[before:])

    def draft(self) -> Step:
        """Denoise the small block: a token and its confidence at each position."""
        start, end = self.start, self.start + self.length
        known = self.x[start:end]
        masked = [i for i, token in enumerate(known) if token == self.blocks.mask_id]
        if self.cache_options.draft_ver:
            offset = start % self.window if self.cache_options.draft_ver_rows == "block" else 0
            self.causal_rows = max(self.causal_rows, offset + masked[0])
        begun = 0 not in masked or not self.block_cache.refresh_block_cache
        logits = self.draft_within() if self.held and begun else self.draft_whole()
        return Step(start, known, masked, *self.draw(logits), logits, self.length - len(masked))

    def draft_whole(self) -> Tensor:
        """Logits ``[b, V]`` for the small block. The whole block sees itself, leading rows only what precedes them where ``draft_ver`` says so."""
        first = self.start // self.window * self.window
        seen = torch.ones(self.window, self.window, dtype=torch.bool)
        seen[: self.causal_rows] = token_causal(self.window)[: self.causal_rows]
        self.encoded = self.encoded[: self.committed]
        logits = self.forward("draft", self.x[first : first + self.window], first, seen)
        if self.block_cache.use_block_cache:
            self.held = {first + i: self.committed + i for i in range(self.window)}
            self.encoded += self.latest
        return logits[[max(self.start - first + i - 1, 0) for i in range(self.length)]]

    def draft_within(self) -> Tensor:
        """Logits ``[b, V]`` for the small block, encoded anew beside what the block cache holds of the rest of the block.

        The row that predicts the first position is outside, so that position gets the first row, as the second does.
        """
        start, end = self.start, self.start + self.length
        beside = [index for position, index in self.held.items() if not start <= position < end]
        everything = torch.ones(self.length, self.length, dtype=torch.bool)
        logits = self.forward("draft", self.x[start:end], start, everything, beside)
        self.held |= {start + i: len(self.encoded) + i for i in range(self.length)}
        self.encoded += self.latest
        return logits[[max(i - 1, 0) for i in range(self.length)]]

    def verify(self, step: Step) -> None:
        """Verify the span in one causal forward from the block's start to the small block's end, drafts in index of masks (S2D2): by the shift, the row
        before a position is the block-size-one model there."""
        first, end = self.start // self.window * self.window, self.start + self.length
        drafted = self.x[first:end]
        for i in step.masked:
            drafted[self.start - first + i] = step.tokens[i]
        logits = self.forward("verify", drafted, first, token_causal(end - first))
        self.accept_span(step, logits[[max(self.start - first + i - 1, 0) for i in range(self.length)]])

    def draft_distribution(self, step: Step, i: int) -> Tensor:
        """What was really drafted from, whatever the verifier's temperature."""
        return transform(step.logits[i], self.sampling.temperature, self.sampling.top_k, self.sampling.top_p).softmax(
            -1
        )

    def above_threshold(self, step: Step) -> None:
        """Where verification decided nothing: every draft above the threshold, and the most confident one in any case."""
        surest = max(step.masked, key=lambda i: step.confidence[i])
        step.take(self.confident(step) or [surest], How.UNMASKED)

    def commit(self, first: int) -> Tensor:
        """Encode the finished block at ``first`` for good; logits ``[V]`` of the token that follows. Costs nothing where a verify left the same keys."""
        cache = self.cache_options
        reused = cache.reuse_verify and cache.cache_ver and not self.block_cache.use_block_cache and self.saw_final
        seen = torch.ones(self.window, self.window, dtype=torch.bool)
        self.encoded = self.encoded[: self.committed]
        seen = seen.tril() if cache.cache_ver else seen
        logits = self.forward(None if reused else "commit", self.x[first : first + self.window], first, seen)
        self.encoded += self.latest
        self.committed += self.window
        self.held, self.causal_rows = {}, 0
        return logits[-1]


def generate(
    model: Fast_dLLM_QwenForCausalLM, prompt: Sequence[int], options: StandardOptions, uniforms: Sequence[float] = ()
) -> ReferenceText:
    """Decode one prompt by the definition. ``uniforms`` are consumed in the published order and must suffice."""
    return Reference(model, options, uniforms).generate(prompt)
