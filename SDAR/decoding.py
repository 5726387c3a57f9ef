"""The SDAR decode loop: plain block diffusion, and S2D2, in which the same model at block size one verifies its own drafts.

Each step drafts the current block of every row, may verify the first masked span, fills the step's quota by the unmasking rule, and
commits blocks that are finished. Plain decoding is the same loop with a policy that never verifies.

What a step computes between its forwards stands in four functions of device tensors: `draft_inputs`, `drafted`, `verify_inputs` and `decided`. They read
nothing back, so that on a GPU each is one CUDA graph (`shared.phases`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdar.modeling_sdar import SDARForCausalLM
from sdar.options import Options, StandardOptions
from shared import masks
from shared.batch import Batch, Finished, whole_blocks
from shared.calls import check_call, check_prompts, split_call
from shared.diagnose import first_broken_layer
from shared.draft import Choice, Draft, How
from shared.engine import Engine, Inputs, Staged
from shared.kv_cache import BlockCache
from shared.options import Acceptance, Cache
from shared.output import Completion, Lossless, Output
from shared.phases import call
from shared.prompts import as_prompts
from shared.routing import Never, Policy, make_policy
from shared.sampling import GREEDY_BELOW, sample
from shared.stop_strings import StopStrings
from shared.uniforms import Uniforms
from shared.unmask import unmask
from shared.verify import Verdict, judge, losslessness, take_confident, verified_choice

PREFILL_TOKENS = 4096  # encoded in one forward: enough for the matrix rate, little enough to spare memory


@dataclass
class Run:
    """One decode in progress: the model, its options (resolved), and what the rows share."""

    model: SDARForCausalLM
    options: StandardOptions
    batch: Batch
    engine: Engine
    policy: Policy
    judge: Callable[..., Verdict]
    causal_mask: Tensor  # [L, L]
    causal_rows: Tensor  # [rows]: first masked position of each row's last draft (draft_ver)
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

    def forward(self, kind: str, rows: Sequence[int], staged: Inputs | Staged, tokens: int, ahead=None) -> Tensor:
        """One pass over ``tokens`` tokens an entry, which belong to ``rows``. The mask token is ruled out by `rule_out`."""
        self.batch.count(kind, set(rows))
        return self.engine.run(staged, self.cache.window(tokens, rows, ahead=ahead))

    def rule_out(self, logits: Tensor) -> Tensor:
        """The logits without the mask token, unless the options allow it."""
        if self.options.sampling.suppress_mask:
            logits[..., self.batch.mask_id] = float("-inf")
        return logits


@torch.inference_mode()
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
    judge: Callable[..., Verdict] = judge,
) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    ``attention_mask`` marks padding in a ``[B, P]`` tensor. ``batch_size`` rows are in flight at a time (default: all); waiting prompts
    join as rows finish. ``stop``: a text ends with the block in which one of these strings appears, and is cut before it (needs ``tokenizer``). Randomness comes from ``(seed, number of the prompt)``, or from ``uniforms``, one recorded list per prompt;
    ``requests`` numbers the prompts otherwise than 0, 1, 2, ... ``on_block(request, new_ids)`` is called as blocks finish,
    ``on_finish(completion)`` as texts do. ``judge`` replaces `shared.verify.judge`: acceptance by a script, for benchmarks on weights that
    mean nothing. Raises `UserError` before any forward when a prompt or an option does not fit.
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
        draft, wish = propose(run, rows)
        picked = route(run, rows, wish)
        verified = verify(run, rows, draft, picked)
        finished = stops.end(settle(run, rows, draft, verified))
        if on_block:
            limit = run.batch.capacity if options.blocks.round_to_blocks else options.blocks.max_new_tokens
            for f in finished:
                on_block(run.batch.rows[f.row].request, run.batch.new_tokens(f.row, limit))
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
    )


def start(model, prompts, options: StandardOptions, requests, rows: int, uniforms, seed: int, judge) -> Run:
    """Allocate the batch, the cache and the policy's state for ``rows`` rows, as large as an engine that may be there already."""
    blocks, length, device = options.blocks, options.blocks.block_length, model.device
    capacity = whole_blocks(max(map(len, prompts)) + blocks.max_new_tokens, length)
    engine = Engine.of(model, rows, capacity + length, length, options.runtime)
    allocated, slots = len(engine.cache.lengths), engine.cache.slots
    per_block = length * (length + 1) if options.sampling.temperature >= GREEDY_BELOW else 0
    per_block += length * (length + 3) // 2 if isinstance(options, Options) else 0
    numbers = max(per_block * (blocks.max_new_tokens // length + 2), 1)
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
        uniforms=Uniforms(
            allocated,
            numbers if uniforms is None else max(map(len, uniforms), default=1),
            seed=seed,
            device=device,
            recorded=uniforms,
            room=per_block * (slots // length + 2),
        ),
        room=(allocated, slots),
    )
    policy = Never()
    if isinstance(options, Options):
        policy = make_policy(
            options.routing, options.bandit, options.estimation, options.unmask, rows=allocated, device=device
        )
    causal_rows = torch.zeros(allocated, dtype=torch.long, device=device)
    run = Run(model, options, batch, engine, policy, judge, masks.token_causal(length, device), causal_rows)
    constants = (replace(options, blocks=replace(blocks, max_new_tokens=1)), judge)
    run.phase = engine.phases_for(constants, [run, batch, batch.uniforms, policy])
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


def prefill(run: Run) -> bool:
    """Admit waiting prompts and encode their whole blocks. True if any came."""
    batch = run.batch
    rows = batch.admit()
    run.cache.reset(rows)
    run.policy.reset(rows)
    began = time.perf_counter()
    for group in by_tokens({i: batch.rows[i].start for i in rows if batch.rows[i].start}, PREFILL_TOKENS):
        encode_prompts(run, group)
    if rows and run.cache.length.is_cuda:
        torch.cuda.synchronize(run.cache.length.device)
    run.prefill_seconds += time.perf_counter() - began
    return bool(rows)


def by_tokens(lengths: dict[int, int], most: int) -> list[list[int]]:
    """The keys in groups of at most ``most`` tokens each, padding to the longest of the group counted in (a longer text is a group of its own)."""
    groups: list[list[int]] = []
    for row, length in lengths.items():
        if groups and (len(groups[-1]) + 1) * max(length, *(lengths[i] for i in groups[-1])) <= most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


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


@dataclass(frozen=True, slots=True)
class View:
    """The current block of some rows as a draft sees it: ``block, masked [b, L]``; ``index [b]`` are their rows."""

    index: Tensor
    block: Tensor
    masked: Tensor
    staged: Inputs | Staged


def propose(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """Denoise the current block of ``rows`` once: a draft, and what the policy wishes to verify of it (see `drafted`).

    Finished blocks that still have to be committed ride along as further entries of the same forward: in each layer their keys are in the
    cache before the drafts look.
    """
    batch, length = run.batch, run.batch.block_length
    riders = [i for i in rows if batch.rows[i].uncommitted]
    ahead = [length if batch.rows[i].uncommitted else 0 for i in rows] + [0] * len(riders) if riders else None
    ride, reach = (run.cache.indices(riders), run.cache.indices(ahead)) if riders else (None, None)
    view = run.phase(draft_inputs, run, batch.index(rows), ride, reach)
    logits = run.forward("draft", rows + riders, view.staged, length, ahead)
    for i in riders:
        batch.rows[i].uncommitted = False
    run.cache.commit([length] * len(riders), riders)
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
    staged = run.engine.stage(Inputs(ids, positions, entries, mask, ahead, leading=len(index)))
    return View(index, block, masked, staged)


def drafted(run: Run, view: View, logits: Tensor) -> tuple[Draft, Tensor | None]:
    """A token and its confidence at every position, and ``[b, 3]``: does the policy want the first masked span verified, where does that end, and
    how long is it? (None where nobody needs to read that.)"""
    batch, sampling, length = run.batch, run.options.sampling, run.batch.block_length
    logits, uniform = run.rule_out(logits), None
    if sampling.temperature >= GREEDY_BELOW:
        uniform = batch.uniforms.take(view.index, length, length)
    tokens, confidence = sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
    entry = torch.arange(len(view.index), device=tokens.device)
    decoded = batch.decoded[view.index]
    draft = Draft(view.index, view.block, view.masked, tokens, confidence, logits, entry, decoded, sampling)
    decision = run.policy.decide(draft)
    if run.policy.constant is False or (run.policy.constant and run.whole_verify):
        return draft, None
    span = draft.span_length
    return draft, torch.stack([decision.long(), draft.first_masked + span, span], 1)


@dataclass(frozen=True)
class Picked:
    """Rows of a draft to verify (indices into it), and how far: ``tokens`` of the block and ``queries`` mask tokens of the span."""

    index: list[int]
    tokens: int
    queries: int


def route(run: Run, rows: list[int], wish: Tensor | None) -> Picked:
    """Which rows are verified, and how much a verify of them all has to carry: one packed read, or none where every answer is known."""
    length = run.batch.block_length
    if wish is None:
        return Picked(list(range(len(rows))) if run.policy.constant else [], length, length)
    read = wish.tolist()
    index = [k for k, (verify, _, _) in enumerate(read) if verify]
    if run.whole_verify or not index:
        return Picked(index, length, length)
    tokens, queries = max(read[k][1] for k in index), max(read[k][2] for k in index)
    return Picked(index, run.engine.verify_tokens(tokens), run.engine.queries(queries))


@dataclass(frozen=True, slots=True)
class Verified:
    """Rows of a draft that were verified, ``index [v]`` (None: all of them), at the in-block positions ``queries [v, M]``, and the verifier's logits."""

    index: Tensor | None
    queries: Tensor
    logits: Tensor


def verify(run: Run, rows: list[int], draft: Draft, picked: Picked) -> Verified | None:
    """Verify the first masked span of the picked rows in one forward over [drafted block | mask queries] (S2D2, the "2L trick")."""
    if not picked.index:
        return None
    index = None if len(picked.index) == len(rows) else run.batch.index(picked.index)
    queries, staged = run.phase(verify_inputs, run, draft, index, picked.tokens, picked.queries)
    these = [rows[k] for k in picked.index]
    return Verified(index, queries, run.forward("verify", these, staged, picked.tokens + picked.queries))


def verify_inputs(run: Run, draft: Draft, index: Tensor | None, tokens: int, queries: int):
    """``(queries [v, M], inputs)`` of a verify over the first ``tokens`` of the block; a query beyond the span stands at ``L``."""
    batch, length = run.batch, run.batch.block_length
    part = draft if index is None else draft.select(index)
    filled = torch.where(part.masked, part.tokens, part.block)[:, :tokens]
    place = torch.arange(tokens, device=filled.device).expand_as(filled)
    asked = torch.arange(queries, device=filled.device).expand(len(filled), -1)
    if queries < length:
        asked = asked + part.first_masked[:, None]
        asked = torch.where(asked < (part.first_masked + part.span_length)[:, None], asked, length)
    ids = torch.cat([filled, torch.full_like(asked, batch.mask_id)], 1)
    positions = batch.start[part.rows][:, None] + torch.cat([place, asked.clamp(max=length - 1)], 1)
    mask = masks.span_verify(asked, tokens)
    wanted = torch.arange(tokens, tokens + queries, device=filled.device).expand(len(filled), -1)
    return asked, run.engine.stage(Inputs(ids, positions, part.rows, mask, logits_at=wanted))


def settle(run: Run, rows: list[int], draft: Draft, verified: Verified | None) -> list[Finished]:
    """Decide the step, and read which blocks are finished; if logits were not finite, say in which layer that began."""
    try:
        return run.batch.settle(rows, run.phase(decided, run, draft, verified).tolist())
    except FloatingPointError as error:
        length = run.batch.block_length
        ids = torch.cat([draft.block, torch.full_like(draft.block, run.batch.mask_id)], 1)
        positions = run.batch.positions(draft.rows).repeat(1, 2)
        window, mask = run.cache.window(2 * length, rows), masks.two_copy_verify(length, ids.device)
        layer = first_broken_layer(run.model.model.layers, lambda: run.model(ids, positions, window, mask))
        raise FloatingPointError(f"{error}, first in {layer}") from None


def decided(run: Run, draft: Draft, verified: Verified | None) -> Tensor:
    """What the step writes: the verified prefix, then the rest of its quota by the unmasking rule. Returns what `Batch.settle` reads."""
    choice, reach, finite = judged(run, draft, verified)
    everyone = verified is not None and verified.index is None
    if not everyone or not run.batch.one_token_is_enough:  # a verified row has gained one already
        fill_quota(run, draft, choice)
    run.policy.observe(draft, reach > 0, choice.count)
    return run.batch.record(draft, choice, reach, finite)


def judged(run: Run, draft: Draft, verified: Verified | None) -> tuple[Choice, Tensor, Tensor]:
    """The choice after verification, ``reach [b]``: how many tokens of each row's drafted block are now encoded causally in the cache slots past
    its length (0: row not verified), and ``finite [b]``: were the verifier's logits numbers?"""
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


def verdict_on(run: Run, draft: Draft, verified: Verified) -> tuple[Choice, Tensor, Tensor]:
    """The same for a draft all of whose rows were verified."""
    options, logits = run.options, run.rule_out(verified.logits)
    verdict = run.judge(draft, logits, verified.queries, options.acceptance, options.sampling, run.batch.uniforms)
    short = options.savings.short_verify
    reach = draft.first_masked + draft.span_length if short else torch.full_like(draft.rows, run.batch.block_length)
    return verified_choice(draft, verdict, options.acceptance), reach, verdict.finite


def fill_quota(run: Run, draft: Draft, choice: Choice) -> None:
    """Top the step up to its quota by the unmasking rule, where verification has not reached it already."""
    quota, overtime = run.batch.quota(draft.rows)
    remaining = (torch.minimum(quota, draft.masked.sum(-1)) - choice.count).clamp(min=0)
    eligible = draft.masked & ~choice.take
    take, key = unmask(
        draft, eligible, remaining, run.options.unmask, overtime=overtime, cap=isinstance(run.options, Options)
    )
    choice.add(take, draft.tokens, How.UNMASKED, key)


def commit_mask(run: Run, index: Tensor) -> Tensor:
    """``[b, L, L]``: how the tokens of a finished block see each other when it is committed."""
    length = run.batch.block_length
    if run.cache_options.cache_ver:
        return run.causal_mask.expand(len(index), length, length)
    # The published draft_ver leaves the rows it made causal as they are, so the commit of a block inherits them.
    until = run.causal_rows[index] if run.cache_options.draft_ver else torch.zeros_like(index)
    return masks.causal_until(until, length)


def commit(run: Run, finished: list[Finished]) -> None:
    """Keep the keys and values of finished blocks: those of the verify forward where it saw the final tokens, else by a forward of the final
    tokens, now or together with the next draft. Then move the rows on."""
    if not finished:
        return
    savings, batch, length = run.options.savings, run.batch, run.batch.block_length
    wanted = [f for f in finished if not (f.last and savings.skip_last_commit)]
    reuse = savings.reuse_verify and run.cache_options.cache_ver
    encoded = [f.row for f in wanted if reuse and f.verified_to == length]
    now = []
    for f in wanted:
        if f.row not in encoded:
            if savings.fuse_commit and not f.last:
                batch.rows[f.row].uncommitted = True
            else:
                now.append(f.row)
    if now:
        index = batch.index(now)
        mask = commit_mask(run, index) if run.cache_options.cache_ver or run.cache_options.draft_ver else None
        inputs = Inputs(batch.block(index), batch.positions(index), index, mask, logits_at=slice(0, 0))
        run.forward("commit", now, inputs, length)
    run.cache.commit([length] * len(encoded + now), encoded + now)
    batch.advance([f.row for f in finished if not f.last])


def _lossless(options: StandardOptions) -> Lossless:
    if isinstance(options, Options):
        return losslessness(options)
    if options.blocks.block_length == 1:
        return Lossless(True, "block size one is the law itself")
    return Lossless(False, "plain block diffusion takes tokens of one step independently of each other")


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind both ``block_diffusion_generate``: split ``flat`` into call keywords and options, check the latter, decode."""
    options, keywords = split_call(kind, options, flat)
    return decode(model, input_ids, options, uniforms=uniforms, **keywords)
