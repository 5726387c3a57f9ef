"""The SDAR decode loop: plain block diffusion, and S2D2, in which the same model at block size one verifies its own drafts.

Each step drafts the current block of every row, may verify the first masked span, fills the step's quota by the unmasking rule, and
commits blocks that are finished. Plain decoding is the same loop with a policy that never verifies.

What a step computes between its forwards stands in functions of device tensors: `draft_inputs`, `drafted`, `shared.decode.run.verify_inputs` and `decided`. They read
nothing back, so that on a GPU each is one CUDA graph (`shared.gpu.phases`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdar.modeling_sdar import SDARForCausalLM
from sdar.options import Options, StandardOptions
from shared.decode import run as shared_run
from shared.decode.batch import Batch, Finished, whole_blocks
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
from shared.decode.spans import pick, wishes
from shared.decode.stop_strings import StopStrings
from shared.gpu.engine import Engine, Inputs
from shared.network import masks
from shared.output import Completion, Lossless, Output
from shared.policy.accept import Verdict, accept_span, losslessness
from shared.policy.draft import Choice, Draft
from shared.policy.sampling import GREEDY_BELOW
from shared.policy.unmask import unmask
from shared.scripts.prompts import as_prompts
from shared.trace import How


@dataclass
class Run(shared_run.Run):
    """One decode of this family in progress."""

    causal_mask: Tensor | None = None  # [L, L]
    causal_rows: Tensor | None = None  # [rows]: first masked position of each row's last draft (draft_ver)


@inference
def decode(
    model: SDARForCausalLM,
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
    join as rows finish. ``stop``: a text ends with the block in which one of these strings appears, and is cut before it (needs ``tokenizer``). Randomness comes from ``(seed, number of the prompt)``, or from ``uniforms``, one recorded list per prompt;
    ``requests`` numbers the prompts otherwise than 0, 1, 2, ... ``on_block(request, new_ids)`` is called as blocks finish,
    ``on_finish(completion)`` as texts do. ``accept_rule`` replaces `shared.policy.accept.accept_span`: acceptance by a script, for benchmarks on weights that
    mean nothing. Raises `UserError` before any forward when a prompt or an option does not fit.
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
        picked = pick(run.policy, wish, run.engine, range(len(rows)), whole=run.whole_verify)
        verified = verify_spans(run, rows, draft, picked)
        finished = stops.end(finish_step(run, rows, draft, verified, decided))
        if on_block:
            limit = run.batch.capacity if options.blocks.round_to_blocks else options.blocks.max_new_tokens
            for f in finished:
                on_block(run.batch.rows[f.row].request, run.batch.new_tokens(f.row, limit))
        commit(run, finished, is_encoded, commit_mask)
        emit(run, [f.row for f in finished if f.last], stops, done, options.blocks, on_finish)
    return output_of(run, done, began, _lossless(run.options))


def start(model, prompts, options: StandardOptions, requests, rows: int, uniforms, seed: int, accept_rule) -> Run:
    """Allocate the batch, the cache and the policy's state for ``rows`` rows, as large as an engine that may be there already."""
    blocks, length, device = options.blocks, options.blocks.block_length, model.device
    capacity = whole_blocks(max(map(len, prompts)) + blocks.max_new_tokens, length)
    engine = Engine.of(model, rows, capacity + length, length, options.runtime)
    allocated, slots = len(engine.cache.lengths), engine.cache.slots
    per_block = length * (length + 1) if options.sampling.temperature >= GREEDY_BELOW else 0
    per_block += length * (length + 3) // 2 if isinstance(options, Options) else 0
    source = source_of(engine, per_block, (length, blocks.max_new_tokens), uniforms, seed)
    batch = Batch(
        prompts,
        requests=requests,
        rows=rows,
        block_length=length,
        steps=blocks.denoising_steps,
        max_new_tokens=blocks.max_new_tokens,
        mask_id=blocks.mask_id,
        stop_ids=blocks.stopping_criteria_idx,
        device=device,
        uniforms=source,
        room=(allocated, slots),
    )
    policy = policy_of(options, allocated, device)
    causal_rows = torch.zeros(allocated, dtype=torch.long, device=device)
    causal_mask = masks.token_causal(length, device)
    run = Run(model, options, batch, engine, policy, accept_rule, causal_mask=causal_mask, causal_rows=causal_rows)
    constants = (replace(options, blocks=replace(blocks, max_new_tokens=1)), accept_rule)
    run.phase = engine.phases_for(constants, [run, batch, source, policy])
    return run


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
    batch, length, device = run.batch, run.batch.block_length, run.cache.length.device
    starts = [batch.rows[i].start for i in rows]
    tokens = max(starts)
    causal = run.cache_options.cache_ver
    mask = masks.token_causal(tokens, device) if causal else masks.block_causal(tokens, length, device)
    ids = batch.tokens[batch.index(rows), :tokens]
    positions = torch.arange(tokens, device=device).expand_as(ids)
    # Shorter rows are padded with what follows their prompt: later tokens, which earlier ones never see.
    run.forward("prefill", rows, Inputs(ids, positions, batch.index(rows), mask, logits_at=slice(0, 0)), tokens)
    run.cache.commit(starts, rows)


def propose(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """Denoise the current block of ``rows`` once: a draft, and what the policy wishes to verify of it (see `drafted`).

    Finished blocks that still have to be committed ride along as further entries of the same forward: in each layer their keys are in the
    cache before the drafts look.
    """
    batch, length = run.batch, run.batch.block_length
    commit_rows = [i for i in rows if batch.rows[i].uncommitted]
    ahead = [length if batch.rows[i].uncommitted else 0 for i in rows] + [0] * len(commit_rows) if commit_rows else None
    ride, reach = (run.cache.indices(commit_rows), run.cache.indices(ahead)) if commit_rows else (None, None)
    view = run.phase(draft_inputs, run, batch.index(rows), ride, reach)
    logits = run.forward("draft", rows + commit_rows, view.staged, length, ahead=ahead)
    for i in commit_rows:
        batch.rows[i].uncommitted = False
    run.cache.commit([length] * len(commit_rows), commit_rows)
    return run.phase(drafted, run, view, logits)


def draft_inputs(run: Run, index: Tensor, ride: Tensor | None, ahead: Tensor | None) -> View:
    """The blocks of rows ``index [b]``, and of the commits that ``ride [r]`` along, as one forward's inputs; ``ahead [b + r]``."""
    batch, options, length = run.batch, run.cache_options, run.batch.block_length
    block, positions = batch.block(index), batch.positions(index)
    masked = block == batch.mask_id
    first_masked = masked.int().argmax(-1) if options.draft_ver else torch.zeros_like(index)
    ids, entries, mask = block, index, masks.causal_until(first_masked, length) if options.draft_ver else None
    if ride is not None:
        entries = torch.cat([index, ride])
        ids = torch.cat([ids, batch.block(ride, back=length)])
        positions = torch.cat([positions, batch.positions(ride, back=length)])
        if options.draft_ver or options.cache_ver:
            mask = torch.cat([masks.causal_until(first_masked, length), commit_mask(run, ride)])
    run.causal_rows[index] = first_masked
    staged = run.engine.stage(Inputs(ids, positions, entries, mask, ahead, logit_rows=len(index)))
    return View(index, block, masked, staged)


def drafted(run: Run, view: View, logits: Tensor) -> tuple[Draft, Tensor | None]:
    """A token and its confidence at every position, and what the policy wishes to verify (`shared.decode.spans.wishes`)."""
    draft = draft_of(run, view, logits)
    return draft, wishes(run.policy, draft, whole=run.whole_verify)


def decided(run: Run, draft: Draft, verified: Verified | None) -> Tensor:
    """What the step writes: the verified prefix, then the rest of its quota by the unmasking rule. Returns what `Batch.finish_step` reads."""
    choice, reach, finite = judged(run, draft, verified, span_verdict)
    everyone = verified is not None and verified.index is None
    if not everyone or not run.batch.one_token_is_enough:  # a verified row has gained one already
        fill_quota(run, draft, choice)
    run.policy.observe(draft, reach > 0, choice.count)
    return run.batch.record(draft, choice, reach, finite)


def fill_quota(run: Run, draft: Draft, choice: Choice) -> None:
    """Top the step up to its quota by the unmasking rule, where verification has not reached it already."""
    quota, overtime = run.batch.quota(draft.rows)
    remaining = (torch.minimum(quota, draft.masked.sum(-1)) - choice.count).clamp(min=0)
    eligible = draft.masked & ~choice.take
    take, key = unmask(
        draft, eligible, remaining, run.options.unmask, overtime=overtime, cap=isinstance(run.options, Options)
    )
    choice.add(take, draft.tokens, How.UNMASKED, key)


def is_encoded(run: Run, finished: Finished) -> bool:
    """Are the keys a commit would compute in the cache already, written by this step's verify?"""
    reuse = run.options.savings.reuse_verify and run.cache_options.cache_ver
    return reuse and finished.verified_to == run.batch.block_length


def commit_mask(run: Run, index: Tensor) -> Tensor | None:
    """``[b, L, L]``: how the tokens of a finished block see each other when it is committed (None: all of them)."""
    length = run.batch.block_length
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
        return losslessness(options, own)
    if blocks.block_length == 1:
        return Lossless(True, "block size one is the law itself")
    return Lossless(False, "plain block diffusion takes tokens of one step independently of each other")


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind both ``block_diffusion_generate``: split ``flat`` into call keywords and options, check the latter, decode."""
    options, keywords = split_call(kind, options, flat)
    return decode(model, input_ids, options, uniforms=uniforms, **keywords)
