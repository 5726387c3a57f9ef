"""The LLaDA2 decode loop: threshold decoding that edits its own tokens, and S2D2, in which the same model at block size one verifies its drafts.

Each step drafts the current block of every row, replaces known tokens of it where the model is confident of others, may verify the first masked span, fills
what the step still owes by confidence, and commits blocks that are finished. ``cached`` is the same loop with a policy that never
verifies, ``nocache`` that one with nothing ever committed: there the cache is scratch, in which each forward puts its own keys for its own attention.

What a step computes between its forwards stands in functions of device tensors: `draft_inputs`, `drafted`, `shared.decode.run.verify_inputs` and `decided`. They read
nothing back, so that on a GPU each is one CUDA graph (`shared.gpu.phases`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llada2.modeling_llada2_moe import LLaDA2MoeModelLM
from llada2.options import NoCacheOptions, Options, StandardOptions
from llada2.rows import Rows
from shared.decode import run as shared_run
from shared.decode.batch import Finished, whole_blocks
from shared.decode.calls import check_call, check_prompts, split_call
from shared.decode.run import (
    Verified,
    View,
    commit,
    draft_of,
    emit,
    finish_step,
    inference,
    judged,
    output_of,
    policy_of,
    prefill,
    source_of,
    span_verdict,
    verify_spans,
)
from shared.decode.spans import Picked, pick, wishes
from shared.decode.stop_strings import StopStrings
from shared.gpu.engine import Engine, Inputs
from shared.network import masks
from shared.output import Completion, Lossless, Output
from shared.policy.accept import Verdict, accept_span, losslessness
from shared.policy.draft import Choice, Draft
from shared.policy.sampling import GREEDY_BELOW
from shared.policy.unmask import above_threshold
from shared.scripts.prompts import as_prompts
from shared.trace import How


@dataclass
class Run(shared_run.Run):
    """One decode of this family in progress."""

    batch: Rows

    @property
    def cached(self) -> bool:
        return isinstance(self.options, StandardOptions)

    @property
    def whole_verify(self) -> bool:
        return not isinstance(self.options, Options) or super().whole_verify


@inference
def decode(
    model: LLaDA2MoeModelLM,
    input_ids,
    options: NoCacheOptions,
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
    join as rows finish. ``stop``: a text ends with the block in which one of these strings appears, and is cut before it (needs ``tokenizer``).
    Randomness comes from ``(seed, number of the prompt)``, or from ``uniforms``, one recorded list per prompt; ``requests`` numbers the prompts
    otherwise than 0, 1, 2, ... ``on_block(request, new_ids)`` is called as blocks finish, ``on_finish(completion)`` as texts do.
    ``accept_rule`` replaces `shared.policy.accept.accept_span`. Raises `UserError` before any forward when a prompt or an option does not fit.
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
    while prefill(run, encode_prompts) or run.batch.active:
        rows = run.batch.active
        draft, wish = propose(run, rows)
        picked = route(run, rows, wish)
        verified = verify_spans(run, rows, draft, picked)
        finished = stops.end(finish_step(run, rows, draft, verified, decided))
        if on_block:
            for f in finished:
                on_block(run.batch.rows[f.row].request, run.batch.new_tokens(f.row, options.blocks.max_new_tokens))
        if run.cached:
            commit(run, finished, is_encoded, commit_mask)
        else:
            run.batch.advance([f.row for f in finished if not f.last])
        emit(run, [f.row for f in finished if f.last], stops, done, options.blocks, on_finish)
    return output_of(run, done, began, _lossless(run.options))


def start(model, prompts, options: NoCacheOptions, requests, rows: int, uniforms, seed: int, accept_rule) -> Run:
    """Allocate the batch, the cache and the policy's state for ``rows`` rows, as large as an engine that may be there already."""
    blocks, editing, device = options.blocks, options.editing, model.device
    length, sampled = blocks.block_length, options.sampling.temperature >= GREEDY_BELOW
    capacity = whole_blocks(max(map(len, prompts)) + blocks.max_new_tokens, length)
    kinds = None if isinstance(options, StandardOptions) else ()  # a graph is of no use to forwards that grow
    engine = Engine.of(model, rows, capacity + length, length, options.runtime, kinds)
    allocated, slots = len(engine.cache.lengths), engine.cache.slots
    per_block = length * (length + editing.max_post_steps) if sampled else 0
    per_block += length * (length + 3) // 2 if isinstance(options, Options) else 0
    source = source_of(engine, per_block, (length, blocks.max_new_tokens), uniforms, seed)
    batch = Rows(
        prompts,
        blocks,
        editing,
        most_posts=0 if options.skips_post_steps else editing.max_post_steps,
        passed_over=length if options.skips_post_steps and sampled else 0,
        requests=requests,
        rows=rows,
        device=device,
        uniforms=source,
        room=(allocated, slots),
    )
    policy = policy_of(options, allocated, device)
    run = Run(model, options, batch, engine, policy, accept_rule)
    constants = (replace(options, blocks=replace(blocks, max_new_tokens=1)), accept_rule)
    run.phase = engine.phases_for(constants, [batch, source, policy])
    return run


def resolve(model: LLaDA2MoeModelLM, options: NoCacheOptions, tokenizer=None) -> NoCacheOptions:
    """The options with every default that depends on the checkpoint filled in."""
    blocks = options.blocks
    length = blocks.block_length or model.config.block_size
    mask_id, stop_ids = model.special_ids(blocks.mask_id, blocks.stopping_criteria_idx, tokenizer)
    blocks = replace(blocks, block_length=length, mask_id=mask_id, stopping_criteria_idx=stop_ids)
    return replace(options, blocks=blocks)


def encode_prompts(run: Run, rows: list[int]) -> None:
    """One forward over the whole blocks of the prompts of ``rows``, all of which have some; none where nothing is cached."""
    if not run.cached:
        return
    starts = [run.batch.rows[i].start for i in rows]
    ids = run.batch.tokens[run.batch.index(rows), : max(starts)]
    positions = torch.arange(max(starts), device=ids.device).expand_as(ids)
    # Shorter rows are padded with what follows their prompt: later tokens, which earlier ones never see.
    inputs = Inputs(ids, positions, run.batch.index(rows), prefix_mask(run, starts), logits_at=slice(0, 0))
    run.forward("prefill", rows, inputs, max(starts))
    run.cache.commit(starts, rows)


def prefix_mask(run: Run, ends: list[int]) -> Tensor:
    """How the first ``ends [b]`` tokens of some rows see each other, ``[T, T]`` for the longest, or what is added to their scores, ``[b, T, T]``."""
    tokens, device = max(ends), run.cache.length.device
    if run.cache_options.cache_ver:
        return masks.token_causal(tokens, device)
    mask = masks.block_causal(tokens, run.batch.block_length, device)
    if not run.options.blocks.as_bias:
        return mask
    # A 0 where the mask is False hides nothing, so the padding of shorter rows has to be hidden here.
    padding = torch.arange(tokens, device=device) >= run.batch.index(ends)[:, None]
    return mask.float().expand(len(ends), -1, -1).masked_fill(padding[:, None, :], float("-inf"))


def propose(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """Denoise the current block of ``rows`` once: a draft, and what the policy wishes to verify of it (see `drafted`).

    Finished blocks that still have to be committed ride along as further entries of the same forward: in each layer their keys are in the
    cache before the drafts look.
    """
    batch, length = run.batch, run.batch.block_length
    if not run.cached:
        view, inputs = whole_inputs(run, rows)
        return run.phase(drafted, run, view, run.forward("draft", rows, inputs, inputs.ids.shape[1]))
    commit_rows = [i for i in rows if batch.rows[i].uncommitted]
    ahead = [length if batch.rows[i].uncommitted else 0 for i in rows] + [0] * len(commit_rows) if commit_rows else None
    ride, reach = (run.cache.indices(commit_rows), run.cache.indices(ahead)) if commit_rows else (None, None)
    view = run.phase(draft_inputs, run, batch.index(rows), ride, reach)
    logits = run.forward("draft", rows + commit_rows, view.staged, length, ahead=ahead)
    for i in commit_rows:
        batch.rows[i].uncommitted = False
    run.cache.commit([length] * len(commit_rows), commit_rows)
    return run.phase(drafted, run, view, logits)


def whole_inputs(run: Run, rows: list[int]) -> tuple[View, Inputs]:
    """The blocks of ``rows``, and with everything before them as one forward's inputs."""
    batch, index = run.batch, run.batch.index(rows)
    ends = [batch.rows[i].start + batch.block_length for i in rows]
    ids, block = batch.tokens[index, : max(ends)], batch.block(index)
    positions = torch.arange(max(ends), device=ids.device).expand_as(ids)
    inputs = Inputs(ids, positions, index, prefix_mask(run, ends), logits_at=batch.positions(index))
    return View(index, block, block == batch.mask_id), inputs


def draft_inputs(run: Run, index: Tensor, ride: Tensor | None, ahead: Tensor | None) -> View:
    """The blocks of rows ``index [b]``, and of the commits that ``ride [r]`` along, as one forward's inputs; ``ahead [b + r]``."""
    batch, options, length = run.batch, run.cache_options, run.batch.block_length
    block, positions = batch.block(index), batch.positions(index)
    masked = block == batch.mask_id
    known, mask = torch.zeros_like(index), None
    if options.draft_ver:
        known = torch.where(masked.any(-1), masked.int().argmax(-1), length)
        mask = masks.causal_until(known, length)
    ids, entries = block, index
    if ride is not None:
        entries = torch.cat([index, ride])
        ids = torch.cat([ids, batch.block(ride, back=length)])
        positions = torch.cat([positions, batch.positions(ride, back=length)])
        if options.draft_ver or options.cache_ver:
            final = torch.full_like(ride, length if options.cache_ver else 0)
            mask = masks.causal_until(torch.cat([known, final]), length)
    staged = run.engine.stage(Inputs(ids, positions, entries, mask, ahead, logit_rows=len(index)))
    return View(index, block, masked, staged)


def drafted(run: Run, view: View, logits: Tensor) -> tuple[Draft, Tensor | None]:
    """A token and its confidence at every position, known tokens edited, and what the policy wishes to verify (`shared.decode.spans.wishes`).

    The block of the draft is the edited one: what is verified, filled and written next builds on it.
    """
    draft = draft_of(run, view, logits)
    better = draft.confidence > run.options.editing.editing_threshold
    block = run.batch.edit(view.index, view.block, view.masked, draft.tokens, better)
    draft = replace(draft, block=block)
    return draft, wishes(run.policy, draft, whole=run.whole_verify)


def route(run: Run, rows: list[int], wish: Tensor | None) -> Picked:
    """Which of the rows that have something masked to verify, and how far."""
    candidates = [k for k, i in enumerate(rows) if i not in run.batch.in_post_step]
    return pick(run.policy, wish, run.engine, candidates, whole=run.whole_verify)


def decided(run: Run, draft: Draft, verified: Verified | None) -> Tensor:
    """What the step writes: the verified prefix, then what it still owes by confidence. Returns what `Batch.finish_step` reads."""
    choice, reach, finite = judged(run, draft, verified, span_verdict)
    everyone = verified is not None and verified.index is None
    if not everyone or run.options.unmask.num_to_transfer > 1:  # a verified row has gained one already
        fill(run, draft, choice)
    run.policy.observe(draft, reach > 0, choice.count)
    return run.batch.record(draft, choice, reach, finite)


def fill(run: Run, draft: Draft, choice: Choice) -> None:
    """Fill what the step still owes: every draft above the threshold, or the surest ones where those are too few."""
    unmask = run.options.unmask
    due = draft.masked.sum(-1).clamp(max=unmask.num_to_transfer) - choice.count
    eligible = draft.masked & ~choice.take & (due > 0)[:, None]
    count = torch.minimum(due, eligible.sum(-1))
    take, _ = above_threshold(draft.confidence, eligible, count, unmask.confidence_threshold)
    choice.add(take, draft.tokens, How.UNMASKED)


def is_encoded(run: Run, finished: Finished) -> bool:
    """Are the keys a commit would compute in the cache already, written by the verify or the draft of this step?"""
    savings, causal = run.options.savings, run.cache_options.cache_ver
    if finished.verified_to < run.batch.block_length:
        return False
    if finished.row in run.batch.after_post_step:
        return savings.reuse_draft and run.cache_options.draft_ver == causal
    return savings.reuse_verify and causal


def commit_mask(run: Run, index: Tensor) -> Tensor | None:
    """How the tokens of a finished block see each other when it is committed (None: all of them)."""
    return masks.token_causal(run.batch.block_length, index.device) if run.cache_options.cache_ver else None


def _lossless(options: NoCacheOptions) -> Lossless:
    blocks, editing = options.blocks, options.editing
    if isinstance(options, Options):
        own = {
            "editing replaces verified tokens (editing_threshold 1 does not)": editing.on,
            "num_to_transfer above 1 adds unverified tokens": options.unmask.num_to_transfer > 1,
        }
        return losslessness(options, own)
    if blocks.block_length == 1 and not blocks.as_bias and not (editing.on and editing.max_post_steps):
        return Lossless(True, "block size one is the law itself")
    return Lossless(False, "tokens of one step are taken independently of each other")


def generate(
    kind: type[NoCacheOptions], model, input_ids, options: NoCacheOptions | None, uniforms, flat: dict
) -> Output:
    """Behind every ``generate`` function of the family: split ``flat`` into call keywords and options, check the latter, decode."""
    options, call = split_call(kind, options, flat)
    return decode(model, input_ids, options, uniforms=uniforms, **call)
