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
from fast_dllm_v2.rows import Rows
from shared import masks
from shared.batch import Finished
from shared.calls import check_call, check_prompts, split_call
from shared.draft import Choice, Draft, How
from shared.engine import Engine
from shared.errors import UserError
from shared.graphs import Shape
from shared.options import Acceptance
from shared.output import Completion, Lossless, Output
from shared.prompts import as_prompts
from shared.routing import Never, Policy, make_policy
from shared.sampling import GREEDY_BELOW, sample
from shared.stop_strings import StopStrings
from shared.uniforms import Uniforms
from shared.unmask import above_threshold
from shared.verify import Verdict, judge, losslessness, take_confident, verified_choice


@dataclass
class Run:
    """One decode in progress: the model, its options (resolved), and what the rows share."""

    model: Fast_dLLM_QwenForCausalLM
    options: StandardOptions
    batch: Rows
    engine: Engine
    policy: Policy
    judge: Callable[..., Verdict]
    causal_rows: Tensor  # [rows]: leading rows of each row's block that draft_ver has made causal
    next_token: Tensor  # [rows]: what the last verify predicts after the block's end (reuse_verify)
    prefill_seconds: float = 0.0

    @property
    def cache_options(self) -> Cache:
        return getattr(self.options, "cache", Cache())

    @property
    def acceptance(self) -> Acceptance:
        return getattr(self.options, "acceptance", Acceptance())

    @property
    def reuse_verify(self) -> bool:
        """Do verify forwards leave in the cache what a commit would?"""
        return (
            self.cache_options.reuse_verify
            and self.cache_options.cache_ver
            and not self.options.block_cache.use_block_cache
        )

    def forward(
        self, kind: str, rows: Sequence[int], ids: Tensor, positions: Tensor, mask, logits_at, **place
    ) -> Tensor:
        """One pass over ``ids [b, T]`` of ``rows``; logits with the mask token ruled out unless the options allow it."""
        self.batch.count(kind, rows)
        window = self.engine.cache.window(ids.shape[1], rows, **place)
        logits = self.engine.forward(ids, positions, window, mask, logits_at=logits_at)
        if self.options.sampling.suppress_mask:
            logits[..., self.batch.mask_id] = float("-inf")
        return logits


@torch.inference_mode()
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
    judge: Callable[..., Verdict] = judge,
) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    ``attention_mask`` marks padding in a ``[B, P]`` tensor. ``batch_size`` rows are in flight at a time (default: all); waiting prompts
    join as rows finish. ``stop``: a text ends with the small block in which one of these strings appears, and is cut before it (needs
    ``tokenizer``). Randomness comes from ``(seed, number of the prompt)``, or from ``uniforms``, one recorded list per prompt; ``requests``
    numbers the prompts otherwise than 0, 1, 2, ... ``on_block(request, new_ids)`` is called as small blocks finish, ``on_finish(completion)``
    as texts do. ``judge`` replaces `shared.verify.judge`. Raises `UserError` before any forward when a prompt or an option does not fit.
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
    while run.batch.waiting or run.batch.active:
        ended = prefill(run, stops, on_block)
        rows = [i for i in run.batch.active if i not in ended]
        if rows:
            draft = propose(run, rows)
            picked = route(run, draft)
            choice, reach, finite = verify(run, rows, draft, picked)
            unmask(run, draft, choice)
            run.policy.observe(draft, reach > 0, choice.count)
            ended += settle(run, run.batch.write(rows, draft, choice, reach, finite), stops, on_block)
        for i in ended:
            position = run.batch.rows[i].position
            done[position] = completion = stops.cut(run.batch.retire(i, options.blocks, text_of))
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
    blocks, device = options.blocks, model.device
    small = blocks.small_block_length
    per_block = small * (small + 1) if options.sampling.temperature >= GREEDY_BELOW else 0
    per_block += small * (small + 3) // 2 if isinstance(options, Options) else 0
    most = max(per_block * (blocks.max_new_tokens // small + 2), 1)
    numbers = most if uniforms is None else max(map(len, uniforms), default=1)
    batch = Rows(
        prompts,
        blocks,
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
    zeros = torch.zeros(rows, dtype=torch.long, device=device)
    # A verify beside a block cache is written behind the block.
    slots = batch.capacity + blocks.block_length * options.block_cache.use_block_cache
    engine = Engine.of(model, rows, slots, blocks.block_length, options.runtime, forward_kinds(options))
    return Run(model, options, batch, engine, policy, judge, zeros, zeros.clone())


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
    """Admit waiting prompts and encode their whole blocks, all in one forward; returns the rows that are finished already.

    A prompt of whole blocks also gets its first token from that forward.
    """
    batch, length = run.batch, run.batch.window
    rows = batch.admit()
    run.engine.cache.reset(rows)
    run.policy.reset(rows)
    run.causal_rows[rows] = 0
    encoded = {i: batch.rows[i].start // length * length for i in rows}
    encoded = {i: count for i, count in encoded.items() if count}
    if encoded:
        began, index = time.perf_counter(), batch.index(list(encoded))
        tokens, device = max(encoded.values()), index.device
        causal = run.cache_options.cache_ver
        mask = masks.token_causal(tokens, device) if causal else masks.block_causal(tokens, length, device)
        ids = batch.tokens[index, :tokens]
        positions = torch.arange(tokens, device=device).expand_as(ids)
        last = batch.index(list(encoded.values()))[:, None] - 1
        # Shorter rows are padded with what follows their blocks: later tokens, which earlier ones never see.
        logits = run.forward("prefill", list(encoded), ids, positions, mask, last)
        run.engine.cache.commit(list(encoded.values()), list(encoded))
        token = logits[:, 0].argmax(-1)
        run.prefill_seconds += time.perf_counter() - began
        whole = [k for k, i in enumerate(encoded) if len(batch.rows[i].prompt) == encoded[i]]
        filled = batch.put_next([list(encoded)[k] for k in whole], token[whole])
        if on_block:
            for f in filled:
                if f.last:
                    on_block(batch.rows[f.row].request, batch.new_tokens(f.row, run.options.blocks))
        ended = [f.row for f in filled if f.last] + settle(run, [f for f in filled if not f.last], stops, on_block)
    else:
        ended = []
    return ended + [i for i in rows if i not in ended and batch.rows[i].start >= batch.rows[i].total]


def propose(run: Run, rows: list[int]) -> Draft:
    """Denoise the current small block of ``rows`` once and take a token and its confidence at every position.

    The forward covers the whole block; with the block cache it covers the small block alone once that has begun.
    """
    batch, sampling = run.batch, run.options.sampling
    index = batch.index(rows)
    block = batch.block(index)
    masked = block == batch.mask_id
    within, mask = [False] * len(rows), None
    if run.options.block_cache.use_block_cache:
        began = (~masked[:, 0]).tolist()
        within = [b and batch.rows[i].block_cached for b, i in zip(began, rows, strict=True)]
    if run.cache_options.draft_ver:
        known = masked.int().argmax(-1)
        known = known + batch.offset(index) if run.cache_options.draft_ver_rows == "block" else known
        run.causal_rows[index] = torch.maximum(run.causal_rows[index], known)
        mask = masks.causal_until(run.causal_rows[index], batch.window)
    if any(within) and not all(within):
        logits = draft_both(run, rows, within, mask)
    else:
        logits = (draft_within if within[0] else draft_whole)(run, rows, mask)
    uniform = None
    if sampling.temperature >= GREEDY_BELOW:
        uniform = batch.uniforms.take(index, batch.block_length, batch.block_length)
    tokens, confidence = sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
    entry = torch.arange(len(rows), device=index.device)
    return Draft(index, block, masked, tokens, confidence, logits, entry, (~masked).sum(-1), sampling)


def draft_both(run: Run, rows: list[int], within: list[bool], mask: Tensor | None) -> Tensor:
    """Logits ``[b, small, V]`` of rows some of which draft ``within`` their small blocks; copied, as the second forward may overwrite the first one's."""
    logits = None
    for inside, draft in ((False, draft_whole), (True, draft_within)):
        chosen = [k for k, w in enumerate(within) if w == inside]
        found = draft(run, [rows[k] for k in chosen], None if mask is None else mask[chosen])
        logits = found.new_empty(len(rows), *found.shape[1:]) if logits is None else logits
        logits[chosen] = found
    return logits


def draft_whole(run: Run, rows: list[int], mask: Tensor | None) -> Tensor:
    """Logits ``[b, small, V]`` of the current small blocks from a forward over their whole blocks."""
    batch = run.batch
    ids, positions = batch.whole(batch.index(rows))
    at = previous_row(batch.places(batch.index(rows)))
    for i in rows:
        batch.rows[i].block_cached = True
    return run.forward("draft", rows, ids, positions, mask, at)


def draft_within(run: Run, rows: list[int], mask: Tensor | None) -> Tensor:
    """The same from a forward over the small blocks alone, which sees the keys the block's other positions were last given."""
    batch = run.batch
    index = batch.index(rows)
    at = previous_row(torch.arange(batch.block_length, device=index.device)).expand(len(rows), -1)
    offsets = [batch.rows[i].start % batch.window for i in rows]
    place = {"offset": offsets, "width": batch.window}
    return run.forward("draft", rows, batch.block(index), batch.positions(index), None, at, **place)


def route(run: Run, draft: Draft) -> list[int]:
    """Ask the policy which rows of the draft to verify. One read; none when the answer does not depend on the draft."""
    if run.policy.constant is not None:
        return list(range(len(draft.rows))) if run.policy.constant else []
    return run.policy.decide(draft).nonzero()[:, 0].tolist()


def verify(run: Run, rows: list[int], draft: Draft, picked: list[int]) -> tuple[Choice, Tensor, Tensor]:
    """Verify the first masked span of the picked rows in one causal forward from the block's start to the small block's end (S2D2).

    Returns the choice so far, ``reach [b]``: how many tokens of each row's small block that forward saw (0: row not verified), and ``finite
    [b]``: were its logits numbers?
    """
    choice, reach = Choice.none(draft), torch.zeros_like(draft.rows)
    finite = torch.ones_like(draft.rows, dtype=torch.bool)
    if picked:
        batch, options, small = run.batch, run.options, run.batch.block_length
        index = batch.index(picked)
        part = draft if len(picked) == len(rows) else draft.select(index)
        these = [rows[k] for k in picked]
        tokens = max(batch.rows[i].start % batch.window for i in these) + small
        ids, positions = batch.whole(part.rows)
        places = batch.places(part.rows)
        ids = ids.scatter(1, places, torch.where(part.masked, part.tokens, part.block))
        at = previous_row(places)
        at = torch.cat([at, torch.full_like(at[:, :1], tokens - 1)], 1)
        mask, offset = masks.token_causal(tokens, ids.device), 0
        if options.block_cache.use_block_cache:
            mask, offset = (
                torch.cat([torch.zeros(tokens, batch.window, dtype=torch.bool, device=ids.device), mask], 1),
                batch.window,
            )
        logits = run.forward("verify", these, ids[:, :tokens], positions[:, :tokens], mask, at, offset=offset)
        run.next_token[part.rows] = logits[:, -1].argmax(-1)
        queries = torch.arange(small, device=ids.device).expand(len(picked), -1)
        # A rejection is replaced from the residual against what was really drafted from, whatever the verifier's temperature.
        drafted = replace(part, sampling=replace(options.sampling, verify_temperature=None))
        verdict = run.judge(drafted, logits[:, :small], queries, options.acceptance, options.sampling, batch.uniforms)
        finite[index] = verdict.finite
        choice.put(index, verified_choice(part, verdict, options.acceptance, keep_rejected=False))
        reach[index] = small
    if run.acceptance.always_check_high_confidence:
        take_confident(choice, draft, run.options.unmask)
    return choice, reach, finite


def unmask(run: Run, draft: Draft, choice: Choice) -> None:
    """Where verification decided nothing: every draft above the threshold, and the most confident one in any case."""
    eligible = draft.masked & (choice.count == 0)[:, None]
    one = torch.ones_like(draft.rows)
    take, _ = above_threshold(draft.confidence, eligible, one, run.options.unmask.confidence_threshold)
    choice.add(take, draft.tokens, How.UNMASKED)


def settle(run: Run, finished: list[Finished], stops: StopStrings, on_block) -> list[int]:
    """Move the rows of finished small blocks on, committing blocks at their ends; returns the rows whose text has ended.

    The token after a commit may complete a small block of one, so this repeats until no row is complete.
    """
    batch, blocks, ended = run.batch, run.options.blocks, []
    while finished:
        finished = stops.end(finished)
        if on_block:
            for f in finished:
                on_block(batch.rows[f.row].request, batch.new_tokens(f.row, blocks))
        keep = [f for f in finished if at_block_end(run, f) and wants_commit(run, f)]
        token, kept = commit(run, keep), [f.row for f in keep]
        # The published length has one token after the last block.
        over = [f.row for f in finished if f.last and not (blocks.round_to_blocks and f.row in kept)]
        batch.advance([f.row for f in finished if f.row not in over])
        follow = [k for k, row in enumerate(kept) if row not in over]
        finished = batch.put_next([kept[k] for k in follow], token[follow])
        if on_block:
            for f in finished:
                if f.last:
                    on_block(batch.rows[f.row].request, batch.new_tokens(f.row, blocks))
        ended += over + [f.row for f in finished if f.last]
        finished = [f for f in finished if not f.last]
    return ended


def at_block_end(run: Run, finished: Finished) -> bool:
    """Is this small block the last of its block?"""
    return (run.batch.rows[finished.row].start + run.batch.block_length) % run.batch.window == 0


def wants_commit(run: Run, finished: Finished) -> bool:
    """Will anything read this block's keys, or is the commit asked for anyway? A text that stopped never is committed."""
    return not finished.stopped and not (finished.last and run.options.savings.skip_last_commit)


def commit(run: Run, keep: list[Finished]) -> Tensor:
    """Keep the keys and values of finished blocks, by a forward of the final tokens unless a verify was one; the tokens that follow, ``[k]``."""
    batch, length = run.batch, run.batch.window
    if not keep:
        return run.next_token[:0]
    token = torch.zeros(len(keep), dtype=torch.long, device=run.next_token.device)
    now = []
    for k, f in enumerate(keep):
        if run.reuse_verify and f.verified_to:
            token[k] = run.next_token[f.row]
        else:
            now.append(k)
    if now:
        rows = [keep[k].row for k in now]
        ids, positions = batch.whole(batch.index(rows))
        mask = masks.token_causal(length, ids.device) if run.cache_options.cache_ver else None
        at = torch.full_like(ids[:, :1], length - 1)
        token[now] = run.forward("commit", rows, ids, positions, mask, at)[:, 0].argmax(-1)
    rows = [f.row for f in keep]
    run.engine.cache.commit([length] * len(rows), rows)
    run.causal_rows[rows] = 0
    for i in rows:
        batch.rows[i].block_cached = False
    return token


def _lossless(options: StandardOptions) -> Lossless:
    if options.blocks.block_length == 1:
        return Lossless(True, "block size one is the law itself")
    if isinstance(options, Options):
        return losslessness(options)
    return Lossless(False, "plain block diffusion takes tokens of one step independently of each other")


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind every ``generate`` function of the family: split ``flat`` into call keywords and options, check the latter, decode."""
    options, call = split_call(kind, options, flat)
    return decode(model, input_ids, options, uniforms=uniforms, **call)
