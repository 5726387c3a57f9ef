"""The LLaDA2 decode loop: threshold decoding that edits its own tokens, and S2D2, in which the same model at block size one verifies its drafts.

Each step drafts the current block of every row, replaces known tokens of it where the model is confident of others, may verify the first masked span, fills
what the step still owes by confidence, and commits blocks that are finished. ``cached`` is the same loop with a policy that never
verifies, ``nocache`` that one with nothing ever committed.
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
from shared import masks
from shared.batch import Finished, by_tokens
from shared.calls import check_call, check_prompts, split_call
from shared.diagnose import first_broken_layer
from shared.draft import Choice, Draft, How
from shared.engine import Engine
from shared.options import Acceptance, Cache
from shared.output import Completion, Lossless, Output
from shared.prompts import as_prompts
from shared.routing import Never, Policy, make_policy
from shared.sampling import GREEDY_BELOW, sample
from shared.spans import Picked, pick, span_inputs
from shared.stop_strings import StopStrings
from shared.uniforms import Uniforms
from shared.unmask import above_threshold
from shared.verify import Verdict, judge, losslessness, take_confident, verified_choice

PREFILL_TOKENS = 4096  # encoded in one forward: enough for the matrix rate, little enough to spare memory


@dataclass
class Run:
    """One decode in progress: the model, its options (resolved), and what the rows share."""

    model: LLaDA2MoeModelLM
    options: NoCacheOptions
    batch: Rows
    engine: Engine
    policy: Policy
    judge: Callable[..., Verdict]
    prefill_seconds: float = 0.0

    @property
    def cached(self) -> bool:
        return isinstance(self.options, StandardOptions)

    @property
    def speculative(self) -> bool:
        return isinstance(self.options, Options)

    @property
    def cache_options(self) -> Cache:
        return getattr(self.options, "cache", Cache())

    @property
    def acceptance(self) -> Acceptance:
        return getattr(self.options, "acceptance", Acceptance())

    def forward(
        self,
        kind: str,
        rows: Sequence[int],
        ids: Tensor,
        positions: Tensor,
        mask,
        *,
        logits_at=None,
        ahead=None,
        leading=None,
    ) -> Tensor:
        """One pass over ``ids [b, T]`` of ``rows``; logits with the mask token ruled out unless the options allow it.

        Entries of ``ids`` past the first ``leading`` ones are commits that ride along: they get no logits and are not counted.
        """
        self.batch.count(kind, rows[:leading], ids.numel())
        window = self.engine.cache.window(ids.shape[1], rows, ahead=ahead)
        backend = self.model.backend
        if mask is not None and mask.is_floating_point():
            self.model.backend = "reference"  # the one that adds masks
        try:
            logits = self.engine.forward(ids, positions, window, mask, leading=leading, logits_at=logits_at)
        finally:
            self.model.backend = backend
        if self.options.sampling.suppress_mask:
            logits[..., self.batch.mask_id] = float("-inf")
        return logits


@torch.inference_mode()
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
    judge: Callable[..., Verdict] = judge,
) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    ``attention_mask`` marks padding in a ``[B, P]`` tensor. ``batch_size`` rows are in flight at a time (default: all); waiting prompts
    join as rows finish. ``stop``: a text ends with the block in which one of these strings appears, and is cut before it (needs ``tokenizer``).
    Randomness comes from ``(seed, number of the prompt)``, or from ``uniforms``, one recorded list per prompt; ``requests`` numbers the prompts
    otherwise than 0, 1, 2, ... ``on_block(request, new_ids)`` is called as blocks finish, ``on_finish(completion)`` as texts do.
    ``judge`` replaces `shared.verify.judge`. Raises `UserError` before any forward when a prompt or an option does not fit.
    """
    began = time.perf_counter()
    prompts = as_prompts(input_ids, attention_mask)
    options = resolve(model, options, tokenizer)
    check_prompts(prompts, options.blocks, model.config)
    check_call(len(prompts), requests, uniforms, batch_size)
    run = start(model, prompts, options, requests, min(batch_size or len(prompts), len(prompts)), uniforms, seed, judge)
    text_of = None if tokenizer is None else lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    stops = StopStrings(stop, text_of, run.batch)
    done: dict[int, Completion] = {}
    while prefill(run) or run.batch.active:
        rows = run.batch.active
        draft = propose(run, rows)
        picked = route(run, rows, draft)
        choice, reach, finite = verify(run, rows, draft, picked)
        fill(run, rows, draft, choice, picked)
        run.policy.observe(draft, reach > 0, choice.count)
        finished = stops.end(write(run, rows, draft, choice, reach, finite))
        if on_block:
            for f in finished:
                on_block(run.batch.rows[f.row].request, run.batch.new_tokens(f.row, options.blocks.max_new_tokens))
        commit(run, finished)
        for f in finished:
            if f.last:
                position = run.batch.rows[f.row].position
                done[position] = completion = stops.cut(run.batch.retire(f.row, options.blocks, text_of))
                if on_finish:
                    on_finish(completion)
    return Output(
        [done[k] for k in sorted(done)],
        time.perf_counter() - began,
        dict(run.batch.forwards),
        *_lossless(run.options),
        prefill_seconds=run.prefill_seconds,
        batch_tokens=dict(run.batch.forward_tokens),
    )


def start(model, prompts, options: NoCacheOptions, requests, rows: int, uniforms, seed: int, judge) -> Run:
    """Allocate the batch, the cache and the policy's state for ``rows`` rows."""
    blocks, editing, device = options.blocks, options.editing, model.device
    length = blocks.block_length
    per_block = length * (length + editing.max_post_steps) if options.sampling.temperature >= GREEDY_BELOW else 0
    per_block += length * (length + 3) // 2 if isinstance(options, Options) else 0
    most = max(per_block * (blocks.max_new_tokens // length + 2), 1)
    numbers = most if uniforms is None else max(map(len, uniforms), default=1)
    batch = Rows(
        prompts,
        blocks,
        editing,
        requests=requests,
        rows=rows,
        device=device,
        uniforms=Uniforms(rows, numbers, seed=seed, device=device, recorded=uniforms),
    )
    policy = Never()
    if isinstance(options, Options):
        policy = make_policy(
            options.routing, options.bandit, options.estimation, options.unmask, rows=rows, device=device
        )
    engine = Engine.of(model, rows, batch.capacity + length, length, options.runtime)
    return Run(model, options, batch, engine, policy, judge)


def resolve(model: LLaDA2MoeModelLM, options: NoCacheOptions, tokenizer=None) -> NoCacheOptions:
    """The options with every default that depends on the checkpoint filled in."""
    blocks, runtime = options.blocks, options.runtime
    length = blocks.block_length or model.config.block_size
    mask_id, stop_ids = model.special_ids(blocks.mask_id, blocks.stopping_criteria_idx, tokenizer)
    blocks = replace(blocks, block_length=length, mask_id=mask_id, stopping_criteria_idx=stop_ids)
    return replace(options, blocks=blocks, runtime=replace(runtime, fast=False) if blocks.as_bias else runtime)


def prefill(run: Run) -> bool:
    """Admit waiting prompts and encode their whole blocks. True if any came."""
    batch = run.batch
    rows = batch.admit()
    run.engine.cache.reset(rows)
    run.policy.reset(rows)
    began = time.perf_counter()
    if run.cached:
        for group in by_tokens({i: batch.rows[i].start for i in rows if batch.rows[i].start}, PREFILL_TOKENS):
            encode_prompts(run, group)
    if rows and run.engine.cache.length.is_cuda:
        torch.cuda.synchronize(run.engine.cache.length.device)
    run.prefill_seconds += time.perf_counter() - began
    return bool(rows)


def encode_prompts(run: Run, rows: list[int]) -> None:
    """One forward over the whole blocks of the prompts of ``rows``, all of which have some."""
    starts = [run.batch.rows[i].start for i in rows]
    ids = run.batch.tokens[run.batch.index(rows), : max(starts)]
    positions = torch.arange(max(starts), device=ids.device).expand_as(ids)
    # Shorter rows are padded with what follows their prompt: later tokens, which earlier ones never see.
    run.forward("prefill", rows, ids, positions, prefix_mask(run, starts), logits_at=slice(0, 0))
    run.engine.cache.commit(starts, rows)


def prefix_mask(run: Run, ends: list[int]) -> Tensor:
    """How the first ``ends [b]`` tokens of some rows see each other, ``[T, T]`` for the longest, or what is added to their scores, ``[b, T, T]``."""
    tokens, device = max(ends), run.engine.cache.length.device
    if run.cache_options.cache_ver:
        return masks.token_causal(tokens, device)
    mask = masks.block_causal(tokens, run.batch.block_length, device)
    if not run.options.blocks.as_bias:
        return mask
    # A 0 where the mask is False hides nothing, so the padding of shorter rows has to be hidden here.
    padding = torch.arange(tokens, device=device) >= run.batch.index(ends)[:, None]
    return mask.float().expand(len(ends), -1, -1).masked_fill(padding[:, None, :], float("-inf"))


def propose(run: Run, rows: list[int]) -> Draft:
    """Denoise the current block of ``rows`` once, take a token and its confidence at every position, and edit known tokens.

    The block of the draft is the edited one: what is verified, filled and written next builds on it.
    """
    batch, sampling, editing = run.batch, run.options.sampling, run.options.editing
    index = batch.index(rows)
    block = batch.block(index)
    masked = block == batch.mask_id
    logits = (draft_cached if run.cached else draft_whole)(run, rows, block, masked)
    uniform = None
    if sampling.temperature >= GREEDY_BELOW:
        uniform = batch.uniforms.take(index, batch.block_length, batch.block_length)
    tokens, confidence = sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
    block = batch.edit(index, block, masked, tokens, confidence > editing.editing_threshold)
    entry = torch.arange(len(rows), device=index.device)
    return Draft(index, block, masked, tokens, confidence, logits, entry, batch.decoded[index], sampling)


def draft_cached(run: Run, rows: list[int], block: Tensor, masked: Tensor) -> Tensor:
    """Logits ``[b, L, V]`` of the current blocks on their cached prefixes.

    Finished blocks that still have to be committed ride along as further entries of the same forward: in each layer their keys are in the
    cache before the drafts look.
    """
    batch, length, mask = run.batch, run.batch.block_length, None
    ids, positions = block, batch.positions(batch.index(rows))
    known = torch.zeros_like(batch.index(rows))
    if run.cache_options.draft_ver:
        known = torch.where(masked.any(-1), masked.int().argmax(-1), length)
        mask = masks.causal_until(known, length)
    riders = [i for i in rows if batch.rows[i].uncommitted]
    ahead = [length if batch.rows[i].uncommitted else 0 for i in rows] + [0] * len(riders)
    if riders:
        ride = batch.index(riders)
        ids = torch.cat([ids, batch.block(ride, back=length)])
        positions = torch.cat([positions, batch.positions(ride, back=length)])
        if run.cache_options.draft_ver or run.cache_options.cache_ver:
            causal = length if run.cache_options.cache_ver else 0
            mask = masks.causal_until(torch.cat([known, torch.full_like(ride, causal)]), length)
    logits = run.forward("draft", rows + riders, ids, positions, mask, ahead=ahead, leading=len(rows))
    run.engine.cache.commit([length] * len(riders), riders)
    for i in riders:
        batch.rows[i].uncommitted = False
    return logits


def draft_whole(run: Run, rows: list[int], block: Tensor, masked: Tensor) -> Tensor:
    """The same from a forward over everything up to the blocks' ends."""
    batch = run.batch
    ends = [batch.rows[i].start + batch.block_length for i in rows]
    index = batch.index(rows)
    ids = batch.tokens[index, : max(ends)]
    positions = torch.arange(max(ends), device=index.device).expand_as(ids)
    return run.forward("draft", rows, ids, positions, prefix_mask(run, ends), logits_at=batch.positions(index))


def route(run: Run, rows: list[int], draft: Draft) -> Picked:
    """Which of the rows that have something masked to verify, and how far."""
    candidates = [k for k, i in enumerate(rows) if i not in run.batch.resting]
    everywhere = run.acceptance.ssd_ratio_threshold >= 0 and run.acceptance.ssd_threshold_all_spans
    whole = everywhere or not (run.speculative and run.options.savings.short_verify)
    return pick(run.policy, draft, run.engine, candidates, whole=whole)


def verify(run: Run, rows: list[int], draft: Draft, picked: Picked) -> tuple[Choice, Tensor, Tensor]:
    """Verify the first masked span of the picked rows in one forward over [drafted block | mask queries] (S2D2, the "2L trick").

    Returns the choice so far, ``reach [b]``: how many tokens of each row's drafted block are now encoded causally in the cache slots past
    its length (0: row not verified), and ``finite [b]``: were the verifier's logits numbers?
    """
    choice, reach = Choice.none(draft), torch.zeros_like(draft.rows)
    finite = torch.ones_like(draft.rows, dtype=torch.bool)
    if picked.index:
        batch, options = run.batch, run.options
        index = batch.index(picked.index)
        part = draft if len(picked.index) == len(rows) else draft.select(index)
        asked = span_inputs(part, picked, batch.start[part.rows], batch.mask_id)
        at = slice(picked.tokens, None)
        these = [rows[k] for k in picked.index]
        logits = run.forward("verify", these, asked.ids, asked.positions, asked.mask, logits_at=at)
        verdict = run.judge(part, logits, asked.queries, options.acceptance, options.sampling, batch.uniforms)
        finite[index] = verdict.finite
        choice.put(index, verified_choice(part, verdict, options.acceptance))
        end = part.first_masked + part.span.sum(-1)
        reach[index] = end if options.savings.short_verify else batch.block_length
    if run.acceptance.always_check_high_confidence:
        take_confident(choice, draft, run.options.unmask)
    return choice, reach, finite


def fill(run: Run, rows: list[int], draft: Draft, choice: Choice, picked: Picked) -> None:
    """Fill what the step still owes: every draft above the threshold, or the surest ones where those are too few."""
    unmask = run.options.unmask
    verified = len(picked.index) + len(run.batch.resting.intersection(rows)) == len(rows)
    if verified and unmask.num_to_transfer == 1:  # a verified row has gained one already
        return
    due = (draft.masked.sum(-1).clamp(max=unmask.num_to_transfer) - choice.count).clamp(min=0)
    eligible = draft.masked & ~choice.take & (due > 0)[:, None]
    take, _ = above_threshold(
        draft.confidence, eligible, torch.minimum(due, eligible.sum(-1)), unmask.confidence_threshold
    )
    place = torch.arange(eligible.shape[1], device=eligible.device).expand_as(eligible)
    choice.add(take, draft.tokens, How.UNMASKED, place)


def write(run: Run, rows: list[int], draft: Draft, choice: Choice, reach: Tensor, finite: Tensor) -> list[Finished]:
    """`Batch.write`; if the logits were not finite, say in which layer that began."""
    try:
        return run.batch.write(rows, draft, choice, reach, finite)
    except FloatingPointError as error:
        ids = torch.cat([draft.block, torch.full_like(draft.block, run.batch.mask_id)], 1)
        positions = run.batch.positions(draft.rows).repeat(1, 2)
        window = run.engine.cache.window(ids.shape[1], rows)
        mask = masks.two_copy_verify(run.batch.block_length, ids.device)
        layer = first_broken_layer(run.model.model.layers, lambda: run.model(ids, positions, window, mask))
        raise FloatingPointError(f"{error}, first in {layer}") from None


def is_encoded(run: Run, finished: Finished) -> bool:
    """Are the keys a commit would compute in the cache already, written by the verify or the draft of this step?"""
    savings, causal = run.options.savings, run.cache_options.cache_ver
    if finished.verified_to < run.batch.block_length:
        return False
    if finished.row in run.batch.rested:
        return savings.reuse_draft and run.cache_options.draft_ver == causal
    return savings.reuse_verify and causal


def commit(run: Run, finished: list[Finished]) -> None:
    """Keep the keys and values of finished blocks: those a forward of this step computed from the final tokens, else by a forward of the final
    tokens, now or together with the next draft. Then move the rows on."""
    batch, length = run.batch, run.batch.block_length
    if run.cached and finished:
        savings = run.options.savings
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
            mask = masks.token_causal(length, index.device) if run.cache_options.cache_ver else None
            run.forward("commit", now, batch.block(index), batch.positions(index), mask, logits_at=slice(0, 0))
        run.engine.cache.commit([length] * len(encoded + now), encoded + now)
    batch.advance([f.row for f in finished if not f.last])


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
