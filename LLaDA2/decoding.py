"""The LLaDA2 decode loop: threshold decoding that edits its own tokens, and S2D2, in which the same model at block size one verifies its drafts.

Each step drafts the current block of every row, replaces known tokens of it where the model is confident of others, may verify the first masked span, fills
what the step still owes by confidence, and commits blocks that are finished. ``cached`` is the same loop with a policy that never
verifies, ``nocache`` that one with nothing ever committed: there the cache is scratch, in which each forward puts its own keys for its own attention.

What a step computes between its forwards stands in functions of device tensors: `draft_inputs`, `drafted`, `shared.decode.steps.verify_inputs` and
`decided`. They read nothing back, so that on a GPU each is one CUDA graph (`shared.gpu.phases`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llada2.cursor import EditedBlocks
from llada2.modeling_llada2_moe import LLaDA2MoeModelLM
from llada2.options import NoCacheOptions, Options, StandardOptions
from shared.decode import run as shared_run
from shared.decode.calls import Call, Job, checked, split_call
from shared.decode.cursor import Finished, whole_blocks
from shared.decode.lanes import Lane
from shared.decode.run import block_canvas, inference, policy_of
from shared.decode.spans import VerifyPlan, two_copy_kinds, wanted_spans
from shared.decode.steps import (
    Verified,
    View,
    commit,
    decide_verified,
    draft_forward,
    draft_of,
    draft_window,
    emit,
    finish_step,
    plan_spans,
    prefill,
    record,
    span_outcome,
    verify_spans,
    with_commits,
)
from shared.gpu.engine import Engine, Inputs
from shared.gpu.graphs import Shape
from shared.network import masks
from shared.network.kv_cache import Where
from shared.output import Lossless, Output
from shared.policy.accept import self_speculative_losslessness
from shared.policy.draft import Choice, Draft
from shared.policy.sampling import GREEDY_BELOW
from shared.policy.unmask import above_threshold
from shared.trace import How


@dataclass
class Run(shared_run.Run):
    """One decode of this family in progress."""

    cursor: EditedBlocks

    @property
    def cached(self) -> bool:
        return isinstance(self.options, StandardOptions)

    @property
    def whole_verify(self) -> bool:
        return not isinstance(self.options, Options) or super().whole_verify


@inference
def decode(model: LLaDA2MoeModelLM, input_ids, options: NoCacheOptions, call: Call) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    Raises `UserError` before any forward when a prompt, an option or the call does not fit.
    """
    run = start(model, checked(model, input_ids, options, call, resolve))
    while prefill(run, encode_prompts) or run.canvas.active:
        rows = run.canvas.active
        draft, wanted = propose(run, rows)
        verified = verify_spans(run, rows, draft, route(run, rows, wanted))
        finished = finish_step(run, rows, draft, verified, decided)
        if run.cached:
            commit(run, finished, is_encoded, commit_mask)
        else:
            run.cursor.advance([f.row for f in finished if not f.last])
        emit(run, [f.row for f in finished if f.last])
    return run.output(_lossless(run.options))


def start(model: LLaDA2MoeModelLM, job: Job) -> Run:
    """Allocate canvas, cache and the policy's state, as large as an engine that may be there already."""
    options, blocks, editing = job.options, job.options.blocks, job.options.editing
    length, sampled = blocks.block_length, options.sampling.temperature >= GREEDY_BELOW
    slots = whole_blocks(max(map(len, job.prompts)) + blocks.max_new_tokens, length) + length
    engine = Engine.of(model, job.rows, slots, forward_kinds(options), options.runtime)
    per_block = length * (length + editing.max_post_steps) if sampled else 0
    per_block += length * (length + 3) // 2 if isinstance(options, Options) else 0
    posts = 0 if options.skips_post_steps else editing.max_post_steps
    canvas = block_canvas(job, engine, block_length=length, steps=length + posts, per_block=per_block)
    skipped = length if options.skips_post_steps and sampled else 0
    cursor = EditedBlocks(canvas, blocks, editing, post_steps=posts, skipped_uniforms=skipped)
    policy = policy_of(options, len(canvas.tokens), model.device)
    run = Run(job, canvas, cursor, {"model": Lane("model", engine, canvas)}, policy)
    run.run_phases_with(canvas, cursor, canvas.uniforms, policy)
    return run


def forward_kinds(options: NoCacheOptions) -> list[Shape]:
    """The forwards of one row that are worth a graph: without a cache none, for they grow."""
    return two_copy_kinds(options.blocks.block_length) if isinstance(options, StandardOptions) else []


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
    starts = [run.cursor.prefilled(i) for i in rows]
    window = run.cache.window(max(starts), rows)
    ids = run.canvas.tokens[window.where.rows, : window.tokens]
    positions = torch.arange(window.tokens, device=ids.device).expand_as(ids)
    # Shorter rows are padded with what follows their prompt: later tokens, which earlier ones never see.
    run.forward("prefill", rows, Inputs(ids, positions, prefix_mask(run, starts), logits_at=slice(0, 0)), window)
    run.cache.commit(starts, rows)


def prefix_mask(run: Run, ends: list[int]) -> Tensor:
    """How the first ``ends [b]`` tokens of some rows see each other, ``[T, T]`` for the longest, or what is added to their scores, ``[b, T, T]``."""
    tokens, device = max(ends), run.cache.length.device
    if run.cache_options.cache_ver:
        return masks.token_causal(tokens, device)
    mask = masks.block_causal(tokens, run.cursor.block_length, device)
    if not run.options.blocks.as_bias:
        return mask
    # A 0 where the mask is False hides nothing, so the padding of shorter rows has to be hidden here.
    padding = torch.arange(tokens, device=device) >= run.canvas.index(ends)[:, None]
    return mask.float().expand(len(ends), -1, -1).masked_fill(padding[:, None, :], float("-inf"))


def propose(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """Denoise the current block of ``rows`` once: a draft, and what the policy wants verified of it (see `drafted`)."""
    if not run.cached:
        return propose_on_everything(run, rows)
    commits, window = draft_window(run, rows)
    view = run.phase(draft_inputs, run, window.where, len(rows))
    return run.phase(drafted, run, view, draft_forward(run, rows, commits, view, window))


def propose_on_everything(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """The same in a forward over the blocks of ``rows`` and everything before them."""
    canvas, cursor = run.canvas, run.cursor
    ends = [cursor.blocks[i].start + cursor.block_length for i in rows]
    window = run.cache.window(max(ends), rows)
    index = window.where.rows
    ids, block = canvas.tokens[index, : window.tokens], cursor.block(index)
    positions = torch.arange(window.tokens, device=ids.device).expand_as(ids)
    inputs = Inputs(ids, positions, prefix_mask(run, ends), logits_at=cursor.positions(index))
    logits = run.forward("draft", rows, inputs, window)
    return run.phase(drafted, run, View(index, block, block == canvas.mask_id), logits)


def draft_inputs(run: Run, where: Where, count: int) -> View:
    """The blocks of the ``count`` first entries, and of the commits that go along, as one forward's inputs."""
    options, length, index, commits = run.cache_options, run.cursor.block_length, where.rows[:count], where.rows[count:]
    block = run.cursor.block(index)
    masked = block == run.canvas.mask_id
    known, mask = torch.zeros_like(index), None
    if options.draft_ver:
        known = torch.where(masked.any(-1), masked.int().argmax(-1), length)
        mask = masks.causal_until(known, length)
    if len(commits) and (options.draft_ver or options.cache_ver):
        final = torch.full_like(commits, length if options.cache_ver else 0)
        mask = masks.causal_until(torch.cat([known, final]), length)
    staged = run.stage(Inputs(*with_commits(run, where, block), mask, logit_rows=count), where)
    return View(index, block, masked, staged)


def drafted(run: Run, view: View, logits: Tensor) -> tuple[Draft, Tensor | None]:
    """A token and its confidence at every position, known tokens edited, and what the policy wants verified (`shared.decode.spans.wanted_spans`).

    The block of the draft is the edited one: what is verified, filled and written next builds on it.
    """
    draft = draft_of(run, view, logits)
    better = draft.confidence > run.options.editing.editing_threshold
    draft = replace(draft, block=run.cursor.edit(view.index, view.block, view.masked, draft.tokens, better))
    return draft, wanted_spans(run.policy, draft, whole=run.whole_verify)


def route(run: Run, rows: list[int], wanted: Tensor | None) -> VerifyPlan:
    """Which of the rows that have something masked to verify, and how far."""
    return plan_spans(run, wanted, [k for k, i in enumerate(rows) if i not in run.cursor.in_post_step])


def decided(run: Run, draft: Draft, verified: Verified | None) -> Tensor:
    """What the step writes: the verified prefix, then what it still owes by confidence. Returns what `finish_step` reads."""
    choice, reach, finite = decide_verified(run, draft, verified, span_outcome)
    everyone = verified is not None and verified.index is None
    if not everyone or run.options.unmask.num_to_transfer > 1:  # a verified row has gained one already
        fill(run, draft, choice)
    return record(run, draft, choice, reach, finite)


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
    if finished.verified_to < run.cursor.block_length:
        return False
    if finished.row in run.cursor.after_post_step:
        return savings.reuse_draft and run.cache_options.draft_ver == causal
    return savings.reuse_verify and causal


def commit_mask(run: Run, index: Tensor) -> Tensor | None:
    """How the tokens of a finished block see each other when it is committed (None: all of them)."""
    return masks.token_causal(run.cursor.block_length, index.device) if run.cache_options.cache_ver else None


def _lossless(options: NoCacheOptions) -> Lossless:
    blocks, editing = options.blocks, options.editing
    if isinstance(options, Options):
        own = {
            "editing replaces verified tokens (editing_threshold 1 does not)": editing.on,
            "num_to_transfer above 1 adds unverified tokens": options.unmask.num_to_transfer > 1,
        }
        return self_speculative_losslessness(options, own)
    if blocks.block_length == 1 and not blocks.as_bias and not (editing.on and editing.max_post_steps):
        return Lossless(True, "block size 1 is the reference, so it is exact by definition")
    return Lossless(False, "tokens of one step are taken independently of each other")


def generate(
    kind: type[NoCacheOptions], model, input_ids, options: NoCacheOptions | None, uniforms, flat: dict
) -> Output:
    """Behind every ``generate`` function of the family: split ``flat`` into call and options, check the latter, decode."""
    return decode(model, input_ids, *split_call(kind, options, {**flat, "uniforms": uniforms}))
