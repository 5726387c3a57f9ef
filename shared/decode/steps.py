"""The leaves every loop over blocks calls: prefill, draft, verify, decide, commit, emit.

A family's loop says what a forward reads and when; these are the same for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.decode.cursor import Finished
from shared.decode.diagnose import first_broken_layer
from shared.decode.run import Run
from shared.decode.spans import VerifyPlan, plan_verify, query_sizes, span_inputs
from shared.gpu.engine import Inputs, Staged
from shared.network.kv_cache import Where, Window
from shared.policy.accept import take_confident, verified_choice
from shared.policy.draft import Choice, Draft
from shared.policy.sampling import GREEDY_BELOW, sample

PREFILL_TOKENS = 4096  # encoded in one forward: enough for the matrix rate, little enough to spare memory


def by_tokens(lengths: dict[int, int], most: int) -> list[list[int]]:
    """The keys in groups of at most ``most`` tokens each, padding to the longest of the group counted in (a longer text is a group of its own)."""
    groups: list[list[int]] = []
    for row, length in lengths.items():
        if groups and (len(groups[-1]) + 1) * max(length, *(lengths[i] for i in groups[-1])) <= most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def prefill(run: Run, encode_prompts: Callable[[Run, list[int]], None]) -> list[int]:
    """Admit waiting prompts and encode their whole blocks, some rows at a time; returns the rows that came."""
    rows = run.canvas.admit()
    run.cursor.begin(rows)
    for lane in run.lanes.values():
        lane.cache.reset(rows)
    run.policy.reset(rows)
    began = time.perf_counter()
    for group in by_tokens({i: count for i in rows if (count := run.cursor.prefilled(i))}, PREFILL_TOKENS):
        encode_prompts(run, group)
    if rows and run.cache.length.is_cuda:
        torch.cuda.synchronize(run.cache.length.device)
    run.prefill_seconds += time.perf_counter() - began
    return rows


@dataclass(frozen=True, slots=True)
class View:
    """The current block of some rows as a draft sees it: ``block, masked [b, L]``; ``index [b]`` are their rows."""

    index: Tensor
    block: Tensor
    masked: Tensor
    staged: Inputs | Staged | None = None


def draft_window(run: Run, rows: list[int]) -> tuple[list[int], Window]:
    """``(commits, window)`` of a draft of the blocks of ``rows``. Finished blocks that still have to be committed go along as further entries: in each
    layer their keys are in the cache before the drafts look."""
    length, blocks = run.cursor.block_length, run.cursor.blocks
    commits = [i for i in rows if blocks[i].uncommitted]
    ahead = [length if blocks[i].uncommitted else 0 for i in rows] + [0] * len(commits) if commits else None
    return commits, run.cache.window(length, rows + commits, ahead=ahead)


def with_commits(run: Run, where: Where, block: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and positions ``[b + r, L]`` of a draft of ``block [b, L]`` and of the blocks before it that are committed along."""
    index, commits = where.rows[: len(block)], where.rows[len(block) :]
    positions = run.cursor.positions(index)
    if not len(commits):
        return block, positions
    length = run.cursor.block_length
    ids = torch.cat([block, run.cursor.block(commits, back=length)])
    return ids, torch.cat([positions, run.cursor.positions(commits, back=length)])


def draft_forward(run: Run, rows: list[int], commits: list[int], view: View, window: Window) -> Tensor:
    """Logits ``[b, L, V]`` of a draft; the ``commits`` that went along are in the cache then."""
    logits = run.forward("draft", rows + commits, view.staged, window)
    for i in commits:
        run.cursor.blocks[i].uncommitted = False
    run.cache.commit([run.cursor.block_length] * len(commits), commits)
    return logits


def draft_of(run: Run, view: View, logits: Tensor) -> Draft:
    """A token and its confidence at every position of the block."""
    sampling, length = run.options.sampling, run.cursor.block_length
    logits, uniform = run.suppress_mask(logits), None
    if sampling.temperature >= GREEDY_BELOW:
        uniform = run.canvas.uniforms.take(view.index, length, length)
    tokens, confidence = sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
    entry = torch.arange(len(view.index), device=tokens.device)
    decoded = run.cursor.decoded[view.index]
    return Draft(view.index, view.block, view.masked, tokens, confidence, logits, entry, decoded, sampling)


@dataclass(frozen=True, slots=True)
class Verified:
    """Rows of a draft that were verified, ``index [v]`` (None: all of them), at the in-block positions ``queries [v, M]``, and the verifier's logits."""

    index: Tensor | None
    queries: Tensor
    logits: Tensor


def plan_spans(run: Run, wanted: Tensor | None, candidates: Sequence[int]) -> VerifyPlan:
    """Which rows of a draft are verified, and how far: see `plan_verify`."""
    length, captured = run.cursor.block_length, run.lane.engine.runner is not None
    sizes = query_sizes(length) if captured else None
    return plan_verify(run.policy.constant, wanted, candidates, length, whole=run.whole_verify, sizes=sizes)


def verify_spans(run: Run, rows: list[int], draft: Draft, plan: VerifyPlan) -> Verified | None:
    """Verify the first masked span of the planned rows in one forward over [drafted block | mask queries] (S2D2, the "2L trick")."""
    if not plan.index:
        return None
    these = [rows[k] for k in plan.index]
    index = None if len(these) == len(rows) else run.canvas.index(plan.index)
    window = run.cache.window(plan.tokens + plan.queries, these)
    queries, staged = run.phase(verify_inputs, run, draft, index, window.where, plan.tokens, plan.queries)
    return Verified(index, queries, run.forward("verify", these, staged, window))


def verify_inputs(run: Run, draft: Draft, index: Tensor | None, where: Where, tokens: int, queries: int):
    """``(queries [v, M], inputs)`` of a verify over the first ``tokens`` of the block; a query beyond the span stands at ``L``."""
    part = draft if index is None else draft.select(index)
    asked = span_inputs(part, tokens, queries, run.cursor.start[where.rows], run.canvas.mask_id)
    inputs = Inputs(asked.ids, asked.positions, asked.mask, logits_at=asked.wanted)
    return asked.queries, run.stage(inputs, where)


Outcome = tuple[Choice, Tensor, Tensor]  # of a verify: choice, reach [b], finite [b]


def decide_verified(
    run: Run, draft: Draft, verified: Verified | None, outcome_of: Callable[[Run, Draft, Verified], Outcome]
) -> tuple[Choice, Tensor | None, Tensor | None]:
    """The choice after verification, ``reach [b]``: how many tokens of each row's drafted block are now encoded causally in the cache slots past
    its length (0: row not verified), and ``finite [b]``: were the verifier's logits numbers? The latter two are None where no row was verified.
    ``outcome_of(run, part, verified)`` gives all three for a draft whose rows were all verified."""
    reach = finite = None
    if verified is not None and verified.index is None:
        choice, reach, finite = outcome_of(run, draft, verified)
    else:
        choice = Choice.none(draft)
    if verified is not None and verified.index is not None:
        reach, finite = torch.zeros_like(draft.rows), torch.ones_like(draft.rows, dtype=torch.bool)
        chosen, reach[verified.index], finite[verified.index] = outcome_of(run, draft.select(verified.index), verified)
        choice.put(verified.index, chosen)
    if run.acceptance.always_check_high_confidence:
        take_confident(choice, draft, run.options.unmask)
    return choice, reach, finite


def span_outcome(run: Run, draft: Draft, verified: Verified) -> Outcome:
    """What `verify_spans` decides for a draft all of whose rows were verified."""
    options, logits = run.options, run.suppress_mask(verified.logits)
    rule, source = run.job.call.accept_rule, run.canvas.uniforms
    verdict = rule(draft, logits, verified.queries, options.acceptance, options.sampling, source)
    short = options.savings.short_verify
    reach = draft.first_masked + draft.span_length if short else torch.full_like(draft.rows, run.cursor.block_length)
    return verified_choice(draft, verdict, options.acceptance), reach, verdict.finite


def record(run: Run, draft: Draft, choice: Choice, reach: Tensor | None, finite: Tensor | None) -> Tensor:
    """Write what the step decided, and let the policy learn from it. Returns what `finish_step` reads."""
    verified = torch.zeros_like(draft.rows, dtype=torch.bool) if reach is None else reach > 0
    run.policy.observe(draft, verified, choice.count)
    return run.cursor.record(draft, choice, reach, finite)


def decide(
    run: Run, rows: list[int], draft: Draft, verified: Verified | None, decided: Callable[..., Tensor]
) -> list[Finished]:
    """Decide the step by the phase ``decided(run, draft, verified)``, and read which blocks are finished."""
    with naming_the_layer(run, rows):
        return run.cursor.finish_step(rows, run.phase(decided, run, draft, verified).tolist())


def finish_step(
    run: Run, rows: list[int], draft: Draft, verified: Verified | None, decided: Callable[..., Tensor]
) -> list[Finished]:
    """`decide`, then end texts at their stop strings and stream the finished blocks."""
    finished = run.stops.end(decide(run, rows, draft, verified, decided))
    stream(run, [f.row for f in finished])
    return finished


def stream(run: Run, rows: Sequence[int]) -> None:
    """Show the new tokens of ``rows`` to whoever looks on."""
    if run.job.call.on_block:
        for i in rows:
            run.job.call.on_block(run.canvas.rows[i].request, run.cursor.new_tokens(i))


@contextmanager
def naming_the_layer(run: Run, rows: list[int]) -> Iterator[None]:
    """Where logits of ``rows`` turn out not to be finite, the error says in which layer that began."""
    try:
        yield
    except FloatingPointError as error:
        layer = first_broken_layer(run.lane.model.model.layers, lambda: run.plain_forward(rows))
        raise FloatingPointError(f"{error}, first in {layer}") from None


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
    savings, cursor, length = run.options.savings, run.cursor, run.cursor.block_length
    wanted = [f for f in finished if not (f.last and savings.skip_last_commit)]
    encoded = [f.row for f in wanted if is_encoded(run, f)]
    now = []
    for f in wanted:
        if f.row not in encoded:
            if savings.fuse_commit and not f.last:
                cursor.blocks[f.row].uncommitted = True
            else:
                now.append(f.row)
    if now:
        window = run.cache.window(length, now)
        index = window.where.rows
        inputs = Inputs(cursor.block(index), cursor.positions(index), commit_mask(run, index), logits_at=slice(0, 0))
        run.forward("commit", now, inputs, window)
    run.cache.commit([length] * len(encoded + now), encoded + now)
    cursor.advance([f.row for f in finished if not f.last])


def emit(run: Run, rows: Sequence[int]) -> None:
    """Take the finished texts of ``rows`` off the canvas."""
    canvas, cursor, call = run.canvas, run.cursor, run.job.call
    for i in rows:
        position, end, ids = canvas.rows[i].position, cursor.end(i), canvas.tokens[i].tolist()
        how = {"edits": cursor.edits(i), "passes": cursor.passes(i), "decode": run.stops.text_of}
        how |= {"ids": ids[:end], "tokens": cursor.returned(i, ids, end), "block_length": cursor.block_length}
        completion = canvas.retire(i, **how)
        run.done[position] = completion = run.stops.cut(completion)
        if call.on_finish:
            call.on_finish(completion)
