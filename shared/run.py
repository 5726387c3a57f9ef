"""What every decode loop here has: a run, the draft and verify forwards of a step, and what the verifier's logits decide.

A family's loop says what a forward reads and when; these leaves are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.batch import Batch
from shared.draft import Choice, Draft
from shared.engine import Engine, Inputs, Staged
from shared.kv_cache import BlockCache
from shared.options import Acceptance, Cache
from shared.phases import call
from shared.routing import Policy
from shared.sampling import GREEDY_BELOW, sample
from shared.spans import Picked, span_inputs
from shared.verify import Verdict, take_confident, verified_choice


@dataclass
class Run:
    """One decode in progress: the model, its options (resolved), and what the rows share."""

    model: Any
    options: Any
    batch: Batch
    engine: Engine
    policy: Policy
    judge: Callable[..., Verdict]
    phase: Callable = call  # runs a function of device tensors, as a graph where that is possible
    prefill_seconds: float = 0.0

    @property
    def cache(self) -> BlockCache:
        return self.engine.cache

    @property
    def cache_options(self) -> Cache:
        return getattr(self.options, "cache", Cache())

    @property
    def acceptance(self) -> Acceptance:
        return getattr(self.options, "acceptance", Acceptance())

    @property
    def whole_verify(self) -> bool:
        """Does a verify carry the whole block whatever the span?"""
        outside = self.acceptance.ssd_ratio_threshold >= 0 and self.acceptance.ssd_threshold_all_spans
        return outside or not self.options.savings.short_verify

    def forward(self, kind: str, rows: Sequence[int], staged: Inputs | Staged, tokens: int, **place) -> Tensor:
        """One pass over ``tokens`` tokens an entry, which belong to ``rows``; ``place``: see `BlockCache.window`. The mask token is ruled out by `rule_out`."""
        self.batch.count(kind, set(rows), tokens * len(rows))
        return self.engine.run(staged, self.cache.window(tokens, rows, **place))

    def rule_out(self, logits: Tensor) -> Tensor:
        """The logits without the mask token, unless the options allow it."""
        if self.options.sampling.suppress_mask:
            logits[..., self.batch.mask_id] = float("-inf")
        return logits


@dataclass(frozen=True, slots=True)
class View:
    """The current block of some rows as a draft sees it: ``block, masked [b, L]``; ``index [b]`` are their rows."""

    index: Tensor
    block: Tensor
    masked: Tensor
    staged: Inputs | Staged | None = None


def draft_of(run: Run, view: View, logits: Tensor) -> Draft:
    """A token and its confidence at every position of the block."""
    batch, sampling, length = run.batch, run.options.sampling, run.batch.block_length
    logits, uniform = run.rule_out(logits), None
    if sampling.temperature >= GREEDY_BELOW:
        uniform = batch.uniforms.take(view.index, length, length)
    tokens, confidence = sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
    entry = torch.arange(len(view.index), device=tokens.device)
    decoded = batch.decoded[view.index]
    return Draft(view.index, view.block, view.masked, tokens, confidence, logits, entry, decoded, sampling)


@dataclass(frozen=True, slots=True)
class Verified:
    """Rows of a draft that were verified, ``index [v]`` (None: all of them), at the in-block positions ``queries [v, M]``, and the verifier's logits."""

    index: Tensor | None
    queries: Tensor
    logits: Tensor


def verify_spans(run: Run, rows: list[int], draft: Draft, picked: Picked) -> Verified | None:
    """Verify the first masked span of the picked rows in one forward over [drafted block | mask queries] (S2D2, the "2L trick")."""
    if not picked.index:
        return None
    index = None if len(picked.index) == len(rows) else run.batch.index(picked.index)
    queries, staged = run.phase(verify_inputs, run, draft, index, picked.tokens, picked.queries)
    these = [rows[k] for k in picked.index]
    return Verified(index, queries, run.forward("verify", these, staged, picked.tokens + picked.queries))


def verify_inputs(run: Run, draft: Draft, index: Tensor | None, tokens: int, queries: int):
    """``(queries [v, M], inputs)`` of a verify over the first ``tokens`` of the block; a query beyond the span stands at ``L``."""
    part = draft if index is None else draft.select(index)
    asked = span_inputs(part, tokens, queries, run.batch.start[part.rows], run.batch.mask_id)
    inputs = Inputs(asked.ids, asked.positions, part.rows, asked.mask, logits_at=asked.wanted)
    return asked.queries, run.engine.stage(inputs)


Judged = tuple[Choice, Tensor, Tensor]


def judged(run: Run, draft: Draft, verified: Verified | None, verdict_on: Callable[..., Judged]) -> Judged:
    """The choice after verification, ``reach [b]``: how many tokens of each row's drafted block are now encoded causally in the cache slots past
    its length (0: row not verified), and ``finite [b]``: were the verifier's logits numbers? ``verdict_on(run, part, verified)`` gives them for a draft
    whose rows were all verified."""
    if verified is not None and verified.index is None:
        choice, reach, finite = verdict_on(run, draft, verified)
    else:
        choice, reach = Choice.none(draft), torch.zeros_like(draft.rows)
        finite = torch.ones_like(draft.rows, dtype=torch.bool)
        if verified is not None:
            at = verified.index
            chosen, reach[at], finite[at] = verdict_on(run, draft.select(at), verified)
            choice.put(at, chosen)
    if run.acceptance.always_check_high_confidence:
        take_confident(choice, draft, run.options.unmask)
    return choice, reach, finite


def span_verdict(run: Run, draft: Draft, verified: Verified) -> Judged:
    """What `verify_spans` decides for a draft all of whose rows were verified."""
    options, logits = run.options, run.rule_out(verified.logits)
    verdict = run.judge(draft, logits, verified.queries, options.acceptance, options.sampling, run.batch.uniforms)
    short = options.savings.short_verify
    reach = draft.first_masked + draft.span_length if short else torch.full_like(draft.rows, run.batch.block_length)
    return verified_choice(draft, verdict, options.acceptance), reach, verdict.finite
