"""The SDAR decode loop: plain block diffusion, and S2D2, in which the same model at block size one verifies its own drafts.

Each step drafts the current block of every row, may verify the first masked span, fills the step's quota by the unmasking rule, and
commits blocks that are finished. Plain decoding is the same loop with a policy that never verifies.

What a step computes between its forwards stands in functions of device tensors: `draft_inputs`, `drafted`, `shared.decode.steps.verify_inputs` and
`decided`. They read nothing back, so that on a GPU each is one CUDA graph (`shared.gpu.phases`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sdar.modeling_sdar import SDARForCausalLM
from sdar.options import Options, StandardOptions
from shared.decode import run as shared_run
from shared.decode.calls import Call, Job, checked, split_call
from shared.decode.cursor import BlockCursor, Finished, whole_blocks
from shared.decode.lanes import Lane
from shared.decode.run import block_canvas, inference, policy_of
from shared.decode.spans import two_copy_kinds, wanted_spans
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
from shared.policy.unmask import unmask
from shared.trace import How


@dataclass
class Run(shared_run.Run):
    """One decode of this family in progress."""

    STATE: ClassVar[tuple[str, ...]] = ("causal_mask", "causal_rows")

    causal_mask: Tensor | None = None  # [L, L]
    causal_rows: Tensor | None = None  # [rows]: first masked position of each row's last draft (draft_ver)


@inference
def decode(model: SDARForCausalLM, input_ids, options: StandardOptions, call: Call) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    Raises `UserError` before any forward when a prompt, an option or the call does not fit.
    """
    run = start(model, checked(model, input_ids, options, call, resolve))
    while prefill(run, encode_prompts) or run.canvas.active:
        rows = run.canvas.active
        draft, wanted = propose(run, rows)
        plan = plan_spans(run, wanted, range(len(rows)))
        verified = verify_spans(run, rows, draft, plan)
        finished = finish_step(run, rows, draft, verified, decided)
        commit(run, finished, is_encoded, commit_mask)
        emit(run, [f.row for f in finished if f.last])
    return run.output(_lossless(run.options))


def start(model: SDARForCausalLM, job: Job) -> Run:
    """Allocate canvas, cache and the policy's state, as large as an engine that may be there already."""
    options, blocks, length = job.options, job.options.blocks, job.options.blocks.block_length
    slots = whole_blocks(max(map(len, job.prompts)) + blocks.max_new_tokens, length) + length
    engine = Engine.of(model, job.rows, slots, forward_kinds(options), options.runtime)
    per_block = length * (length + 1) if options.sampling.temperature >= GREEDY_BELOW else 0
    per_block += length * (length + 3) // 2 if isinstance(options, Options) else 0
    canvas = block_canvas(job, engine, block_length=length, steps=blocks.denoising_steps, per_block=per_block)
    cursor = BlockCursor(
        canvas,
        block_length=length,
        steps=blocks.denoising_steps,
        round_to_blocks=blocks.round_to_blocks,
        trim_stop_tokens=blocks.trim_stop_tokens,
    )
    policy = policy_of(options, len(canvas.tokens), model.device)
    run = Run(job, canvas, cursor, {"model": Lane("model", engine, canvas)}, policy)
    run.causal_mask, run.causal_rows = masks.token_causal(length, model.device), torch.zeros_like(cursor.start)
    run.run_phases_with(canvas, cursor, canvas.uniforms, policy)
    return run


def forward_kinds(options: StandardOptions) -> list[Shape]:
    """The forwards of one row that are worth a graph."""
    return two_copy_kinds(options.blocks.block_length)


def resolve(model: SDARForCausalLM, options: StandardOptions, tokenizer=None) -> StandardOptions:
    """The options with every default that depends on the checkpoint filled in."""
    blocks = options.blocks
    length = blocks.block_length or model.config.block_size
    mask_id, stop_ids = model.special_ids(blocks.mask_id, blocks.stopping_criteria_idx, tokenizer)
    blocks = replace(
        blocks,
        block_length=length,
        denoising_steps=blocks.denoising_steps or length,
        mask_id=mask_id,
        stopping_criteria_idx=stop_ids,
    )
    return replace(options, blocks=blocks)


def encode_prompts(run: Run, rows: list[int]) -> None:
    """One forward over the whole blocks of the prompts of ``rows``, all of which have some."""
    starts = [run.cursor.prefilled(i) for i in rows]
    window = run.cache.window(max(starts), rows)
    length, device = run.cursor.block_length, run.canvas.tokens.device
    causal = run.cache_options.cache_ver
    mask = masks.token_causal(window.tokens, device) if causal else masks.block_causal(window.tokens, length, device)
    ids = run.canvas.tokens[window.where.rows, : window.tokens]
    positions = torch.arange(window.tokens, device=device).expand_as(ids)
    # Shorter rows are padded with what follows their prompt: later tokens, which earlier ones never see.
    run.forward("prefill", rows, Inputs(ids, positions, mask, logits_at=slice(0, 0)), window)
    run.cache.commit(starts, rows)


def propose(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """Denoise the current block of ``rows`` once: a draft, and what the policy wants verified of it (see `drafted`)."""
    commits, window = draft_window(run, rows)
    view = run.phase(draft_inputs, run, window.where, len(rows))
    return run.phase(drafted, run, view, draft_forward(run, rows, commits, view, window))


def draft_inputs(run: Run, where: Where, count: int) -> View:
    """The blocks of the ``count`` first entries, and of the commits that go along, as one forward's inputs."""
    options, length, index, commits = run.cache_options, run.cursor.block_length, where.rows[:count], where.rows[count:]
    block = run.cursor.block(index)
    masked = block == run.canvas.mask_id
    first_masked = masked.int().argmax(-1) if options.draft_ver else torch.zeros_like(index)
    mask = masks.causal_until(first_masked, length) if options.draft_ver else None
    if len(commits) and (options.draft_ver or options.cache_ver):
        mask = torch.cat([masks.causal_until(first_masked, length), commit_mask(run, commits)])
    run.causal_rows[index] = first_masked
    staged = run.stage(Inputs(*with_commits(run, where, block), mask, logit_rows=count), where)
    return View(index, block, masked, staged)


def drafted(run: Run, view: View, logits: Tensor) -> tuple[Draft, Tensor | None]:
    """A token and its confidence at every position, and what the policy wants verified (`shared.decode.spans.wanted_spans`)."""
    draft = draft_of(run, view, logits)
    return draft, wanted_spans(run.policy, draft, whole=run.whole_verify)


def decided(run: Run, draft: Draft, verified: Verified | None) -> Tensor:
    """What the step writes: the verified prefix, then the rest of its quota by the unmasking rule. Returns what `finish_step` reads."""
    choice, reach, finite = decide_verified(run, draft, verified, span_outcome)
    everyone = verified is not None and verified.index is None
    if not everyone or not run.cursor.one_token_is_enough:  # a verified row has gained one already
        fill_quota(run, draft, choice)
    return record(run, draft, choice, reach, finite)


def fill_quota(run: Run, draft: Draft, choice: Choice) -> None:
    """Top the step up to its quota by the unmasking rule, where verification has not reached it already."""
    quota, overtime = run.cursor.quota(draft.rows)
    remaining = (torch.minimum(quota, draft.masked.sum(-1)) - choice.count).clamp(min=0)
    eligible = draft.masked & ~choice.take
    take, key = unmask(
        draft, eligible, remaining, run.options.unmask, overtime=overtime, cap=isinstance(run.options, Options)
    )
    choice.add(take, draft.tokens, How.UNMASKED, key)


def is_encoded(run: Run, finished: Finished) -> bool:
    """Are the keys a commit would compute in the cache already, written by this step's verify?"""
    reuse = run.options.savings.reuse_verify and run.cache_options.cache_ver
    return reuse and finished.verified_to == run.cursor.block_length


def commit_mask(run: Run, index: Tensor) -> Tensor | None:
    """``[b, L, L]``: how the tokens of a finished block see each other when it is committed (None: all of them)."""
    length = run.cursor.block_length
    if run.cache_options.cache_ver:
        return run.causal_mask.expand(len(index), length, length)
    # The published draft_ver leaves the rows it made causal as they are, so the commit of a block inherits them.
    return masks.causal_until(run.causal_rows[index], length) if run.cache_options.draft_ver else None


def _lossless(options: StandardOptions) -> Lossless:
    blocks = options.blocks
    if isinstance(options, Options):
        own = {
            "round_to_blocks returns tokens past max_new_tokens": blocks.round_to_blocks and blocks.block_length > 1,
            "trim_stop_tokens is off, so the tokens of a block after its stop are returned": (
                not blocks.trim_stop_tokens and blocks.block_length > 1
            ),
        }
        return self_speculative_losslessness(options, own)
    if blocks.block_length == 1:
        return Lossless(True, "block size 1 is the reference, so it is exact by definition")
    return Lossless(False, "plain block diffusion takes tokens of one step independently of each other")


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind both ``block_diffusion_generate``: split ``flat`` into call and options, check the latter, decode."""
    return decode(model, input_ids, *split_call(kind, options, {**flat, "uniforms": uniforms}))
