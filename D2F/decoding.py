"""The D2F decode loop: several blocks in flight, and S2D2 on top, in which the same model verifies its own drafts token by token.

Each step adds a block to the texts that are ready for one and drafts all blocks in flight in one pass, which also encodes those finished since the last.
Plain decoding (``d2f``) then takes what is confident; ``ssd`` verifies the first masked span, which may run across blocks, and forces a token where a
block would stand still. A text's first pass holds its prompt.

What a step computes between its forwards stands in functions of device tensors: `draft_inputs`, `drafted`, `verify_inputs` and `decided`. They read nothing
back, so that on a GPU each is one CUDA graph (`shared.gpu.phases`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f.cursor import Pipeline
from d2f.modeling_d2f import DreamForD2F, LLaDAForD2F
from d2f.options import Cache, Options, StandardOptions
from shared.decode import run as shared_run
from shared.decode.calls import Call, Job, checked, split_call
from shared.decode.cursor import whole_blocks
from shared.decode.lanes import Lane
from shared.decode.run import canvas_of, inference, policy_of
from shared.decode.spans import VerifyPlan, plan_verify, span_inputs, wanted_spans
from shared.decode.steps import Outcome, Verified, View, decide_verified, emit, finish_step, prefill
from shared.errors import UserError
from shared.gpu.engine import Engine, Inputs
from shared.gpu.graphs import Shape
from shared.network import masks
from shared.network.kv_cache import Where
from shared.output import Lossless, Output
from shared.policy.accept import self_speculative_losslessness, verified_choice
from shared.policy.draft import Choice, Draft
from shared.policy.sampling import GREEDY_BELOW, greedy, inverse_cdf, log_weights
from shared.policy.uniforms import Uniforms
from shared.trace import How, Pass

Network = LLaDAForD2F | DreamForD2F
CAPTURED = 3  # blocks in one forward, up to which forwards are graphs
_NO_CACHE = Cache()


@dataclass
class Run(shared_run.Run):
    """One decode of this family in progress."""

    STATE: ClassVar[tuple[str, ...]] = ("last_logits",)

    cursor: Pipeline
    last_logits: Tensor | None = None  # [rows, V]: of the last token encoded, where the network predicts the next one

    @property
    def cache_options(self) -> Cache:
        return getattr(self.options, "cache", _NO_CACHE)

    @property
    def target_block(self) -> int:
        """Tokens that the verifier decodes together."""
        return getattr(self.acceptance, "target_block_size", 1)

    @property
    def whole_verify(self) -> bool:
        # Is there a token that sees what comes after the span?
        beyond = self.target_block > 1 or self.options.pipeline.attention == "full"
        return isinstance(self.options, Options) and (beyond or super().whole_verify)

    def plain_forward(self, rows: list[int]) -> Tensor:
        """One pass over the blocks in flight of ``rows`` through the network as it is, from which numbers that broke can be traced."""
        width = max(self.cursor.in_flight(i) for i in rows) * self.cursor.block_length
        window = self.cache.window(width, rows)
        positions, _ = self.cursor.window(window.where.rows, width)
        ids = self.canvas.tokens[window.where.rows[:, None], positions]
        return self.lane.model(ids, within(self, positions), window)


@inference
def decode(model: Network, input_ids, options: StandardOptions, call: Call) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    Raises `UserError` before any forward when a prompt, an option or the call does not fit.
    """
    run = start(model, checked(model, input_ids, options, call, resolve))
    while prefill(run, step) or run.canvas.active:
        emit(run, run.cursor.empty(run.canvas.active))
        step(run, run.canvas.active)
    return run.output(_lossless(run.options))


def step(run: Run, rows: list[int]) -> None:
    """Draft the blocks in flight of ``rows`` once, verify what is worth it, decide, and let go of the texts that are finished."""
    if not rows:
        return
    run.cursor.add_blocks(rows)
    draft, wanted = propose(run, rows)
    verified = verify(run, rows, draft, plan(run, wanted, rows, draft))
    finished = finish_step(run, rows, draft, verified, decided)
    emit(run, [f.row for f in finished if f.last])


def start(model: Network, job: Job) -> Run:
    """Allocate canvas, cache and the policy's state, as large as an engine that may be there already."""
    options, longest = job.options, job.options.blocks.max_new_tokens
    slots = max(map(len, job.prompts)) + room(options, model.predicts_next)
    engine = Engine.of(model, job.rows, slots, forward_kinds(options, model.predicts_next), options.runtime)
    canvas = canvas_of(job, _uniforms(job, engine), width=engine.cache.slots, iterations=longest + 1)
    cursor = Pipeline(canvas, options, model.config.max_position_embeddings)
    policy = policy_of(options, len(canvas.tokens), model.device)
    run = Run(job, canvas, cursor, {"model": Lane("model", engine, canvas)}, policy)
    if model.predicts_next:
        run.last_logits = torch.ones(
            len(canvas.tokens), model.config.vocab_size, dtype=model.dtype, device=model.device
        )
    run.run_phases_with(canvas, cursor, canvas.uniforms, policy)
    return run


def room(options: StandardOptions, causal_verifier: bool) -> int:
    """Cache slots behind a prompt. A forward is padded to the row with most blocks in flight: of those that finished with the last step and those that have
    not, or in a verify of these, with as many mask queries."""
    length, most = options.blocks.block_length, options.pipeline.max_blocks_in_flight
    new = whole_blocks(options.blocks.max_new_tokens, length)
    in_flight = new if most is None else min(new, most * length)
    queries = isinstance(options, Options) and not causal_verifier
    return new + max(2 * in_flight if queries else min(new, 2 * in_flight), 2 * CAPTURED * length)


def _uniforms(job: Job, engine: Engine) -> Uniforms:
    """Each step decides a token at least, so drafts and acceptance take at most a number for every pair of tokens."""
    options, longest = job.options, job.options.blocks.max_new_tokens
    pairs = longest * (longest + 1) // 2
    most = pairs * (options.sampling.temperature >= GREEDY_BELOW) + (pairs + longest) * isinstance(options, Options)
    recorded = job.call.uniforms
    count = max(most, 1) if recorded is None else max(map(len, recorded), default=1)
    device = engine.cache.length.device
    return Uniforms(len(engine.cache.lengths), count, seed=job.call.seed, device=device, recorded=recorded)


def forward_kinds(options: StandardOptions, causal_verifier: bool) -> list[Shape]:
    """The forwards of one row that are worth a graph."""
    return pass_kinds(options.blocks.block_length, causal_verifier, verifies=isinstance(options, Options))


def pass_kinds(length: int, causal_verifier: bool, verifies: bool = True) -> list[Shape]:
    """Passes over 1, 2, ... blocks, and verifies of as many with mask queries behind them, or without where the verifier predicts the next token."""
    sizes = [length * n for n in range(1, CAPTURED + 1)]
    kinds = [Shape(1, size, picks=size, lasting=True) for size in sizes]
    if verifies:
        behind = (lambda q: 0) if causal_verifier else (lambda q: q)
        more = int(causal_verifier)  # see `verify_inputs`
        kinds += [Shape(1, size + behind(q), picks=q + more) for size in sizes for q in {length, size}]
    return kinds


def resolve(model: Network, options: StandardOptions, tokenizer=None) -> StandardOptions:
    """The options with every default that depends on the checkpoint filled in."""
    blocks = options.blocks
    mask_id, stop_ids = model.special_ids(blocks.mask_id, blocks.stopping_criteria_idx, tokenizer)
    stop_ids = stop_ids if blocks.truncate_at_eos else ()
    options = replace(options, blocks=replace(blocks, mask_id=mask_id, stopping_criteria_idx=stop_ids))
    if options.pipeline.attention == "full" and not model.predicts_next:
        raise UserError(
            "attention is 'full'. Allowed with this network: block; only Dream was ever run without its mask"
        )
    if isinstance(options, Options) and options.acceptance.draft_confidence_threshold is None:
        acceptance = replace(options.acceptance, draft_confidence_threshold=options.unmask.skip_threshold)
        options = replace(options, acceptance=acceptance)
    return options


def propose(run: Run, rows: list[int]) -> tuple[Draft, Tensor | None]:
    """Draft the blocks in flight of ``rows`` once and keep what is finished: a draft, and what the policy wants verified of it (see `drafted`)."""
    cursor, cache = run.cursor, run.cache
    cached = [cache.lengths[i] for i in rows]
    tokens = max(cursor.last(i) - c for i, c in zip(rows, cached, strict=True))
    width = whole_blocks(max(cursor.last(i) - cursor.first(i) for i in rows), cursor.block_length)
    kind = "draft" if min(cached) else "prefill"
    if min(cached):
        tokens = whole_blocks(tokens, cursor.block_length)
        graphs = run.lane.engine.runner is not None and tokens <= CAPTURED * cursor.block_length
        width = tokens if graphs else width  # they are captured with logits of all tokens
    window = cache.window(tokens, rows)
    view = run.phase(draft_inputs, run, window.where, width, tokens)
    logits = run.forward(kind, rows, view.staged, window)
    for i, c in zip(rows, cached, strict=True):
        cursor.texts[i].passes.append(Pass(c, cursor.first(i), cursor.last(i)))
    result = run.phase(drafted, run, view, logits)
    encoded = [i for i, c in zip(rows, cached, strict=True) if cursor.first(i) > c]
    cache.commit([cursor.first(i) - cache.lengths[i] for i in encoded], encoded)
    return result


@dataclass(frozen=True, slots=True)
class Drafted(View):
    """The blocks in flight of some rows, ``block, masked [b, W]``; ``encodes [b]``: does the pass encode tokens that come before them?"""

    encodes: Tensor | None = None


def draft_inputs(run: Run, where: Where, width: int, tokens: int) -> Drafted:
    """The blocks in flight of all entries, and the inputs of a pass over ``tokens`` tokens: what is finished, then these."""
    cursor, index = run.cursor, where.rows
    cached = run.cache.length[index]
    positions = cached[:, None] + torch.arange(tokens, device=index.device)
    ids = run.canvas.tokens[index[:, None], positions]
    here, inside = cursor.window(index, width)
    block = run.canvas.tokens[index[:, None], here]
    done = cursor.plan[index, 0] - cached
    at = done[:, None] + torch.arange(width, device=index.device) - int(run.lane.model.predicts_next)
    mask = pass_mask(run, index, positions, ids)
    inputs = Inputs(ids, within(run, positions), mask, logits_at=at.clamp(0, tokens - 1))
    staged = run.stage(inputs, where)
    return Drafted(index, block, inside & (block == run.canvas.mask_id), staged, done > 0)


def within(run: Run, positions: Tensor) -> Tensor:
    """``positions`` that the network has: padding may lie past them."""
    return positions.clamp(max=run.lane.model.config.max_position_embeddings - 1)


def pass_mask(run: Run, index: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """``[b, T, T]``: a token sees its own block and all before it, the prompt being the first. With ``cache_ver`` what is being cached sees as the verifier
    does, with ``draft_ver`` so do known tokens of blocks in flight."""
    cursor, cache = run.cursor, run.cache_options
    block = cursor.block_of(index, positions, cursor.block_length)
    if run.options.pipeline.attention == "full":
        return seen_within(positions, cursor.plan[index, 1:2])
    mask = sees(block)
    if cache.causal_cache or cache.causal_drafts:
        in_flight = positions >= cursor.plan[index, :1]
        known = ids != run.canvas.mask_id
        strict = (~in_flight & cache.causal_cache) | (in_flight & known & cache.causal_drafts)
        mask = torch.where(strict[:, :, None], sees(cursor.block_of(index, positions, run.target_block)), mask)
    return mask


def sees(block: Tensor) -> Tensor:
    """``[b, T, T]`` of the blocks ``[b, T]`` that tokens are in: their own and all before."""
    return block[:, None] <= block[:, :, None]


def seen_within(positions: Tensor, end: Tensor) -> Tensor:
    """``[b, T, T]``: all see the ``positions [b, T]`` before ``end [b, 1]``; padding sees itself too."""
    return (positions < end)[:, None] | (positions >= end)[:, :, None]


def after_last(run: Run, index: Tensor, logits: Tensor, first: Tensor) -> Tensor:
    """``logits [b, K, V]``, where the network predicts the next token: their first row from `Run.last_logits` where that is the ``first [b]`` in flight."""
    if run.last_logits is not None:
        logits[:, 0] = torch.where(first[:, None], run.last_logits[index], logits[:, 0])
    return logits


def drafted(run: Run, view: Drafted, logits: Tensor) -> tuple[Draft, Tensor | None]:
    """A token, its confidence and its rank at every position, and what the policy wants verified (`shared.decode.spans.wanted_spans`)."""
    cursor, index = run.cursor, view.index
    if run.last_logits is not None:
        run.last_logits[index] = torch.where(view.encodes[:, None], logits[:, 0], run.last_logits[index])
    logits = run.suppress_mask(after_last(run, index, logits, torch.ones_like(view.encodes)))
    tokens, confidence, ranking = choose(run, view, logits)
    _, inside = cursor.window(index, view.block.shape[1])
    first = inside[:, : cursor.block_length].sum(-1)
    draft = InFlight(
        rows=index,
        block=view.block,
        masked=view.masked,
        tokens=tokens,
        confidence=confidence,
        logits=logits,
        entry=torch.arange(len(index), device=index.device),
        decoded=first - view.masked[:, : cursor.block_length].sum(-1),
        sampling=run.options.sampling,
        open=cursor.goes_on(index, view.block.shape[1]),
        in_flight=inside.sum(-1),
        first_total=first,
        ranking=ranking,
    )
    return draft, wanted_spans(run.policy, draft, whole=run.whole_verify)


@dataclass(frozen=True)
class InFlight(Draft):
    """A draft of all blocks in flight. ``ranking [b, W]``: what the likeliest drafts are chosen by."""

    ranking: Tensor | None = None


def choose(run: Run, view: Drafted, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(tokens, confidence, ranking) [b, W]`` of ``logits [b, W, V]``; a draw takes one number for every masked position."""
    sampling, unmask = run.options.sampling, run.options.unmask
    if sampling.temperature < GREEDY_BELOW and not (
        sampling.top_p_first or unmask.margin_confidence or unmask.neg_entropy
    ):
        tokens, confidence = greedy(logits)
        return tokens, confidence, confidence
    drafts = replace(sampling, verify_temperature=None)
    probs = log_weights(logits, drafts).softmax(-1)
    if sampling.temperature < GREEDY_BELOW:
        confidence, tokens = probs.max(-1)
    else:
        number = view.masked.cumsum(-1) - 1
        uniform = run.canvas.uniforms.take(view.index, view.masked.shape[1], view.masked.sum(-1))
        tokens = inverse_cdf(probs, uniform.gather(1, number.clamp(min=0)))
        confidence = probs.gather(-1, tokens[..., None])[..., 0]
    if unmask.neg_entropy:
        return tokens, confidence, (probs * (probs + 1e-10).log()).sum(-1)
    top = probs.topk(2, dim=-1).values if unmask.margin_confidence else None
    return tokens, confidence, confidence if top is None else top[..., 0] - top[..., 1]


def plan(run: Run, wanted: Tensor | None, rows: list[int], draft: Draft) -> VerifyPlan:
    """Which rows are verified, and how far: see `shared.decode.spans.plan_verify`."""
    width, length = draft.block.shape[1], run.cursor.block_length
    captured = run.lane.engine.runner is not None and width <= CAPTURED * length
    sizes = sorted({length, width}) if captured else None
    return plan_verify(run.policy.constant, wanted, range(len(rows)), width, whole=run.whole_verify, sizes=sizes)


def verify(run: Run, rows: list[int], draft: Draft, plan: VerifyPlan) -> Verified | None:
    """Verify the first masked span of the planned rows in one forward over all blocks in flight as drafted, with mask queries behind them unless the network
    predicts the next token."""
    if not plan.index:
        return None
    these = [rows[k] for k in plan.index]
    index = None if len(these) == len(rows) else run.canvas.index(plan.index)
    window = run.cache.window(plan.tokens + plan.queries * (not run.lane.model.predicts_next), these)
    queries, staged = run.phase(verify_inputs, run, draft, index, window.where, plan.tokens, plan.queries)
    return Verified(index, queries, run.forward("verify", these, staged, window))


def verify_inputs(run: Run, draft: Draft, index: Tensor | None, where: Where, tokens: int, queries: int):
    """``(queries [v, M], inputs)`` of a verify over the first ``tokens`` in flight; a query beyond the span stands at ``W``."""
    part, start = draft if index is None else draft.select(index), run.cursor.plan[where.rows, 0]
    asked = span_inputs(part, tokens, queries, start, run.canvas.mask_id)
    if run.lane.model.predicts_next:
        ids, positions = asked.ids[:, :tokens], asked.positions[:, :tokens]
        mask = draft_mask(run, where.rows, positions)
        # One more, which makes it another graph than a draft's, whose logits have to outlast it.
        at = F.pad(asked.queries - 1, (0, 1)).clamp(0, tokens - 1)
        return asked.queries, run.stage(Inputs(ids, within(run, positions), mask, logits_at=at), where)
    mask = asked.mask if run.target_block == 1 else block_verify(run, where.rows, asked.positions[:, :tokens])
    inputs = Inputs(asked.ids, within(run, asked.positions), mask, logits_at=asked.wanted)
    return asked.queries, run.stage(inputs, where)


def draft_mask(run: Run, index: Tensor, positions: Tensor) -> Tensor:
    """``[v, T, T]``: how drafted tokens see each other in a verify."""
    if run.options.pipeline.attention == "full":
        return seen_within(positions, run.cursor.plan[index, 1:2])
    if run.target_block == 1:
        return masks.token_causal(positions.shape[1], index.device)
    return sees(run.cursor.block_of(index, positions, run.target_block))


def block_verify(run: Run, index: Tensor, positions: Tensor) -> Tensor:
    """``[v, 2 T, 2 T]``: the mask of a verifier that decodes ``target_block_size`` b tokens together, over [drafts at ``positions [v, T]`` | as many mask
    queries]. Drafts are in blocks of b from the prompt's end; queries see those in earlier blocks, and each other in blocks of b from the first query on.
    The two agree where ``block_length`` is a multiple of b; otherwise this is what is published."""
    size, block = run.target_block, run.cursor.block_of(index, positions, run.target_block)
    column = torch.arange(positions.shape[1], device=index.device)
    end = run.cursor.plan[index, 1:2]
    earlier = (block[:, None] < block[:, :, None]) & (positions + size < end)[:, None]
    own = (column // size == (column // size)[:, None]) & seen_within(positions, end)
    top = torch.cat([sees(block), torch.zeros_like(earlier)], 2)
    return torch.cat([top, torch.cat([earlier, own], 2)], 1)


def decided(run: Run, draft: InFlight, verified: Verified | None) -> Tensor:
    """What the step writes. Returns what `finish_step` reads."""
    if run.policy.constant is False:
        choice, sent, finite = take_confident(run, draft), None, None
    else:
        choice, sent, finite = decide_verified(run, draft, verified, span_outcome)
        force(run, draft, choice, sent)
    seen = torch.zeros_like(draft.masked[:, 0]) if sent is None else sent > 0
    run.policy.observe(draft, seen, choice.count)
    return run.cursor.record(draft, choice, sent, finite)


def in_blocks(run: Run, values: Tensor) -> Tensor:
    """``values [b, W]`` as ``[b, W / L, L]``."""
    return values.view(len(values), -1, run.cursor.block_length)


def take_confident(run: Run, draft: InFlight) -> Choice:
    """Every draft above the threshold, and the likeliest one of a block that must go on and has none."""
    confident = draft.masked & (draft.confidence > run.options.unmask.skip_threshold)
    idle = ~in_blocks(run, confident).any(-1, keepdim=True) & in_blocks(run, draft.open)
    left = in_blocks(run, draft.masked) & idle
    best = in_blocks(run, draft.ranking).masked_fill(~left, -torch.inf).argmax(-1, keepdim=True)
    forced = (left & (torch.arange(run.cursor.block_length, device=best.device) == best)).flatten(1)
    choice = Choice.none(draft)
    choice.add(confident | forced, draft.tokens, How.UNMASKED)
    choice.how = torch.where(forced, int(How.FORCED), choice.how)
    return choice


def span_outcome(run: Run, draft: InFlight, verified: Verified) -> Outcome:
    """What a verify decides for a draft all of whose rows were verified; in place of the reach, the tokens of the span."""
    options, rule = run.options, run.job.call.accept_rule
    first = verified.queries[:, 0] == 0 if run.lane.model.predicts_next else None
    logits = after_last(run, draft.rows, verified.logits[:, : verified.queries.shape[1]], first)
    logits = run.suppress_mask(logits)
    verdict = rule(draft, logits, verified.queries, options.acceptance, options.sampling, run.canvas.uniforms)
    choice = verified_choice(draft, verdict, options.acceptance, keep_rejected=False)
    if options.acceptance.least_run and verdict.passed is not None:
        later = verdict.passed & (run.canvas.iteration[draft.rows] > 0)[:, None]
        choice.add(runs_of(later & ~choice.take, options.acceptance.least_run), draft.tokens, How.RATIO)
    return choice, draft.span_length, verdict.finite


def runs_of(found: Tensor, least: int) -> Tensor:
    """``[b, W]``: positions of ``found [b, W]`` that stand in a run of at least ``least``."""
    begins = found
    for k in range(1, least):
        begins = begins & F.pad(found[:, k:], (0, min(k, found.shape[1])))
    covered = begins
    for k in range(1, least):
        covered = covered | F.pad(begins[:, : max(0, found.shape[1] - k)], (min(k, found.shape[1]), 0))
    return covered


def force(run: Run, draft: InFlight, choice: Choice, sent: Tensor | None) -> None:
    """In each block that must go on and got fewer than ``min_tokens_per_step``: all other drafts from ``skip_threshold`` on if those are enough, else the
    likeliest. A row that exact acceptance has verified needs none."""
    least, threshold = run.options.acceptance.min_tokens_per_step, run.options.unmask.skip_threshold
    free = in_blocks(run, draft.masked & draft.open & ~choice.take)
    gained = in_blocks(run, choice.take).sum(-1)
    need = torch.minimum(least - gained, free.sum(-1)).clamp(min=0)
    if run.options.acceptance.acceptance == "exact" and sent is not None:
        need = need * (sent == 0)[:, None]
    ranking = in_blocks(run, draft.ranking)
    high = free & (ranking >= threshold)
    order = ranking.masked_fill(~free, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    top = free & (order < need[..., None])
    take = torch.where((high.sum(-1) >= need)[..., None], high, top) & (need > 0)[..., None]
    # Block by block, and in each the likeliest first.
    block = torch.arange(take.shape[1], device=take.device)[:, None] * 1000.0
    choice.add(take.flatten(1), draft.tokens, How.FORCED, (block - ranking).flatten(1))


def _lossless(options: StandardOptions) -> Lossless:
    blocks, pipeline = options.blocks, options.pipeline
    if isinstance(options, Options):
        acceptance = options.acceptance
        return self_speculative_losslessness(
            options,
            {
                "target_block_size above 1 verifies tokens together": acceptance.target_block_size > 1,
                "attention full lets the verifier see what it verifies": pipeline.attention == "full",
                "cache_ver_is_noop": options.cache.cache_ver_is_noop,
                "ssd_partial_ar_span takes tokens past a rejection": acceptance.ssd_partial_ar_span > 0,
                "ssd_threshold_draft_confidence rejects what the verifier accepts": acceptance.ssd_threshold_draft_confidence,
                "the published rule forces tokens in blocks that would stand still": (
                    acceptance.acceptance == "published"
                ),
                "floor_to_blocks may end the text earlier": blocks.floor_to_blocks and blocks.block_length > 1,
            },
        )
    if blocks.block_length == 1 and pipeline.block_add_threshold == 1.0 and pipeline.attention == "block":
        return Lossless(True, "block size 1, one at a time, is the reference, so it is exact by definition")
    return Lossless(False, "blocks in flight take tokens of one step independently of each other")


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind both ``generate`` functions of the family: split ``flat`` into call and options, check the latter, decode."""
    return decode(model, input_ids, *split_call(kind, options, {**flat, "uniforms": uniforms}))
