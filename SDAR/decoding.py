"""The SDAR decode loop: plain block diffusion, and S2D2, in which the same model at block size one verifies its own drafts.

Each step drafts the current block of every row, may verify the first masked span, fills the step's quota by the unmasking rule, and
commits blocks that are finished. Plain decoding is the same loop with a policy that never verifies.
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
from shared.batch import Batch, Finished
from shared.diagnose import first_broken_layer
from shared.draft import Choice, Draft, How
from shared.engine import Engine
from shared.errors import UserError
from shared.kv_cache import BlockCache
from shared.options import Acceptance, Cache
from shared.output import Completion, Lossless, Output
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
    def whole_block_ratios(self) -> bool:
        """Does acceptance look at positions outside the span?"""
        return self.acceptance.ssd_ratio_threshold >= 0 and self.acceptance.ssd_threshold_all_spans

    def forward(
        self,
        kind: str,
        rows: Sequence[int],
        ids: Tensor,
        positions: Tensor,
        mask,
        logits_at=None,
        ahead=None,
        leading=None,
    ) -> Tensor:
        """One pass over ``ids [b, T]`` of ``rows``; logits with the mask token ruled out unless the options allow it."""
        self.batch.count(kind, set(rows))
        window = self.cache.window(ids.shape[1], rows, ahead=ahead)
        logits = self.engine.forward(ids, positions, window, mask, leading=leading, logits_at=logits_at)
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
        draft = propose(run, rows)
        picked = route(run, draft)
        choice, reach, finite = verify(run, rows, draft, picked)
        if len(picked.index) < len(rows) or not run.batch.one_token_is_enough:  # a verified row has gained one already
            fill_quota(run, draft, choice)
        run.policy.observe(draft, reach > 0, choice.count)
        finished = stops.end(write(run, rows, draft, choice, reach, finite))
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
    """Allocate the batch, the cache and the policy's state for ``rows`` rows."""
    blocks = options.blocks
    length, device = blocks.block_length, model.device
    per_block = length * (length + 1) if options.sampling.temperature >= GREEDY_BELOW else 0
    per_block += length * (length + 3) // 2 if isinstance(options, Options) else 0
    numbers = (
        max(per_block * (blocks.max_new_tokens // length + 2), 1)
        if uniforms is None
        else max(map(len, uniforms), default=1)
    )
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
        uniforms=Uniforms(rows, numbers, seed=seed, device=device, recorded=uniforms),
    )
    policy = Never()
    if isinstance(options, Options):
        policy = make_policy(
            options.routing, options.bandit, options.estimation, options.unmask, rows=rows, device=device
        )
    return Run(
        model,
        options,
        batch,
        engine=Engine.of(model, rows, batch.capacity + length, length, options.runtime),
        policy=policy,
        judge=judge,
        causal_mask=masks.token_causal(length, device),
        causal_rows=torch.zeros(rows, dtype=torch.long, device=device),
    )


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


def check_prompts(prompts: list[list[int]], blocks, config) -> None:
    """Raise `UserError` for a prompt that is empty, holds ids it must not hold, or does not fit the model.

    Blocks are decoded whole, so the last one must lie within the model's positions even where its tail is cut off.
    """
    whole_blocks = config.max_position_embeddings // blocks.block_length * blocks.block_length
    room = whole_blocks - blocks.max_new_tokens
    if not prompts:
        raise UserError("there is no prompt")
    for k, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {k} is empty. Allowed: at least one token")
        if len(prompt) > room:
            raise UserError(
                f"prompt {k} has {len(prompt)} tokens. Allowed: {max(room, 0)} (max_position_embeddings "
                f"{config.max_position_embeddings} less max_new_tokens {blocks.max_new_tokens}); --prompt_length truncates"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"prompt {k} has a token id outside the vocabulary. Allowed: 0 to {config.vocab_size - 1}")
        if blocks.mask_id in prompt:
            raise UserError(f"prompt {k} contains the mask token (id {blocks.mask_id}), which means 'to be decoded'")


def check_call(prompts: int, requests: Sequence[int] | None, uniforms, batch_size: int | None) -> None:
    """Raise `UserError` for call keywords that do not fit ``prompts`` prompts."""
    if requests is not None and (len(requests) != prompts or len(set(requests)) != prompts):
        raise UserError(
            f"requests are {list(requests)}. Allowed: one number for each of the {prompts} prompts, all different"
        )
    if uniforms is not None and len(uniforms) != prompts:
        raise UserError(f"uniforms hold {len(uniforms)} lists. Allowed: one for each of the {prompts} prompts")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size is {batch_size}. Allowed: at least 1")


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
    run.forward("prefill", rows, ids, positions, mask, logits_at=slice(0, 0))
    run.cache.commit(starts, rows)


def propose(run: Run, rows: list[int]) -> Draft:
    """Denoise the current block of ``rows`` once and take a token and its confidence at every position.

    Finished blocks that still have to be committed ride along as further entries of the same forward: in each layer their keys are in the
    cache before the drafts look.
    """
    batch, sampling, length = run.batch, run.options.sampling, run.batch.block_length
    index = batch.index(rows)
    block = batch.block(index)
    masked = block == batch.mask_id
    ids, positions = block, batch.positions(index)
    first_masked = masked.int().argmax(-1) if run.cache_options.draft_ver else torch.zeros_like(index)
    mask = masks.causal_until(first_masked, length) if run.cache_options.draft_ver else None
    riders = [i for i in rows if batch.rows[i].uncommitted]
    ahead = [length if batch.rows[i].uncommitted else 0 for i in rows] + [0] * len(riders)
    if riders:
        ride = batch.index(riders)
        ids = torch.cat([ids, batch.block(ride, back=length)])
        positions = torch.cat([positions, batch.positions(ride, back=length)])
        if run.cache_options.draft_ver or run.cache_options.cache_ver:
            mask = torch.cat([masks.causal_until(first_masked, length), commit_mask(run, ride)])
    logits = run.forward("draft", rows + riders, ids, positions, mask, ahead=ahead, leading=len(rows))
    run.cache.commit([length] * len(riders), riders)
    for i in riders:
        batch.rows[i].uncommitted = False
    run.causal_rows[index] = first_masked
    uniform = None
    if sampling.temperature >= GREEDY_BELOW:
        uniform = batch.uniforms.take(index, length, length)
    tokens, confidence = sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
    entry = torch.arange(len(rows), device=index.device)
    return Draft(index, block, masked, tokens, confidence, logits, entry, batch.decoded[index], sampling)


@dataclass(frozen=True)
class Picked:
    """Rows of a draft to verify (indices into it), and how far: ``tokens`` of the block and ``queries`` mask tokens of the span."""

    index: list[int]
    tokens: int
    queries: int


def route(run: Run, draft: Draft) -> Picked:
    """Ask the policy, and measure the spans of the rows it picks. At most one packed read; none when neither looks at the draft."""
    decision, length = run.policy.decide(draft), run.batch.block_length
    whole = not run.options.savings.short_verify or run.whole_block_ratios
    if run.policy.constant is False or (run.policy.constant and whole):
        return Picked(list(range(len(decision))) if run.policy.constant else [], length, length)
    span = draft.span.sum(-1)
    read = torch.stack([decision.long(), draft.first_masked + span, span], 1).tolist()
    index = [k for k, (verify, _, _) in enumerate(read) if verify]
    if whole or not index:
        return Picked(index, length, length)
    tokens, queries = max(read[k][1] for k in index), max(read[k][2] for k in index)
    return Picked(index, run.engine.verify_tokens(tokens), run.engine.queries(queries))


def verify(run: Run, rows: list[int], draft: Draft, picked: Picked) -> tuple[Choice, Tensor, Tensor]:
    """Verify the first masked span of the picked rows in one forward over [drafted block | mask queries] (S2D2, the "2L trick").

    Returns the choice so far, ``reach [b]``: how many tokens of each row's drafted block are now encoded causally in the cache slots past
    its length (0: row not verified), and ``finite [b]``: were the verifier's logits numbers?
    """
    choice, reach = Choice.none(draft), torch.zeros_like(draft.rows)
    finite = torch.ones_like(draft.rows, dtype=torch.bool)
    if picked.index:
        batch, options, length = run.batch, run.options, run.batch.block_length
        index = batch.index(picked.index)
        part = draft if len(picked.index) == len(rows) else draft.select(index)
        filled = torch.where(part.masked, part.tokens, part.block)[:, : picked.tokens]
        short = picked.queries < length
        queries = torch.arange(picked.queries, device=index.device).expand(len(index), -1)
        if short:
            queries = queries + part.first_masked[:, None]
            queries = torch.where(queries < (part.first_masked + part.span.sum(-1))[:, None], queries, length)
        ids = torch.cat([filled, torch.full_like(queries, batch.mask_id)], 1)
        place = torch.cat([torch.arange(picked.tokens, device=index.device).expand_as(filled), queries], 1)
        positions = batch.start[part.rows][:, None] + place.clamp(max=length - 1)
        mask = masks.span_verify(queries, picked.tokens)
        logits = run.forward(
            "verify", [rows[k] for k in picked.index], ids, positions, mask, slice(picked.tokens, None)
        )
        verdict = run.judge(part, logits, queries, options.acceptance, options.sampling, batch.uniforms)
        finite[index] = verdict.finite
        choice.put(index, verified_choice(part, verdict, options.acceptance))
        reach[index] = part.first_masked + part.span.sum(-1) if options.savings.short_verify else length
    if run.acceptance.always_check_high_confidence:
        take_confident(choice, draft, run.options.unmask)
    return choice, reach, finite


def fill_quota(run: Run, draft: Draft, choice: Choice) -> None:
    """Top the step up to its quota by the unmasking rule, where verification has not reached it already."""
    quota, overtime = run.batch.quota(draft.rows)
    remaining = (torch.minimum(quota, draft.masked.sum(-1)) - choice.count).clamp(min=0)
    eligible = draft.masked & ~choice.take
    take, key = unmask(
        draft, eligible, remaining, run.options.unmask, overtime=overtime, cap=isinstance(run.options, Options)
    )
    choice.add(take, draft.tokens, How.UNMASKED, key)


def write(run: Run, rows: list[int], draft: Draft, choice: Choice, reach: Tensor, finite: Tensor) -> list[Finished]:
    """`Batch.write`; if the logits were not finite, say in which layer that began."""
    try:
        return run.batch.write(rows, draft, choice, reach, finite)
    except FloatingPointError as error:
        length = run.batch.block_length
        ids = torch.cat([draft.block, torch.full_like(draft.block, run.batch.mask_id)], 1)
        positions = run.batch.positions(draft.rows).repeat(1, 2)
        window, mask = run.cache.window(2 * length, rows), masks.two_copy_verify(length, ids.device)
        layer = first_broken_layer(run.model.model.layers, lambda: run.model(ids, positions, window, mask))
        raise FloatingPointError(f"{error}, first in {layer}") from None


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
        run.forward("commit", now, batch.block(index), batch.positions(index), mask, logits_at=slice(0, 0))
    run.cache.commit([length] * len(encoded + now), encoded + now)
    batch.advance([f.row for f in finished if not f.last])


def _lossless(options: StandardOptions) -> Lossless:
    if isinstance(options, Options):
        return losslessness(options)
    if options.blocks.block_length == 1:
        return Lossless(True, "block size one is the law itself")
    return Lossless(False, "plain block diffusion takes tokens of one step independently of each other")


_CALL_KEYWORDS = (
    "attention_mask",
    "seed",
    "batch_size",
    "tokenizer",
    "requests",
    "stop",
    "on_block",
    "on_finish",
    "judge",
)


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind both ``block_diffusion_generate``: split ``flat`` into call keywords and options, check the latter, decode."""
    call = {name: flat.pop(name) for name in _CALL_KEYWORDS if name in flat}
    if options is not None and type(options) is not kind:
        raise UserError(f"options is a {type(options).__name__}. Allowed: {kind.__name__}")
    options = kind.from_flat(flat) if options is None else options.replace(**flat) if flat else options
    return decode(model, input_ids, options, uniforms=uniforms, **call)
