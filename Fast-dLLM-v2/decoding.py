"""The Fast-dLLM v2 decode loop: blocks of small blocks, and S2D2 with the causal verifier that the token shift makes possible.

Each step drafts the current small block of every row, may verify its first masked span, unmasks by confidence where nothing was verified, and
commits blocks that are finished. A commit yields the first token of the next block. Plain decoding is the same loop with a policy that
never verifies. In a `Batch` of this family a "block" is a small block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fast_dllm_v2.modeling_fast import Fast_dLLM_QwenForCausalLM, previous_row
from fast_dllm_v2.options import Cache, Options, StandardOptions
from fast_dllm_v2.rows import NOT_A_NUMBER, Rows
from shared.decode import run as shared_run
from shared.decode.batch import Finished, whole_blocks
from shared.decode.calls import check_call, check_prompts, split_call
from shared.decode.run import (
    Judged,
    Verified,
    View,
    draft_of,
    emit,
    finish_step,
    inference,
    judged,
    naming_the_layer,
    output_of,
    policy_of,
    source_of,
)
from shared.decode.stop_strings import StopStrings
from shared.errors import UserError
from shared.gpu.engine import Engine, Inputs, Staged
from shared.gpu.graphs import Shape
from shared.network import masks
from shared.output import Completion, Lossless, Output
from shared.policy.accept import Verdict, accept_span, losslessness, verified_choice
from shared.policy.draft import Choice, Draft
from shared.policy.sampling import GREEDY_BELOW, sample
from shared.policy.unmask import above_threshold
from shared.scripts.prompts import as_prompts
from shared.trace import How

_NO_CACHE = Cache()


@dataclass
class Run(shared_run.Run):
    """One decode of this family in progress."""

    batch: Rows
    causal_rows: Tensor | None = None  # [rows]: leading rows of each row's block that draft_ver has made causal
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
        ids, positions = self.batch.whole(self.batch.index(rows))
        return self.model(ids, positions, self.cache.window(self.batch.window, rows), None)


@inference
def decode(
    model: Fast_dLLM_QwenForCausalLM,
    input_ids,
    options: StandardOptions,
    *,
    attention_mask=None,
    uniforms: Sequence[Sequence[float]] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    tokenizer=None,
    requests: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    on_block: Callable[[int, list[int]], None] | None = None,
    on_finish: Callable[[Completion], None] | None = None,
    accept_rule: Callable[..., Verdict] = accept_span,
) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    ``attention_mask`` marks padding in a ``[B, P]`` tensor. ``batch_size`` rows are in flight at a time (default: all); waiting prompts
    join as rows finish. ``stop``: a text ends with the small block in which one of these strings appears, and is cut before it (needs
    ``tokenizer``). Randomness comes from ``(seed, number of the prompt)``, or from ``uniforms``, one recorded list per prompt; ``requests``
    numbers the prompts otherwise than 0, 1, 2, ... ``on_block(request, new_ids)`` is called as small blocks finish, ``on_finish(completion)``
    as texts do. ``accept_rule`` replaces `shared.policy.accept.accept_span`. Raises `UserError` before any forward when a prompt or an option does not fit.
    """
    began = time.perf_counter()
    prompts = as_prompts(input_ids, attention_mask)
    options = resolve(model, options, tokenizer)
    check_prompts(prompts, options.blocks, model.config)
    check_call(len(prompts), requests, uniforms, batch_size, seed)
    run = start(
        model, prompts, options, requests, min(batch_size or len(prompts), len(prompts)), uniforms, seed, accept_rule
    )
    text_of = None if tokenizer is None else lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    stops = StopStrings(stop, text_of, run.batch)
    done: dict[int, Completion] = {}
    while run.batch.waiting or run.batch.active:
        ended = prefill(run, stops, on_block)
        rows = [i for i in run.batch.active if i not in ended]
        if rows:
            draft, wish = propose(run, rows)
            picked = route(run, rows, wish)
            verified = verify(run, rows, draft, picked)
            ended += move_on(run, finish_step(run, rows, draft, verified, decided), stops, on_block)
        emit(run, ended, stops, done, options.blocks, on_finish)
    return output_of(run, done, began, _lossless(run.options))


def start(model, prompts, options: StandardOptions, requests, rows: int, uniforms, seed: int, accept_rule) -> Run:
    """Allocate the batch, the cache and the policy's state for ``rows`` rows, as large as an engine that may be there already."""
    blocks, device = options.blocks, model.device
    length, small = blocks.block_length, blocks.small_block_length
    # Whole blocks, the token after the last, and the small block it begins; a verify beside a block cache is written behind the block.
    furthest = whole_blocks(max(map(len, prompts)) + blocks.max_new_tokens, length) + length
    slots = furthest + length * options.block_cache.use_block_cache
    engine = Engine.of(model, rows, slots, length, options.runtime, forward_kinds(options))
    allocated, slots = len(engine.cache.lengths), engine.cache.slots
    per_block = small * (small + 1) + 1 if options.sampling.temperature >= GREEDY_BELOW else 0
    per_block += small * (small + 3) // 2 if isinstance(options, Options) else 0
    source = source_of(engine, per_block, (small, blocks.max_new_tokens), uniforms, seed)
    batch = Rows(prompts, blocks, requests=requests, rows=rows, device=device, uniforms=source, room=(allocated, slots))
    policy = policy_of(options, allocated, device)
    causal_rows = torch.zeros(allocated, dtype=torch.long, device=device)
    new = Run(model, options, batch, engine, policy, accept_rule, causal_rows=causal_rows)
    if new.reuse_verify:
        new.next_logits = torch.zeros(allocated, model.config.vocab_size, dtype=model.dtype, device=device)
    constants = (replace(options, blocks=replace(blocks, max_new_tokens=1)), accept_rule)
    new.phase = engine.phases_for(constants, [new, batch, source, policy])
    return new


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


def prefill(run: Run, stops: StopStrings, on_block) -> list[int]:
    """Admit and encode waiting prompts; returns the rows that are finished already. A prompt of whole blocks also gets its first token."""
    batch, filled = run.batch, []
    rows = shared_run.prefill(run, lambda run, group: filled.extend(encode_prompts(run, group)))
    run.causal_rows[rows] = 0
    over = [f.row for f in filled if f.last]
    if on_block:
        for i in over:
            on_block(batch.rows[i].request, batch.new_tokens(i))
    ended = over + move_on(run, [f for f in filled if not f.last], stops, on_block)
    return ended + [i for i in rows if i not in ended and batch.rows[i].start >= batch.rows[i].total]


def encode_prompts(run: Run, rows: list[int]) -> list[Finished]:
    """One forward over the whole blocks of the prompts of ``rows``, all of which have some; it gives prompts of nothing else their first token."""
    batch, index, counts = run.batch, run.batch.index(rows), [run.batch.prefilled(i) for i in rows]
    tokens, device = max(counts), index.device
    causal = run.cache_options.cache_ver
    mask = masks.token_causal(tokens, device) if causal else masks.block_causal(tokens, batch.window, device)
    ids = batch.tokens[index, :tokens]
    positions = torch.arange(tokens, device=device).expand_as(ids)
    # Shorter rows are padded with what follows their blocks: later tokens, which earlier ones never see.
    inputs = Inputs(ids, positions, index, mask, logits_at=batch.index(counts)[:, None] - 1)
    logits = run.forward("prefill", rows, inputs, tokens)
    run.cache.commit(counts, rows)
    whole = [k for k, i in enumerate(rows) if len(batch.rows[i].prompt) == counts[k]]
    return put_next(run, [rows[k] for k in whole], logits[whole, 0])


def put_next(run: Run, rows: list[int], logits: Tensor | None) -> list[Finished]:
    """Choose and write the token that follows the last committed block of ``rows``, from its logits ``[b, V]`` (one read; see `Rows.finish_next`)."""
    if not rows:
        return []
    tokens = run.phase(next_tokens, run, run.batch.index(rows), logits)
    with naming_the_layer(run, rows):
        return run.batch.finish_next(rows, tokens.tolist())


def next_tokens(run: Run, index: Tensor, logits: Tensor) -> Tensor:
    """The tokens ``[b]`` that rows ``index [b]`` begin their small blocks with, written there; `NOT_A_NUMBER` where the logits are none."""
    sampling, uniform = run.options.sampling, None
    temperature = 0.0 if run.options.blocks.greedy_next else sampling.temperature
    if temperature >= GREEDY_BELOW:
        uniform = run.batch.uniforms.take(index, 1, 1)[:, 0]
    tokens, confidence = sample(run.suppress_mask(logits), uniform, temperature, sampling.top_k, sampling.top_p)
    run.batch.write_next(index, tokens)
    return torch.where(confidence.isfinite(), tokens, NOT_A_NUMBER)


def propose(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """Denoise the current small block of ``rows`` once: a draft, and whether the policy wants it verified, ``[b]`` (None: that never depends).

    The forward covers the whole block; with the block cache it covers the small block alone once that has begun.
    """
    batch = run.batch
    cache = run.options.block_cache
    begun = [i in batch.begun or not cache.refresh_block_cache for i in rows]
    within = [cache.use_block_cache and b and batch.rows[i].block_cached for b, i in zip(begun, rows, strict=True)]
    if len(set(within)) == 1:
        view = run.phase(draft_inputs, run, batch.index(rows), within[0])
        return run.phase(drafted, run, view, draft_forward(run, rows, view, within[0]))
    logits = None
    for inside in (False, True):
        chosen = [k for k, w in enumerate(within) if w == inside]
        these = [rows[k] for k in chosen]
        view = run.phase(draft_inputs, run, batch.index(these), inside)
        found = draft_forward(run, these, view, inside)
        logits = found.new_empty(len(rows), *found.shape[1:]) if logits is None else logits
        logits[batch.index(chosen)] = found
    return run.phase(drafted, run, run.phase(block_view, run, batch.index(rows)), logits)


def block_view(run: Run, index: Tensor) -> View:
    """The small blocks of rows ``index [b]``."""
    block = run.batch.block(index)
    return View(index, block, block == run.batch.mask_id)


def draft_inputs(run: Run, index: Tensor, within: bool) -> View:
    """The small blocks of rows ``index [b]``, and the inputs of a draft: their whole blocks, or ``within`` these the small ones alone.

    A draft within sees the keys that the block's other positions were last given.
    """
    batch, view, options = run.batch, block_view(run, index), run.cache_options
    mask = None
    if options.draft_ver:
        known = view.masked.int().argmax(-1)
        known = known + batch.offset(index) if options.draft_ver_rows == "block" else known
        run.causal_rows[index] = torch.maximum(run.causal_rows[index], known)
        mask = masks.causal_until(run.causal_rows[index], batch.window)
    if within:
        at = previous_row(torch.arange(batch.block_length, device=index.device)).expand(len(index), -1)
        ids, positions, offset = view.block, batch.positions(index), batch.offset(index)
        inputs = Inputs(ids, positions, index, logits_at=at, offset=offset, width=batch.window)
    else:
        inputs = Inputs(*batch.whole(index), index, mask, logits_at=previous_row(batch.places(index)))
    return replace(view, staged=run.engine.stage(inputs))


def draft_forward(run: Run, rows: list[int], view: View, within: bool) -> Tensor:
    """Logits ``[b, small, V]`` of a draft."""
    batch = run.batch
    if within:
        place = {"offset": [batch.rows[i].start % batch.window for i in rows], "width": batch.window}
        return run.forward("draft", rows, view.staged, batch.block_length, **place)
    for i in rows:
        batch.rows[i].block_cached = True
    return run.forward("draft", rows, view.staged, batch.window)


def drafted(run: Run, view: View, logits: Tensor) -> tuple[Draft, Tensor | None]:
    """A token and its confidence at every position, and the policy's decision where somebody has to read it."""
    draft = draft_of(run, view, logits)
    draft = replace(draft, decoded=(~draft.masked).sum(-1))
    decision = run.policy.decide(draft)
    return draft, decision if run.policy.constant is None else None


def route(run: Run, rows: list[int], wish: Tensor | None) -> list[int]:
    """Which rows of the draft to verify. One read; none when the answer does not depend on the draft."""
    if wish is None:
        return list(range(len(rows))) if run.policy.constant else []
    return [k for k, verify in enumerate(wish.tolist()) if verify]


def verify(run: Run, rows: list[int], draft: Draft, picked: list[int]) -> Verified | None:
    """Verify the first masked span of the picked rows in one causal forward from the block's start to the small block's end (S2D2)."""
    if not picked:
        return None
    batch, apart = run.batch, run.options.block_cache.use_block_cache
    these = [rows[k] for k in picked]
    tokens = max(batch.rows[i].start % batch.window for i in these) + batch.block_length
    index = None if len(picked) == len(rows) else batch.index(picked)
    queries, staged = run.phase(verify_inputs, run, draft, index, tokens)
    place = {"offset": batch.window} if apart else {}
    return Verified(index, queries, run.forward("verify", these, staged, tokens, **place))


def verify_inputs(run: Run, draft: Draft, index: Tensor | None, tokens: int):
    """``(queries [v, small], inputs)`` of a verify over the first ``tokens`` of the block. Beside a block cache it is written behind the block, unseen."""
    batch = run.batch
    part = draft if index is None else draft.select(index)
    (ids, positions), places = batch.whole(part.rows), batch.places(part.rows)
    ids = ids.scatter(1, places, torch.where(part.masked, part.tokens, part.block))
    at = torch.cat([previous_row(places), torch.full_like(places[:, :1], tokens - 1)], 1)
    inputs = Inputs(
        ids[:, :tokens], positions[:, :tokens], part.rows, masks.token_causal(tokens, ids.device), logits_at=at
    )
    if run.options.block_cache.use_block_cache:
        unseen = torch.zeros(tokens, batch.window, dtype=torch.bool, device=ids.device)
        offset = torch.full_like(part.rows, batch.window)
        inputs = replace(inputs, mask=torch.cat([unseen, inputs.mask], 1), offset=offset, width=batch.window + tokens)
    queries = torch.arange(batch.block_length, device=ids.device).expand(len(part.rows), -1)
    return queries, run.engine.stage(inputs)


def decided(run: Run, draft: Draft, verified: Verified | None) -> Tensor:
    """What the step writes: the verified prefix, or where nothing was verified what the threshold takes. Returns what `Rows.finish_step` reads."""
    choice, reach, finite = judged(run, draft, verified, verdict_on)
    unmask(run, draft, choice)
    run.policy.observe(draft, reach > 0, choice.count)
    return run.batch.record(draft, choice, reach, finite)


def verdict_on(run: Run, draft: Draft, verified: Verified) -> Judged:
    """What a causal verify decides for a draft all of whose rows were verified; it also predicts the token that follows the block."""
    options, small, logits = run.options, run.batch.block_length, run.suppress_mask(verified.logits)
    if run.next_logits is not None:
        run.next_logits[draft.rows] = logits[:, -1]
    # A rejection is replaced from the residual against what was really drafted from, whatever the verifier's temperature.
    drafted = replace(draft, sampling=replace(options.sampling, verify_temperature=None))
    source = run.batch.uniforms
    verdict = run.accept_rule(
        drafted, logits[:, :small], verified.queries, options.acceptance, options.sampling, source
    )
    choice = verified_choice(draft, verdict, options.acceptance, keep_rejected=False)
    return choice, torch.full_like(draft.rows, small), verdict.finite


def unmask(run: Run, draft: Draft, choice: Choice) -> None:
    """Where verification decided nothing: every draft above the threshold, and the most confident one in any case."""
    eligible = draft.masked & (choice.count == 0)[:, None]
    one = torch.ones_like(draft.rows)
    take, _ = above_threshold(draft.confidence, eligible, one, run.options.unmask.confidence_threshold)
    choice.add(take, draft.tokens, How.UNMASKED)


def move_on(run: Run, finished: list[Finished], stops: StopStrings, on_block) -> list[int]:
    """Move the rows of finished small blocks on, committing blocks at their ends; returns the rows whose text has ended.

    The token after a commit may complete a small block of one, so this repeats until no row is complete.
    """
    batch, blocks, ended = run.batch, run.options.blocks, []
    while finished:
        finished = stops.end(finished)
        if on_block:
            for f in finished:
                on_block(batch.rows[f.row].request, batch.new_tokens(f.row))
        keep = [f for f in finished if at_block_end(run, f) and wants_commit(run, f)]
        logits, kept = commit(run, keep), [f.row for f in keep]
        # The published length has one token after the last block.
        over = [f.row for f in finished if f.last and not (blocks.round_to_blocks and f.row in kept)]
        batch.advance([f.row for f in finished if f.row not in over])
        follow = [k for k, row in enumerate(kept) if row not in over]
        finished = put_next(run, [kept[k] for k in follow], logits[follow] if follow else None)
        if on_block:
            for f in finished:
                if f.last:
                    on_block(batch.rows[f.row].request, batch.new_tokens(f.row))
        ended += over + [f.row for f in finished if f.last]
        finished = [f for f in finished if not f.last]
    return ended


def at_block_end(run: Run, finished: Finished) -> bool:
    """Is this small block the last of its block?"""
    return (run.batch.rows[finished.row].start + run.batch.block_length) % run.batch.window == 0


def wants_commit(run: Run, finished: Finished) -> bool:
    """Will anything read this block's keys or what follows it, or is the commit asked for anyway? A text that stopped never is committed."""
    skipped = run.options.savings.skip_last_commit and not run.options.blocks.round_to_blocks
    return not finished.stopped and not (finished.last and skipped)


def commit(run: Run, keep: list[Finished]) -> Tensor | None:
    """Keep the keys and values of finished blocks, by a forward of the final tokens unless a verify was one; logits ``[k, V]`` of the tokens that
    follow (None without blocks)."""
    batch, length = run.batch, run.batch.window
    rows = [f.row for f in keep]
    now = [k for k, f in enumerate(keep) if not (run.reuse_verify and f.verified_to)]
    logits = None if run.next_logits is None else run.next_logits[batch.index(rows)]
    if now:
        these = [rows[k] for k in now]
        found = run.forward("commit", these, run.phase(commit_inputs, run, batch.index(these)), length)[:, 0]
        logits = found if len(now) == len(keep) else logits.index_copy(0, batch.index(now), found)
    run.cache.commit([length] * len(rows), rows)
    run.causal_rows[rows] = 0
    for i in rows:
        batch.rows[i].block_cached = False
    return logits


def commit_inputs(run: Run, index: Tensor) -> Inputs | Staged:
    """The blocks of rows ``index [b]`` as they are, and the logits of the token that follows."""
    ids, positions = run.batch.whole(index)
    mask = masks.token_causal(run.batch.window, ids.device) if run.cache_options.cache_ver else None
    at = torch.full_like(ids[:, :1], run.batch.window - 1)
    return run.engine.stage(Inputs(ids, positions, index, mask, logits_at=at))


def _lossless(options: StandardOptions) -> Lossless:
    bent = options.blocks.greedy_next and options.sampling.temperature >= GREEDY_BELOW
    reason = "greedy_next takes the likeliest token after a block"
    if options.blocks.block_length == 1:
        return Lossless(False, reason) if bent else Lossless(True, "block size one is the law itself")
    if isinstance(options, Options):
        return losslessness(
            options,
            {reason: bent, "round_to_blocks returns tokens past max_new_tokens": options.blocks.round_to_blocks},
        )
    return Lossless(False, "plain block diffusion takes tokens of one step independently of each other")


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind every ``generate`` function of the family: split ``flat`` into call keywords and options, check the latter, decode."""
    options, call = split_call(kind, options, flat)
    return decode(model, input_ids, options, uniforms=uniforms, **call)
