"""Accept rules: what of a drafted span stands against the verifier's logits. Tensors in, accepted prefix and replacement out.

`accept_span` has the two rules of S2D2. ``published``: a draft is accepted when ``u < min(1, q/p)`` even if it is the argmax of ``p``; the first
rejected position takes a token from the normalised positive part of ``q - p``. ``exact``: lossless; for greedy decoding a draft
is accepted while it is the verifier's argmax, for sampling the published rule on drafts really drawn from ``p`` is already the
speculative-sampling rule of Leviathan et al. 2023 (algorithm 1). `sample_and_match` is lossless for drafts from anywhere: the verifier draws its own
token at every position, and drafts are accepted while they are those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.options import Acceptance, Sampling, Unmask
from shared.output import Lossless, losslessness
from shared.policy.draft import Choice, Draft
from shared.policy.sampling import GREEDY_BELOW, greedy, inverse_cdf, log_weights, sample
from shared.policy.uniforms import Uniforms
from shared.trace import How


@dataclass(frozen=True)
class Verdict:
    """Outcome per position ``[b, L]``: ``accepted`` prefix of the span, ``rejected`` (at most one, the first), the ``replacement`` token
    to write there (None: the draft is kept) and the acceptance ``ratio``. ``finite [b]``: were the verifier's logits numbers? ``passed``: positions of the
    span that stand for themselves, whatever comes before them (None: the rule does not tell)."""

    accepted: Tensor
    rejected: Tensor
    replacement: Tensor | None
    ratio: Tensor
    finite: Tensor
    passed: Tensor | None = None


def accepted_length(passed: Tensor, span: Tensor) -> Tensor:
    """``[b]``: how many positions of ``span [b, M]`` come before its first that has not ``passed [b, M]``."""
    return ((passed | ~span).cumprod(-1) * span).sum(-1)


def acceptance_ratio(q: Tensor, p: Tensor, tempering: float) -> Tensor:
    """``min(1, (q / p) ** tempering)`` of drafted tokens, from their probabilities under verifier and drafter."""
    ratio = q / p.clamp_min(1e-12)
    return (ratio if tempering == 1.0 else ratio**tempering).clamp(max=1.0)


def residual(target: Tensor, draft_probs: Tensor) -> Tensor:
    """Normalised ``max(q - p, 0)``, ``[b, V]``; ``q`` itself where that has no mass or is not finite."""
    positive = (target - draft_probs).clamp_min(0)
    mass = positive.sum(-1, keepdim=True)
    usable = torch.isfinite(mass) & (mass > 0)
    return torch.where(usable, positive / mass.where(usable, torch.ones_like(mass)), target)


def in_block(values: Tensor, queries: Tensor, length: int) -> Tensor:
    """``values [b, M]`` at ``queries [b, M]`` -> ``[b, L]`` at their positions, zero elsewhere (a query of ``L`` is padding)."""
    room = torch.zeros(len(values), length + 1, dtype=values.dtype, device=values.device)
    return room.scatter(1, queries, values)[:, :length]


def accept_span(
    draft: Draft, verifier_logits: Tensor, queries: Tensor, options: Acceptance, sampling: Sampling, uniforms: Uniforms
) -> Verdict:
    """Accept or reject the span of every row.

    ``verifier_logits [b, M, V]``: block-size-one logits of the in-block positions ``queries [b, M]``, ascending, which cover the span (a query of
    ``L`` is padding). The random rule takes one uniform per span position, all before any is used, then one more in rows with a rejection to
    replace.
    """
    length = draft.tokens.shape[1]
    at = queries.clamp(max=length - 1)
    in_span = draft.span.gather(1, at) & (queries < length)
    tokens = draft.tokens.gather(1, at)
    exact_greedy = options.acceptance == "exact" and sampling.temperature < GREEDY_BELOW
    ratio, in_order = None, torch.arange(len(tokens), device=tokens.device)
    if not exact_greedy or options.ssd_ratio_threshold >= 0:
        target = log_weights(verifier_logits, sampling).softmax(-1)
        q = target.gather(-1, tokens[..., None])[..., 0]
        ratio = acceptance_ratio(q, draft.confidence.gather(1, at), options.ssd_ratio_tempering_factor)
    if exact_greedy:
        best, sure = greedy(verifier_logits)
        finite = torch.isfinite(sure)
        passed = (tokens == best) & finite
    else:
        finite = torch.isfinite(ratio)
        numbers = uniforms.take(draft.rows, length, draft.span_length)
        passed = numbers.gather(1, (queries - draft.first_masked[:, None]).clamp(0, length - 1)) < ratio
    if options.least_confidence is not None:
        passed = passed & (draft.confidence.gather(1, at) > options.least_confidence)
    count = accepted_length(passed, in_span)
    # The query of the first rejected position, any query where none is rejected.
    rejected = (in_span.int().argmax(-1) + count).clamp(max=queries.shape[1] - 1)
    replacement, replaced = None, count < draft.span_length
    if exact_greedy:
        replacement = best[in_order, rejected]
    elif options.allow_resample:
        if options.least_target is not None:
            replaced = replaced & (q[in_order, rejected] >= options.least_target)
        left = residual(target[in_order, rejected], draft.log_weights_at(at[in_order, rejected]).softmax(-1))
        replacement = inverse_cdf(left, uniforms.take(draft.rows, 1, replaced)[:, 0])
    return Verdict(
        accepted=draft.span & (draft.offset_in_span < count[:, None]),
        rejected=draft.span & (draft.offset_in_span == count[:, None]) & replaced[:, None],
        replacement=None if replacement is None else replacement[:, None].expand_as(draft.tokens),
        ratio=torch.zeros_like(draft.confidence) if ratio is None else in_block(ratio, queries, length),
        finite=finite.all(-1),
        passed=in_block(passed & in_span, queries, length) if options.least_run else None,
    )


def sample_and_match(
    drafted: Tensor, logits: Tensor, uniforms: Tensor | None, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """``(accepted [b], tokens [b, S + 1])``: how many of the ``drafted [b, S]`` are what the verifier takes itself, and what it takes.

    ``logits [b, S + 1, V]`` predict the drafted tokens and the one after them. Every position has a uniform of its own, ``uniforms [b, S + 1]`` (None:
    greedy), and drafts use none of them. So ``tokens[:, : accepted + 1]`` is what the verifier would have sampled alone with the same numbers, token for
    token, whatever was drafted and however much of it was sent.
    """
    tokens, _ = sample(logits, uniforms, sampling.temperature, sampling.top_k, sampling.top_p)
    return (drafted == tokens[:, :-1]).cumprod(-1).sum(-1), tokens


def verified_choice(draft: Draft, verdict: Verdict, options: Acceptance, *, keep_rejected: bool = True) -> Choice:
    """The tokens a verified step decides: the accepted prefix, the first rejected position, and the ratio side door if it is open.

    Without a replacement the rejected draft is kept, or stays masked unless ``keep_rejected``.
    """
    how, tokens = verdict.accepted * int(How.ACCEPTED), draft.tokens
    if verdict.replacement is not None:
        how = how + verdict.rejected * int(How.RESAMPLED)
        tokens = torch.where(verdict.rejected, verdict.replacement, tokens)
    elif keep_rejected:
        how = how + verdict.rejected * int(How.KEPT)
    choice = Choice(tokens, how, draft.offset_in_span, (how != How.NONE).sum(-1))
    if options.ssd_ratio_threshold >= 0:
        reach = draft.masked if options.ssd_threshold_all_spans else draft.span
        choice.add(reach & (verdict.ratio >= options.ssd_ratio_threshold), draft.tokens, How.RATIO)
    return choice


def take_confident(choice: Choice, draft: Draft, options: Unmask) -> None:
    """Add every position that may be filled and whose draft is above ``confidence_threshold`` (``always_check_high_confidence``)."""
    confident = draft.fillable & (draft.confidence > options.confidence_threshold)
    choice.add(confident, draft.tokens, How.CONFIDENT, -draft.confidence)


def self_speculative_losslessness(options, more: Mapping[str, bool] | None = None) -> Lossless:
    """Whether ``options`` make a self-speculative decoder (S2D2) follow block-size-one decoding exactly, and the reason.

    ``options`` has the groups ``sampling, blocks`` (resolved), ``acceptance, routing, cache``. Without ``denoising_steps`` a step has no quota to fill.
    ``more``: reasons of the family's own, and whether each holds.
    """
    acceptance, routing, greedily = options.acceptance, options.routing, options.sampling.temperature < GREEDY_BELOW
    broken = {
        "cache_ver is off, so committed keys are not the verifier's": not options.cache.cache_ver,
        f"policy {routing.do_verify_policy} may skip verification": not (
            routing.do_verify_policy == "always"
            or (routing.do_verify_policy == "mask_span_length" and routing.min_ssd_span_length == 1)
        ),
        "fewer denoising_steps than block_length add unverified tokens": (
            getattr(options.blocks, "denoising_steps", options.blocks.block_length) < options.blocks.block_length
        ),
        "ssd_ratio_threshold takes tokens past a rejection": acceptance.ssd_ratio_threshold >= 0,
        "always_check_high_confidence takes unverified tokens": acceptance.always_check_high_confidence,
        "suppress_mask is off, so a predicted mask token would be context": not options.sampling.suppress_mask,
        "ssd_ratio_tempering_factor bends the acceptance ratio": acceptance.ssd_ratio_tempering_factor != 1.0,
        "allow_resample is off, so rejected drafts are not replaced": not acceptance.allow_resample,
        "the published rule is random on argmax drafts (acceptance exact is not)": (
            acceptance.acceptance == "published" and greedily
        ),
    }
    return losslessness({**(more or {}), **broken}, "greedy text" if greedily else "sampling distribution")
