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
from shared.batch import Batch
from shared.diagnose import first_broken_layer
from shared.draft import Choice, Draft, How
from shared.errors import UserError
from shared.kv_cache import BlockCache
from shared.options import Cache
from shared.output import Completion, Lossless, Output
from shared.prompts import as_prompts
from shared.routing import Never, Policy, make_policy
from shared.sampling import GREEDY_BELOW, sample
from shared.uniforms import Uniforms
from shared.unmask import step_quota, unmask
from shared.verify import judge, losslessness, take_confident, verified_choice


@dataclass
class Run:
    """One decode in progress: the model, its options (resolved), and what the rows share."""

    model: SDARForCausalLM
    options: StandardOptions
    batch: Batch
    cache: BlockCache
    policy: Policy
    schedule: list[int]
    verify_mask: Tensor
    causal_mask: Tensor

    @property
    def cache_options(self) -> Cache:
        return getattr(self.options, "cache", Cache())

    def forward(self, kind: str, rows: Sequence[int], ids: Tensor, positions: Tensor, mask, logits_at=None) -> Tensor:
        """One pass over ``ids [b, T]`` of ``rows``; logits with the mask token ruled out unless the options allow it."""
        self.batch.count(kind, rows)
        window = self.cache.window(ids.shape[1], rows)
        logits = self.model(ids, positions, window, mask, logits_at=logits_at)
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
    on_block: Callable[[int, list[int]], None] | None = None,
    on_finish: Callable[[Completion], None] | None = None,
) -> Output:
    """Decode every prompt of ``input_ids`` (ids ``[P]`` or ``[B, P]``, or a list of id lists) -> `Output`.

    ``attention_mask`` marks padding in a ``[B, P]`` tensor. ``batch_size`` rows are in flight at a time (default: all). Randomness comes from
    ``(seed, index of the prompt)``, or from ``uniforms``, one recorded list per prompt. ``on_block(request, new_ids)`` is called as blocks
    finish, ``on_finish(completion)`` as texts do. ``requests`` numbers the prompts otherwise than 0, 1, 2, ... Raises `UserError` before any forward when a prompt or an option does not fit.
    """
    began = time.perf_counter()
    prompts = as_prompts(input_ids, attention_mask)
    options = resolve(model, options, tokenizer)
    check_prompts(prompts, options.blocks, model.config)
    run = start(model, prompts, options, requests, min(batch_size or len(prompts), len(prompts)), uniforms, seed)
    text_of = None if tokenizer is None else lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    done: dict[int, Completion] = {}
    while prefill(run) or run.batch.active:
        rows = run.batch.active
        draft = propose(run, rows)
        decision, picked = route(run, draft)
        choice = verify(run, rows, draft, picked)
        fill_quota(run, rows, draft, choice)
        run.policy.observe(draft, decision, choice.count)
        finished = write(run, rows, draft, choice, decision)
        if on_block:
            for i, _ in finished:
                on_block(run.batch.rows[i].request, run.batch.new_tokens(i))
        ended = [i for i, stop in finished if run.batch.ends(i, stop)]
        commit(run, draft, rows, [i for i, _ in finished if i not in ended or not options.savings.skip_last_commit])
        run.batch.advance([i for i, _ in finished if i not in ended])
        for i in ended:
            completion = run.batch.retire(
                i, trim=options.blocks.trim_stop_tokens, whole_blocks=options.blocks.round_to_blocks, decode=text_of
            )
            done[completion.request] = completion
            if on_finish:
                on_finish(completion)
    return Output(
        [done[k] for k in sorted(done)], time.perf_counter() - began, dict(run.batch.forwards), *_lossless(run.options)
    )


def start(model, prompts, options: StandardOptions, requests, rows: int, uniforms, seed: int) -> Run:
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
        cache=model.new_cache(rows, batch.capacity + length),
        policy=policy,
        schedule=step_quota(length, blocks.denoising_steps),
        verify_mask=masks.two_copy_verify(length, device),
        causal_mask=masks.token_causal(length, device),
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
    """Raise `UserError` for a prompt that is empty, holds ids it must not hold, or does not fit the model."""
    room = config.max_position_embeddings - blocks.max_new_tokens
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


def prefill(run: Run) -> bool:
    """Admit waiting prompts and encode their whole blocks, all in one forward. True if any came."""
    batch, length = run.batch, run.batch.block_length
    rows = batch.admit()
    run.cache.reset(rows)
    run.policy.reset(rows)
    rows_with_blocks = [i for i in rows if batch.rows[i].start]
    if rows_with_blocks:
        tokens = max(batch.rows[i].start for i in rows_with_blocks)
        device = run.cache.length.device
        causal = run.cache_options.cache_ver
        mask = masks.token_causal(tokens, device) if causal else masks.block_causal(tokens, length, device)
        ids = batch.tokens[batch.index(rows_with_blocks), :tokens]
        positions = torch.arange(tokens, device=device).expand_as(ids)
        # Shorter rows are padded with what follows their prompt: later tokens, which earlier ones never see.
        run.forward("prefill", rows_with_blocks, ids, positions, mask, logits_at=slice(0, 0))
        run.cache.commit([batch.rows[i].start for i in rows_with_blocks], rows_with_blocks)
    return bool(rows)


def propose(run: Run, rows: list[int]) -> Draft:
    """Denoise the current block of ``rows`` once and take a token and its confidence at every position."""
    batch, sampling = run.batch, run.options.sampling
    index = batch.index(rows)
    block = batch.block(index)
    masked = block == batch.mask_id
    mask = None
    if run.cache_options.draft_ver:
        mask = masks.causal_until(masked.int().argmax(-1), batch.block_length)
    logits = run.forward("draft", rows, block, batch.positions(index), mask)
    uniform = None
    if sampling.temperature >= GREEDY_BELOW:
        uniform = batch.uniforms.take(index, batch.block_length, batch.block_length)
    tokens, confidence = sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
    return Draft(index, block, masked, tokens, confidence, logits, batch.decoded[index], sampling)


def route(run: Run, draft: Draft) -> tuple[Tensor, list[int]]:
    """``(decision [b], rows of the draft to verify)``; reads the device only when the policy looks at the draft."""
    decision = run.policy.decide(draft)
    if run.policy.constant is not None:
        return decision, list(range(len(decision))) if run.policy.constant else []
    return decision, [k for k, verify in enumerate(decision.tolist()) if verify]


def verify(run: Run, rows: list[int], draft: Draft, picked: list[int]) -> Choice:
    """Verify the first masked span of the ``picked`` rows in one forward over [drafted block | L mask tokens] (S2D2, section 3)."""
    choice = Choice.none(draft)
    if picked:
        batch, options, everyone = run.batch, run.options, len(picked) == len(rows)
        index = batch.index(picked)
        part = draft if everyone else draft.select(index)
        filled = torch.where(part.masked, part.tokens, part.block)
        ids = torch.cat([filled, torch.full_like(filled, batch.mask_id)], 1)
        positions = batch.positions(part.rows).repeat(1, 2)
        second_half = slice(batch.block_length, None)
        logits = run.forward("verify", [rows[k] for k in picked], ids, positions, run.verify_mask, second_half)
        verdict = judge(part, logits, options.acceptance, options.sampling, batch.uniforms)
        chosen = verified_choice(part, verdict, options.acceptance)
        if everyone:
            choice = chosen
        else:
            choice.put(index, chosen)
    if isinstance(run.options, Options) and run.options.acceptance.always_check_high_confidence:
        take_confident(choice, draft, run.options.unmask)
    return choice


def fill_quota(run: Run, rows: list[int], draft: Draft, choice: Choice) -> None:
    """Top the step up to its quota by the unmasking rule, where verification has not reached it already."""
    quota, overtime = run.batch.quota(rows, run.schedule)
    remaining = (torch.minimum(quota, draft.masked.sum(-1)) - choice.count).clamp(min=0)
    eligible = draft.masked & ~choice.take
    take, key = unmask(
        draft, eligible, remaining, run.options.unmask, overtime=overtime, cap=isinstance(run.options, Options)
    )
    choice.add(take, draft.tokens, How.UNMASKED, key)


def write(run: Run, rows: list[int], draft: Draft, choice: Choice, decision: Tensor) -> list[tuple[int, bool]]:
    """`Batch.write`; if the logits were not finite, say in which layer that began."""
    try:
        return run.batch.write(rows, draft, choice, decision)
    except FloatingPointError as error:
        positions = run.batch.positions(draft.rows)
        layer = first_broken_layer(
            run.model.model.layers, lambda: run.forward("draft", rows, draft.block, positions, None)
        )
        raise FloatingPointError(f"{error}, first in {layer}") from None


def commit(run: Run, draft: Draft, rows: list[int], finished: list[int]) -> None:
    """Pass the final tokens of finished blocks through once and keep their keys and values."""
    if not finished:
        return
    batch, options = run.batch, run.cache_options
    index = batch.index(finished)
    mask = None
    if options.cache_ver:
        mask = run.causal_mask
    elif options.draft_ver:
        place = batch.index([rows.index(i) for i in finished])
        mask = masks.causal_until(draft.first_masked[place], batch.block_length)
    run.forward("commit", finished, batch.block(index), batch.positions(index), mask, logits_at=slice(0, 0))
    run.cache.commit([batch.block_length] * len(finished), finished)


def _lossless(options: StandardOptions) -> Lossless:
    if isinstance(options, Options):
        return losslessness(options)
    if options.blocks.block_length == 1:
        return Lossless(True, "block size one is the law itself")
    return Lossless(False, "plain block diffusion takes tokens of one step independently of each other")


_CALL_KEYWORDS = ("attention_mask", "seed", "batch_size", "tokenizer", "requests", "on_block", "on_finish")


def generate(
    kind: type[StandardOptions], model, input_ids, options: StandardOptions | None, uniforms, flat: dict
) -> Output:
    """Behind both ``block_diffusion_generate``: split ``flat`` into call keywords and options, check the latter, decode."""
    call = {name: flat.pop(name) for name in _CALL_KEYWORDS if name in flat}
    if options is not None and type(options) is not kind:
        raise UserError(f"options is a {type(options).__name__}. Allowed: {kind.__name__}")
    options = kind.from_flat(flat) if options is None else options.replace(**flat) if flat else options
    return decode(model, input_ids, options, uniforms=uniforms, **call)
