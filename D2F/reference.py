"""The definition of the decoders ``d2f`` and ``ssd``: one text, no cache, plain Python in the order of the papers.

Every forward sees the whole text from position 0 under an explicit mask. What a cache would hold stands there as tokens that were encoded before,
each still seeing what it saw then. Slow on purpose. Forwards are counted as the decoder with a cache spends them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.decoding import Network, resolve
from d2f.options import Cache, StandardOptions
from shared.decode import reference
from shared.decode.reference import Encoded, ReferenceText, Step, logits_of
from shared.policy.sampling import inverse_cdf, log_weights
from shared.trace import How


@dataclass
class Block:
    """Positions ``start`` to ``end``; ``goes_on``: must it gain a token in every step?"""

    start: int
    end: int
    goes_on: bool = False


class Reference(reference.Reference):
    """`generate` decodes one prompt. ``x`` is the text, masks included; the first ``finished`` blocks are decided and no longer in flight."""

    keep_rejected = False

    def __init__(self, model: Network, options: StandardOptions, uniforms: Sequence[float] = ()):
        options = resolve(model, options)
        super().__init__(options, uniforms, options.blocks.block_length)
        self.model, self.pipeline = model, options.pipeline
        self.cache_options = getattr(options, "cache", Cache())
        self.target = getattr(self.acceptance, "target_block_size", 1)
        self.stops = set(self.blocks.stopping_criteria_idx)
        self.encoded: list[Encoded] = []  # by all passes
        self.cached: list[int] = []  # indices into these: of the finished text, by position
        self.in_flight: list[Block] = []
        self.added = self.steps = 0
        self.out = ReferenceText()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int]) -> ReferenceText:
        self.prompt, self.x = len(prompt), list(prompt)
        most = self.blocks.max_length or self.model.config.max_position_embeddings
        new = max(0, min(self.blocks.max_new_tokens, most - self.prompt))
        self.total = self.prompt + (new - new % self.length if self.blocks.floor_to_blocks else new)
        self.newest = self.before = Block(0, self.prompt)  # the last one added, and the last one finished
        while self.step():
            pass
        decided = self.x[self.prompt :]
        decided = decided[: decided.index(self.blocks.mask_id)] if self.blocks.mask_id in decided else decided
        # What a text that ended early had in flight behind its first mask is nobody's.
        self.out.order = [[p for p in step if p < self.prompt + len(decided)] for step in self.out.order]
        stop = next((k for k, t in enumerate(decided) if t in self.stops), len(decided))
        self.out.tokens = decided[: stop + (not self.blocks.trim_stop_tokens)]
        return self.out

    def decided(self, block: Block) -> float:
        """The share of a block that is decided."""
        part = self.x[block.start : block.end]
        return 1 - part.count(self.blocks.mask_id) / len(part)

    def step(self) -> bool:
        """One pass and what follows from it; False, and nothing done, where the text is finished."""
        self.add_block()
        if not self.in_flight or self.ended():
            return False
        self.steps += 1
        step = self.draft()
        if self.policy == "never":
            self.take_above_threshold(step)
        else:
            if self.wants_verify(step):
                self.verify(step)
            self.take_confident(step)
            if not (step.verified and self.acceptance.acceptance == "exact"):
                self.force(step)
        self.observe(step)
        for i, (token, _) in step.chosen.items():
            self.x[step.start + i] = token
        self.out.order.append([step.start + i for i in step.chosen])
        while self.in_flight and self.decided(self.in_flight[0]) == 1:
            self.before = self.in_flight.pop(0)
        return True

    def ended(self) -> bool:
        """Is everything before the first stop token decided? (``end_early``)"""
        first = next((k for k, t in enumerate(self.x[self.prompt :]) if t in self.stops), None)
        return (
            self.options.savings.end_early
            and first is not None
            and self.blocks.mask_id not in self.x[: self.prompt + first]
        )

    def add_block(self) -> None:
        """At most one block of masks joins; a block goes on from when the one before it is decided far enough."""
        most, start = self.pipeline.max_blocks_in_flight, len(self.x)
        room = start < self.total and (most is None or len(self.in_flight) < most)
        stopped = bool(self.stops & set(self.x[self.prompt :]))
        if room and not stopped and self.decided(self.newest) >= self.pipeline.block_add_threshold:
            earlier, self.newest = self.newest, Block(start, min(start + self.length, self.total))
            self.x += [self.blocks.mask_id] * (self.newest.end - start)
            if not self.in_flight:
                self.before = earlier
            self.in_flight.append(self.newest)
        for earlier, block in zip([self.before, *self.in_flight], self.in_flight, strict=False):
            block.goes_on |= self.decided(earlier) >= self.pipeline.decoded_token_threshold

    def block_of(self, position: int, length: int) -> int:
        """In which block of ``length``, counted from the prompt's end; the prompt is block -1."""
        return max(-1, (position - self.prompt) // length)

    def forward(self, kind: str, ids: list[int], positions: list[int], sees: Callable[[int, int], bool]) -> Tensor:
        """Logits ``[T, V]`` of ``ids`` behind the cached text; token ``i`` of the forward sees all that is cached, and token ``j`` if ``sees(i, j)``."""
        self.out.forwards[kind] += 1
        before, count = len(self.encoded), len(ids)
        rows = [(*self.cached, *(before + j for j in range(count) if sees(i, j))) for i in range(count)]
        self.latest = [Encoded(t, p, row) for t, p, row in zip(ids, positions, rows, strict=True)]
        return logits_of(self.model, self.encoded + self.latest)[before:]

    def draft(self) -> Step:
        """Denoise all blocks in flight in one pass, which also encodes what was finished since the last."""
        start, v = len(self.cached), self.in_flight[0].start
        ids, positions = self.x[start:], list(range(start, len(self.x)))
        known = [token != self.blocks.mask_id for token in ids]
        cache, full = self.cache_options, self.pipeline.attention == "full"

        def sees(i: int, j: int) -> bool:
            strict = cache.causal_cache if start + i < v else cache.causal_drafts and known[i]
            length = self.target if strict else self.length
            return full or self.block_of(start + j, length) <= self.block_of(start + i, length)

        logits = self.forward("prefill" if start == 0 else "draft", ids, positions, sees)
        done = v - start
        if done:
            self.cached += range(len(self.encoded), len(self.encoded) + done)
            self.encoded += self.latest
            self.last = logits[done - 1]
        rows = torch.cat([self.last[None], logits[done:-1]]) if self.model.predicts_next else logits[done:]
        return self.step_of(v, self.suppress_mask(rows.clone()))

    def step_of(self, v: int, logits: Tensor) -> Step:
        """A token, its confidence and its rank at every position in flight; only masked ones are drawn."""
        known = self.x[v:]
        masked = [i for i, token in enumerate(known) if token == self.blocks.mask_id]
        probs = self.draft_probs(logits)
        confidence, tokens = (t.tolist() for t in probs.max(-1))
        if self.sampled:
            for i in masked:
                tokens[i] = int(inverse_cdf(probs[i], torch.tensor(next(self.uniforms))))
            confidence = [float(probs[i, t]) for i, t in enumerate(tokens)]
        self.ranking = confidence
        if self.unmask.margin_confidence:
            self.ranking = [float(a - b) for a, b in probs.topk(2, dim=-1).values]
        if self.unmask.neg_entropy:
            self.ranking = (probs * (probs + 1e-10).log()).sum(-1).tolist()
        open_ = [p - v for block in self.in_flight if block.goes_on for p in range(block.start, block.end)]
        first = self.in_flight[0].end - v
        decided = sum(i not in masked for i in range(first))
        return Step(v, known, masked, tokens, confidence, logits, decided, open=open_, first_total=first)

    def draft_probs(self, logits: Tensor) -> Tensor:
        """What drafts are taken from; at temperature 0 filters count only as published."""
        sampling = self.sampling.__class__(
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            top_p_first=self.sampling.top_p_first,
        )
        return log_weights(logits, sampling).softmax(-1)

    def take_above_threshold(self, step: Step) -> None:
        """``d2f``, block by block: every draft above the threshold, else the best-ranked one of a block that must go on."""
        for block in self.in_flight:
            masked = [i for i in step.masked if block.start <= step.start + i < block.end]
            high = [i for i in masked if step.confidence[i] > self.unmask.skip_threshold]
            step.take(high, How.UNMASKED)
            if masked and not high and block.goes_on:
                step.take([max(masked, key=lambda i: self.ranking[i])], How.FORCED)

    def verify(self, step: Step) -> None:
        """Verify the span over the whole of what is in flight as drafted: where the network predicts its own position, by a mask query at each; else by the
        row before."""
        v, size = step.start, self.target
        drafted = [step.tokens[i] if i in step.masked else token for i, token in enumerate(step.known)]
        count, full = len(drafted), self.pipeline.attention == "full"
        block = [self.block_of(v + i, size) for i in range(count)]
        positions = [v + i for i in range(count)]
        if self.model.predicts_next:
            logits = self.forward("verify", drafted, positions, lambda i, j: full or block[j] <= block[i])
            logits = torch.cat([self.last[None], logits[:-1]])
        else:

            def sees(i: int, j: int) -> bool:
                if i < count:
                    return j < count and block[j] <= block[i]
                if j < count:
                    return j + size < count and block[j] < block[i - count]
                return (i - count) // size == (j - count) // size

            ids = drafted + [self.blocks.mask_id] * count
            logits = self.forward("verify", ids, positions * 2, sees)[count:]
        self.accept_span(step, self.suppress_mask(logits.clone()))
        self.take_later_runs(step)

    def take_later_runs(self, step: Step) -> None:
        """``ssd_partial_ar_span``: from the second step on, runs of drafts past a rejection each of which would be accepted."""
        least = self.acceptance.ssd_partial_ar_span
        if not least or self.steps == 1:
            return
        run: list[int] = []
        for i in [*step.span, None]:
            if i is not None and i in self.passed and i not in step.chosen:
                run.append(i)
                continue
            if len(run) >= least:
                step.take(run, How.RATIO)
            run = []

    def force(self, step: Step) -> None:
        """In each block that must go on and got too little: all other drafts from the threshold on if those are enough, else the best-ranked."""
        for block in self.in_flight:
            inside = [i for i in step.masked if block.start <= step.start + i < block.end]
            free = sorted((i for i in inside if i not in step.chosen), key=lambda i: -self.ranking[i])
            need = min(self.acceptance.min_tokens_per_step - (len(inside) - len(free)), len(free))
            if block.goes_on and need > 0:
                high = [i for i in free if self.ranking[i] >= self.unmask.skip_threshold]
                step.take(high if len(high) >= need else free[:need], How.FORCED)


def generate(
    model: Network, prompt: Sequence[int], options: StandardOptions, uniforms: Sequence[float] = ()
) -> ReferenceText:
    """Decode one prompt by the definition. ``uniforms`` are consumed in the published order and must suffice."""
    return Reference(model, options, uniforms).generate(prompt)
