"""What every decode loop here has: a run, the draft and verify forwards of a step, and what the verifier's logits decide.

A family's loop says what a forward reads and when; these leaves are the same for all.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.decode.batch import Batch, Finished, by_tokens
from shared.decode.diagnose import first_broken_layer
from shared.decode.spans import Picked, span_inputs
from shared.decode.stop_strings import StopStrings
from shared.gpu.engine import Engine, Inputs, Staged
from shared.gpu.graphs import on_device
from shared.gpu.phases import call
from shared.network import masks
from shared.network.kv_cache import BlockCache
from shared.options import Acceptance, Cache
from shared.output import Completion, Lossless, Output
from shared.policy.accept import Verdict, accept_span, take_confident, verified_choice
from shared.policy.draft import Choice, Draft
from shared.policy.routing import Never, Policy, make_policy
from shared.policy.sampling import GREEDY_BELOW, sample
from shared.policy.uniforms import Uniforms

# What a decoder without these groups has. Made once: an options object checks itself whenever it is made.
_NO_CACHE, _NO_ACCEPTANCE = Cache(), Acceptance()
PREFILL_TOKENS = 4096  # encoded in one forward: enough for the matrix rate, little enough to spare memory


def inference(decode: Callable[..., Output]) -> Callable[..., Output]:
    """Decorates ``decode(model, ...)``: no gradients, and the model's GPU is the current one."""

    @functools.wraps(decode)
    def guarded(model, *arguments, **keywords) -> Output:
        with torch.inference_mode(), on_device(model.device):
            return decode(model, *arguments, **keywords)

    return guarded


@dataclass
class Run:
    """One decode in progress: the model, its options (resolved), and what the rows share."""

    model: Any
    options: Any
    batch: Batch
    engine: Engine
    policy: Policy
    accept_rule: Callable[..., Verdict]
    phase: Callable = call  # runs a function of device tensors, as a graph where that is possible
    prefill_seconds: float = 0.0

    @property
    def cache(self) -> BlockCache:
        return self.engine.cache

    @property
    def cache_options(self) -> Cache:
        return getattr(self.options, "cache", _NO_CACHE)

    @property
    def acceptance(self) -> Acceptance:
        return getattr(self.options, "acceptance", _NO_ACCEPTANCE)

    @property
    def whole_verify(self) -> bool:
        """Does a verify carry the whole block whatever the span?"""
        outside = self.acceptance.ssd_ratio_threshold >= 0 and self.acceptance.ssd_threshold_all_spans
        return outside or not self.options.savings.short_verify

    def forward(self, kind: str, rows: Sequence[int], staged: Inputs | Staged, tokens: int, **place) -> Tensor:
        """One pass over ``tokens`` tokens an entry, which belong to ``rows``; ``place``: see `BlockCache.window`. The mask token is ruled out by `suppress_mask`."""
        self.batch.count(kind, set(rows), tokens * len(rows))
        return self.engine.run(staged, self.cache.window(tokens, rows, **place))

    def plain_forward(self, rows: list[int]) -> Tensor:
        """One pass over the blocks of ``rows`` through the network as it is, from which numbers that broke can be traced."""
        index, length = self.batch.index(rows), self.batch.block_length
        block = self.batch.block(index)
        ids = torch.cat([block, torch.full_like(block, self.batch.mask_id)], 1)
        positions, mask = self.batch.positions(index).repeat(1, 2), masks.two_copy_verify(length, ids.device)
        return self.model(ids, positions, self.cache.window(2 * length, rows), mask)

    def suppress_mask(self, logits: Tensor) -> Tensor:
        """The logits without the mask token, unless the options allow it."""
        if self.options.sampling.suppress_mask:
            logits[..., self.batch.mask_id] = float("-inf")
        return logits


def policy_of(options, rows: int, device) -> Policy:
    """The policy that ``options`` name, with state for ``rows`` rows; one that never verifies where they have no routing."""
    if not hasattr(options, "routing"):
        return Never()
    return make_policy(options.routing, options.bandit, options.estimation, options.unmask, rows=rows, device=device)


def source_of(
    engine: Engine, per_block: int, blocks: tuple[int, int], recorded: Sequence[Sequence[float]] | None, seed: int
) -> Uniforms:
    """Random numbers for the rows of ``engine``, at most ``per_block`` a block; ``blocks``: its length and how many tokens are to be decoded."""
    (length, new_tokens), rows, slots = blocks, len(engine.cache.lengths), engine.cache.slots
    most = max(per_block * (new_tokens // length + 2), 1)
    count = most if recorded is None else max(map(len, recorded), default=1)
    room = per_block * (slots // length + 2)
    return Uniforms(rows, count, seed=seed, device=engine.cache.length.device, recorded=recorded, room=room)


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
    logits, uniform = run.suppress_mask(logits), None
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
    options, logits = run.options, run.suppress_mask(verified.logits)
    verdict = run.accept_rule(draft, logits, verified.queries, options.acceptance, options.sampling, run.batch.uniforms)
    short = options.savings.short_verify
    reach = draft.first_masked + draft.span_length if short else torch.full_like(draft.rows, run.batch.block_length)
    return verified_choice(draft, verdict, options.acceptance), reach, verdict.finite


def finish_step(
    run: Run, rows: list[int], draft: Draft, verified: Verified | None, decided: Callable[..., Tensor]
) -> list[Finished]:
    """Decide the step by the phase ``decided(run, draft, verified)``, and read which blocks are finished."""
    with naming_the_layer(run, rows):
        return run.batch.finish_step(rows, run.phase(decided, run, draft, verified).tolist())


@contextmanager
def naming_the_layer(run: Run, rows: list[int]) -> Iterator[None]:
    """Where logits of ``rows`` turn out not to be finite, the error says in which layer that began."""
    try:
        yield
    except FloatingPointError as error:
        layer = first_broken_layer(run.model.model.layers, lambda: run.plain_forward(rows))
        raise FloatingPointError(f"{error}, first in {layer}") from None


def prefill(run: Run, encode_prompts: Callable[[Run, list[int]], None]) -> list[int]:
    """Admit waiting prompts and encode their whole blocks, some rows at a time; returns the rows that came."""
    batch = run.batch
    rows = batch.admit()
    run.cache.reset(rows)
    run.policy.reset(rows)
    began = time.perf_counter()
    for group in by_tokens({i: count for i in rows if (count := batch.prefilled(i))}, PREFILL_TOKENS):
        encode_prompts(run, group)
    if rows and run.cache.length.is_cuda:
        torch.cuda.synchronize(run.cache.length.device)
    run.prefill_seconds += time.perf_counter() - began
    return rows


def commit(
    run: Run,
    finished: list[Finished],
    is_encoded: Callable[[Run, Finished], bool],
    commit_mask: Callable[[Run, Tensor], Tensor | None],
) -> None:
    """Keep the keys and values of finished blocks: those a forward of this step computed from the final tokens (``is_encoded``), else by a forward of
    the final tokens, now or together with the next draft. Then move the rows on. ``commit_mask(run, index)``: how the tokens of those blocks see each
    other."""
    if not finished:
        return
    savings, batch, length = run.options.savings, run.batch, run.batch.block_length
    wanted = [f for f in finished if not (f.last and savings.skip_last_commit)]
    encoded = [f.row for f in wanted if is_encoded(run, f)]
    now = []
    for f in wanted:
        if f.row not in encoded:
            if savings.fuse_commit and not f.last:
                batch.rows[f.row].uncommitted = True
            else:
                now.append(f.row)
    if now:
        index = batch.index(now)
        mask = commit_mask(run, index)
        inputs = Inputs(batch.block(index), batch.positions(index), index, mask, logits_at=slice(0, 0))
        run.forward("commit", now, inputs, length)
    run.cache.commit([length] * len(encoded + now), encoded + now)
    batch.advance([f.row for f in finished if not f.last])


def emit(run: Run, rows: Sequence[int], stops: StopStrings, done: dict[int, Completion], blocks, on_finish) -> None:
    """Take the finished texts of ``rows`` off the batch, into ``done`` by the place of their prompts."""
    for i in rows:
        position = run.batch.rows[i].position
        done[position] = completion = stops.cut(run.batch.retire(i, blocks, stops.text_of))
        if on_finish:
            on_finish(completion)


def output_of(run: Run, done: dict[int, Completion], began: float, lossless: Lossless) -> Output:
    """What a decode that began at ``began`` returns."""
    if run.accept_rule is not accept_span:
        lossless = Lossless(False, "acceptance is by a script")
    return Output(
        [done[k] for k in sorted(done)],
        time.perf_counter() - began,
        dict(run.batch.forwards),
        *lossless,
        prefill_seconds=run.prefill_seconds,
        batch_tokens=dict(run.batch.forward_tokens),
    )
