"""The Fast-dLLM v2 decode loop: blocks of small blocks, and S2D2 with the causal verifier that the token shift makes possible.

Each step drafts the current small block of every row, may verify its first masked span, unmasks by confidence where nothing was verified, and
commits blocks that are finished. A commit yields the first token of the next block. Plain decoding is the same loop with a policy that
never verifies. To the cursor of this family a "block" is a small block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fast_dllm_v2.cursor import NOT_A_NUMBER, SmallBlocks, furthest
from fast_dllm_v2.modeling_fast import Fast_dLLM_QwenForCausalLM, previous_row
from fast_dllm_v2.options import Cache, Options, StandardOptions
from shared.decode import run as shared_run
from shared.decode import steps
from shared.decode.calls import Call, Job, checked, split_call
from shared.decode.cursor import Finished
from shared.decode.lanes import Lane
from shared.decode.run import block_canvas, inference, policy_of
from shared.decode.steps import (
    Outcome,
    Verified,
    View,
    decide,
    decide_verified,
    draft_of,
    emit,
    naming_the_layer,
    record,
    stream,
)
from shared.errors import UserError
from shared.gpu.engine import Engine, Inputs, Staged
from shared.gpu.graphs import Shape
from shared.network import masks
from shared.network.kv_cache import Where
from shared.output import Lossless, Output
from shared.policy.accept import self_speculative_losslessness, verified_choice
from shared.policy.draft import Choice, Draft
from shared.policy.sampling import GREEDY_BELOW, sample
from shared.policy.unmask import above_threshold
from shared.trace import How

_NO_CACHE = Cache()


@dataclass
class Run(shared_run.Run):
    """One decode of this family in progress."""

    STATE: ClassVar[tuple[str, ...]] = ("causal_rows", "next_logits")

    cursor: SmallBlocks
    causal_rows: Tensor | None = None  # [rows]: first rows of each row's block, which draft_ver has made causal
    next_logits: Tensor | None = None  # [rows, V]: what the last verify says follows the block (reuse_verify)

    @property
    def cache_options(self) -> Cache:
        return getattr(self.options, "cache", _NO_CACHE)

    @property
    def reuse_verify(self) -> bool:
        """Do verify forwards leave in the cache what a commit would?"""
        return (
            self.cache_options.reuse_verify
            and self.cache_options.cache_ver
            and not self.options.block_cache.use_block_cache
        )

    def plain_forward(self, rows: list[int]) -> Tensor:
        """One pass over the blocks of ``rows`` through the network as it is, from which numbers that broke can be traced."""
        ids, positions = self.cursor.whole(self.canvas.index(rows))
        return self.lane.model(ids, positions, self.cache.window(self.cursor.window, rows), None)


@inference
def decode(model: Fast_dLLM_QwenForCausalLM, input_ids, options: StandardOptions, call: Call) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    A text ends with the small block in which a stop string appears. Raises `UserError` before any forward when a prompt, an option or the call does not fit.
    """
    run = start(model, checked(model, input_ids, options, call, resolve))
    while run.canvas.waiting or run.canvas.active:
        ended = prefill(run)
        rows = [i for i in run.canvas.active if i not in ended]
        if rows:
            draft, wanted = propose(run, rows)
            verified = verify(run, rows, draft, route(run, rows, wanted))
            ended += move_on(run, decide(run, rows, draft, verified, decided))
        emit(run, ended)
    return run.output(_lossless(run.options))


def start(model: Fast_dLLM_QwenForCausalLM, job: Job) -> Run:
    """Allocate canvas, cache and the policy's state, as large as an engine that may be there already."""
    options, blocks, small = job.options, job.options.blocks, job.options.blocks.small_block_length
    # A verify beside a block cache is written behind the block.
    slots = furthest([len(p) for p in job.prompts], blocks)
    slots += blocks.block_length * options.block_cache.use_block_cache
    engine = Engine.of(model, job.rows, slots, forward_kinds(options), options.runtime)
    per_block = small * (small + 1) + 1 if options.sampling.temperature >= GREEDY_BELOW else 0
    per_block += small * (small + 3) // 2 if isinstance(options, Options) else 0
    canvas = block_canvas(job, engine, block_length=small, steps=small, per_block=per_block)
    cursor, policy = SmallBlocks(canvas, blocks), policy_of(options, len(canvas.tokens), model.device)
    run = Run(job, canvas, cursor, {"model": Lane("model", engine, canvas)}, policy)
    run.causal_rows = torch.zeros_like(cursor.start)
    if run.reuse_verify:
        size = (len(canvas.tokens), model.config.vocab_size)
        run.next_logits = torch.zeros(size, dtype=model.dtype, device=model.device)
    run.run_phases_with(canvas, cursor, canvas.uniforms, policy)
    return run


def forward_kinds(options: StandardOptions) -> list[Shape]:
    """The forwards of one row that are worth a graph: drafts, commits and, one token wider than a draft, verifies."""
    length, small = options.blocks.block_length, options.blocks.small_block_length
    apart = options.block_cache.use_block_cache
    kinds = [Shape(1, length, picks=small, lasting=True), Shape(1, length, picks=1)]
    if apart:
        kinds.append(Shape(1, small, picks=small, width=length, lasting=True))
    if isinstance(options, Options):
        reach = range(small, length + 1, small)
        kinds += [Shape(1, tokens, picks=small + 1, width=length + tokens if apart else 0) for tokens in reach]
    return kinds


def resolve(model: Fast_dLLM_QwenForCausalLM, options: StandardOptions, tokenizer=None) -> StandardOptions:
    """The options with every default that depends on the checkpoint filled in."""
    blocks = options.blocks
    length = blocks.block_length or model.config.bd_size
    small = blocks.small_block_length or (8 if length % 8 == 0 else length)
    if length % small:
        raise UserError(f"small_block_length is {small}. Allowed: a divisor of block_length ({length})")
    mask_id, stop_ids = model.special_ids(blocks.mask_id, blocks.stopping_criteria_idx, tokenizer)
    blocks = replace(
        blocks, block_length=length, small_block_length=small, mask_id=mask_id, stopping_criteria_idx=stop_ids
    )
    return replace(options, blocks=blocks)


def prefill(run: Run) -> list[int]:
    """Admit and encode waiting prompts; returns the rows that are finished already. A prompt of whole blocks also gets its first token."""
    filled: list[Finished] = []
    rows = steps.prefill(run, lambda run, group: filled.extend(encode_prompts(run, group)))
    run.causal_rows[rows] = 0
    over = ended_at_once(run, filled)
    ended = over + move_on(run, [f for f in filled if not f.last])
    blocks = run.cursor.blocks
    return ended + [i for i in rows if i not in ended and blocks[i].start >= blocks[i].total]


def ended_at_once(run: Run, finished: Iterable[Finished]) -> list[int]:
    """The rows among ``finished`` whose text has ended with the token after a block; these are streamed."""
    over = [f.row for f in finished if f.last]
    stream(run, over)
    return over


def encode_prompts(run: Run, rows: list[int]) -> list[Finished]:
    """One forward over the whole blocks of the prompts of ``rows``, all of which have some; it gives prompts of nothing else their first token."""
    canvas, counts = run.canvas, [run.cursor.prefilled(i) for i in rows]
    window = run.cache.window(max(counts), rows)
    device, causal = canvas.tokens.device, run.cache_options.cache_ver
    mask = masks.token_causal(window.tokens, device)
    mask = mask if causal else masks.block_causal(window.tokens, run.cursor.window, device)
    ids = canvas.tokens[window.where.rows, : window.tokens]
    positions = torch.arange(window.tokens, device=device).expand_as(ids)
    # Shorter rows are padded with what follows their blocks: later tokens, which earlier ones never see.
    inputs = Inputs(ids, positions, mask, logits_at=canvas.index(counts)[:, None] - 1)
    logits = run.forward("prefill", rows, inputs, window)
    run.cache.commit(counts, rows)
    whole = [k for k, i in enumerate(rows) if len(canvas.rows[i].prompt) == counts[k]]
    return put_next(run, [rows[k] for k in whole], logits[whole, 0])


def put_next(run: Run, rows: list[int], logits: Tensor | None) -> list[Finished]:
    """Choose and write the token that follows the last committed block of ``rows``, from its logits ``[b, V]`` (one read; see
    `SmallBlocks.finish_next`)."""
    if not rows:
        return []
    tokens = run.phase(next_tokens, run, run.canvas.index(rows), logits)
    with naming_the_layer(run, rows):
        return run.cursor.finish_next(rows, tokens.tolist())


def next_tokens(run: Run, index: Tensor, logits: Tensor) -> Tensor:
    """The tokens ``[b]`` that rows ``index [b]`` begin their small blocks with, written there; `NOT_A_NUMBER` where the logits are none."""
    sampling, uniform = run.options.sampling, None
    temperature = 0.0 if run.options.blocks.greedy_next else sampling.temperature
    if temperature >= GREEDY_BELOW:
        uniform = run.canvas.uniforms.take(index, 1, 1)[:, 0]
    tokens, confidence = sample(run.suppress_mask(logits), uniform, temperature, sampling.top_k, sampling.top_p)
    run.cursor.write_next(index, tokens)
    return torch.where(confidence.isfinite(), tokens, NOT_A_NUMBER)


def propose(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """Denoise the current small block of ``rows`` once: a draft, and whether the policy wants it verified, ``[b]`` (None: that never depends).

    The forward covers the whole block; with the block cache it covers the small block alone once that has begun.
    """
    cursor, cache = run.cursor, run.options.block_cache
    begun = [i in cursor.begun or not cache.refresh_block_cache for i in rows]
    within = [cache.use_block_cache and b and cursor.blocks[i].cached for b, i in zip(begun, rows, strict=True)]
    if len(set(within)) == 1:
        return run.phase(drafted, run, *draft_forward(run, rows, within[0]))
    logits = None
    for inside in (False, True):
        chosen = [k for k, w in enumerate(within) if w == inside]
        _, found = draft_forward(run, [rows[k] for k in chosen], inside)
        logits = found.new_empty(len(rows), *found.shape[1:]) if logits is None else logits
        logits[run.canvas.index(chosen)] = found
    return run.phase(drafted, run, run.phase(block_view, run, run.canvas.index(rows)), logits)


def draft_forward(run: Run, rows: list[int], within: bool) -> tuple[View, Tensor]:
    """The small blocks of ``rows`` and logits ``[b, small, V]`` of a draft of their whole blocks, or ``within`` these of the small ones alone."""
    cursor = run.cursor
    if within:
        offsets = [cursor.offset_of(i) for i in rows]
        window = run.cache.window(cursor.block_length, rows, offset=offsets, width=cursor.window)
    else:
        window = run.cache.window(cursor.window, rows)
        for i in rows:
            cursor.blocks[i].cached = True
    view = run.phase(draft_inputs, run, window.where, within)
    return view, run.forward("draft", rows, view.staged, window)


def block_view(run: Run, index: Tensor) -> View:
    """The small blocks of rows ``index [b]``."""
    block = run.cursor.block(index)
    return View(index, block, block == run.canvas.mask_id)


def draft_inputs(run: Run, where: Where, within: bool) -> View:
    """The small blocks of all entries, and the inputs of a draft: their whole blocks, or ``within`` these the small ones alone.

    A draft within sees the keys that the block's other positions were last given.
    """
    cursor, index, options = run.cursor, where.rows, run.cache_options
    view, mask = block_view(run, index), None
    if options.draft_ver:
        known = view.masked.int().argmax(-1)
        known = known + cursor.offset(index) if options.draft_ver_rows == "block" else known
        run.causal_rows[index] = torch.maximum(run.causal_rows[index], known)
        mask = masks.causal_until(run.causal_rows[index], cursor.window)
    if within:
        at = previous_row(torch.arange(cursor.block_length, device=index.device)).expand(len(index), -1)
        inputs = Inputs(view.block, cursor.positions(index), logits_at=at)
    else:
        inputs = Inputs(*cursor.whole(index), mask, logits_at=previous_row(cursor.slots(index)))
    return replace(view, staged=run.stage(inputs, where))


def drafted(run: Run, view: View, logits: Tensor) -> tuple[Draft, Tensor | None]:
    """A token and its confidence at every position, and the policy's decision where somebody has to read it."""
    draft = draft_of(run, view, logits)
    draft = replace(draft, decoded=(~draft.masked).sum(-1))
    decision = run.policy.decide(draft)
    return draft, decision if run.policy.constant is None else None


def route(run: Run, rows: list[int], wanted: Tensor | None) -> list[int]:
    """Which rows of the draft to verify. One read; none when the answer does not depend on the draft."""
    if wanted is None:
        return list(range(len(rows))) if run.policy.constant else []
    return [k for k, verify in enumerate(wanted.tolist()) if verify]


def verify(run: Run, rows: list[int], draft: Draft, chosen: list[int]) -> Verified | None:
    """Verify the first masked span of the chosen rows in one causal forward from the block's start to the small block's end (S2D2)."""
    if not chosen:
        return None
    cursor, these = run.cursor, [rows[k] for k in chosen]
    tokens = max(cursor.offset_of(i) for i in these) + cursor.block_length
    # Beside a block cache it is written behind the block, which it does not see.
    window = run.cache.window(tokens, these, offset=cursor.window * run.options.block_cache.use_block_cache)
    index = None if len(chosen) == len(rows) else run.canvas.index(chosen)
    queries, staged = run.phase(verify_inputs, run, draft, index, window.where, tokens)
    return Verified(index, queries, run.forward("verify", these, staged, window))


def verify_inputs(run: Run, draft: Draft, index: Tensor | None, where: Where, tokens: int):
    """``(queries [v, small], inputs)`` of a verify over the first ``tokens`` of the block."""
    cursor, part = run.cursor, draft if index is None else draft.select(index)
    (ids, positions), slots = cursor.whole(where.rows), cursor.slots(where.rows)
    ids = ids.scatter(1, slots, torch.where(part.masked, part.tokens, part.block))
    at = torch.cat([previous_row(slots), torch.full_like(slots[:, :1], tokens - 1)], 1)
    mask = masks.token_causal(tokens, ids.device)
    if where.width:
        unseen = torch.zeros(tokens, cursor.window, dtype=torch.bool, device=ids.device)
        mask = torch.cat([unseen, mask], 1)
    queries = torch.arange(cursor.block_length, device=ids.device).expand(len(ids), -1)
    return queries, run.stage(Inputs(ids[:, :tokens], positions[:, :tokens], mask, logits_at=at), where)


def decided(run: Run, draft: Draft, verified: Verified | None) -> Tensor:
    """What the step writes: the verified prefix, or where nothing was verified what the threshold takes. Returns what `decide` reads."""
    choice, reach, finite = decide_verified(run, draft, verified, outcome_of)
    unmask(run, draft, choice)
    return record(run, draft, choice, reach, finite)


def outcome_of(run: Run, draft: Draft, verified: Verified) -> Outcome:
    """What a causal verify decides for a draft all of whose rows were verified; it also predicts the token that follows the block."""
    options, small, logits = run.options, run.cursor.block_length, run.suppress_mask(verified.logits)
    if run.next_logits is not None:
        run.next_logits[draft.rows] = logits[:, -1]
    # A rejection is replaced from the residual against what was really drafted from, whatever the verifier's temperature.
    drafted = replace(draft, sampling=replace(options.sampling, verify_temperature=None))
    rule, source = run.job.call.accept_rule, run.canvas.uniforms
    verdict = rule(drafted, logits[:, :small], verified.queries, options.acceptance, options.sampling, source)
    choice = verified_choice(draft, verdict, options.acceptance, keep_rejected=False)
    return choice, torch.full_like(draft.rows, small), verdict.finite


def unmask(run: Run, draft: Draft, choice: Choice) -> None:
    """Where verification decided nothing: every draft above the threshold, and the most confident one in any case."""
    eligible = draft.masked & (choice.count == 0)[:, None]
    one = torch.ones_like(draft.rows)
    take, _ = above_threshold(draft.confidence, eligible, one, run.options.unmask.confidence_threshold)
    choice.add(take, draft.tokens, How.UNMASKED)


def move_on(run: Run, finished: list[Finished]) -> list[int]:
    """Move the rows of finished small blocks on, committing blocks at their ends; returns the rows whose text has ended.

    The token after a commit may complete a small block of one, so this repeats until no row is complete.
    """
    ended: list[int] = []
    while finished:
        finished = run.stops.end(finished)
        stream(run, [f.row for f in finished])
        keep = [f for f in finished if at_block_end(run, f) and wants_commit(run, f)]
        logits, kept = commit(run, keep), [f.row for f in keep]
        # The published length has one token after the last block.
        over = [f.row for f in finished if f.last and not (run.cursor.round_to_blocks and f.row in kept)]
        run.cursor.advance([f.row for f in finished if f.row not in over])
        follow = [k for k, row in enumerate(kept) if row not in over]
        finished = put_next(run, [kept[k] for k in follow], logits[follow] if follow else None)
        ended += over + ended_at_once(run, finished)
        finished = [f for f in finished if not f.last]
    return ended


def at_block_end(run: Run, finished: Finished) -> bool:
    """Is this small block the last of its block?"""
    return run.cursor.offset_of(finished.row) + run.cursor.block_length == run.cursor.window


def wants_commit(run: Run, finished: Finished) -> bool:
    """Will anything read this block's keys or what follows it, or is the commit asked for anyway? A text that stopped never is committed."""
    skipped = run.options.savings.skip_last_commit and not run.options.blocks.round_to_blocks
    return not finished.stopped and not (finished.last and skipped)


def commit(run: Run, keep: list[Finished]) -> Tensor | None:
    """Keep the keys and values of finished blocks, by a forward of the final tokens unless a verify was one; logits ``[k, V]`` of the tokens that
    follow (None without blocks)."""
    canvas, length, rows = run.canvas, run.cursor.window, [f.row for f in keep]
    now = [k for k, f in enumerate(keep) if not (run.reuse_verify and f.verified_to)]
    logits = None if run.next_logits is None else run.next_logits[canvas.index(rows)]
    if now:
        these = [rows[k] for k in now]
        window = run.cache.window(length, these)
        found = run.forward("commit", these, run.phase(commit_inputs, run, window.where), window)[:, 0]
        logits = found if len(now) == len(keep) else logits.index_copy(0, canvas.index(now), found)
    run.cache.commit([length] * len(rows), rows)
    run.causal_rows[rows] = 0
    for i in rows:
        run.cursor.blocks[i].cached = False
    return logits


def commit_inputs(run: Run, where: Where) -> Inputs | Staged:
    """The blocks of all entries as they are, and the logits of the token that follows."""
    ids, positions = run.cursor.whole(where.rows)
    mask = masks.token_causal(run.cursor.window, ids.device) if run.cache_options.cache_ver else None
    at = torch.full_like(ids[:, :1], run.cursor.window - 1)
    return run.stage(Inputs(ids, positions, mask, logits_at=at), where)


def _lossless(options: StandardOptions) -> Lossless:
    drawn_greedily = options.blocks.greedy_next and options.sampling.temperature >= GREEDY_BELOW
    reason = "greedy_next takes the likeliest token after a block"
    if options.blocks.block_length == 1:
        exact = Lossless(True, "block size 1 is the reference, so it is exact by definition")
        return Lossless(False, reason) if drawn_greedily else exact
    if isinstance(options, Options):
        rounded = {"round_to_blocks returns tokens past max_new_tokens": options.blocks.round_to_blocks}
        return self_speculative_losslessness(options, {reason: drawn_greedily, **rounded})
    return Lossless(False, "plain block diffusion takes tokens of one step independently of each other")


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind every ``generate`` function of the family: split ``flat`` into call and options, check the latter, decode."""
    return decode(model, input_ids, *split_call(kind, options, {**flat, "uniforms": uniforms}))
