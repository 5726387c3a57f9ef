"""The family's proofs: exact acceptance, batches, the trace, stops, lengths, and what the published code gets wrong."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch

from fast_dllm_v2 import Fast_dLLM_QwenForCausalLM, reference
from fast_dllm_v2.generate_policy_utils import generate_ssd_policy
from fast_dllm_v2.generate_utils import generate_fast, generate_ssd
from fast_dllm_v2.modeling_fast import previous_row
from fast_dllm_v2.options import Options, StandardOptions
from shared.errors import UserError
from shared.policy.accept import Verdict
from tests import family_checks as checks

NO_STOP = {"stopping_criteria_idx": (), "mask_id": 255}
SMALL = {**NO_STOP, "block_length": 8, "small_block_length": 4, "max_new_tokens": 21, "confidence_threshold": 0.5}
LOSSLESS = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True}
PROMPTS = [*checks.draw_prompts(6, high=30), list(range(8)), list(range(16))]


@lru_cache(maxsize=1)
def family() -> checks.Family:
    folder = checks.golden_folder("Fast-dLLM-v2") / "model"
    return checks.Family(
        model=Fast_dLLM_QwenForCausalLM.from_pretrained(folder, dtype=torch.float64),
        decoders={
            "plain": (generate_fast, StandardOptions),
            "ssd": (generate_ssd, Options),
            "speculative": (generate_ssd_policy, Options),
        },
        reference=reference.generate,
        one={"block_length": 1, "small_block_length": 1},
    )


CACHED, STALE = {"use_block_cache": True}, {"use_block_cache": True, "refresh_block_cache": False}
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
DRAFT_VER = {"draft_ver": True, "cache_ver": True}
SCORE = {
    "do_verify_policy": "score_threshold", "do_verify_score_type": "difference_static", "score_penalty_coef": 0.8,
}  # fmt: skip
PLAIN = {
    "default": {},
    "small8": {"small_block_length": 8},
    "small2-block16": {"small_block_length": 2, "block_length": 16},
    "small1": {"small_block_length": 1},
    "block1": {"block_length": 1, "small_block_length": 1},
    "one-a-step": {"confidence_threshold": 1.0},
    "sampled": SAMPLED,
    "sampled-greedy-next": {**SAMPLED, "greedy_next": True},
    "cached": CACHED,
    "cached-small2-block16": {**CACHED, "small_block_length": 2, "block_length": 16},
    "cached-sampled": {**CACHED, **SAMPLED},
    "stale": STALE,
    "stale-small2": {**STALE, "small_block_length": 2, "confidence_threshold": 0.6},
    "rounded": {"round_to_blocks": True, "trim_stop_tokens": False},
    "rounded-sampled": {**SAMPLED, "round_to_blocks": True, "max_new_tokens": 8},
    "rounded-to-nothing": {"round_to_blocks": True, "max_new_tokens": 7},
    "stops": {"stopping_criteria_idx": tuple(range(0, 250, 11)), "trim_stop_tokens": False},
    "mask-allowed": {"suppress_mask": False},
}
SPECULATIVE = {
    "span1": {},
    "span3": {"min_ssd_span_length": 3},
    "span4-legacy": {"small_block_length": 8, "min_ssd_span_length": 4, "legacy_ssd_span_strategy": True},
    "small8": {"small_block_length": 8},
    "small1": {"small_block_length": 1},
    "cached": CACHED,
    "cached-draft_ver": {**CACHED, **DRAFT_VER, "min_ssd_span_length": 3},
    "cached-sampled": {**CACHED, **SAMPLED, "cache_ver": True},
    "stale": STALE,
    "stale-sampled": {**STALE, **SAMPLED, "min_ssd_span_length": 2},
    "stale-draft_ver": {**STALE, "draft_ver": True, "small_block_length": 2},
    "cache_ver": {"cache_ver": True},
    "draft_ver": {**DRAFT_VER, "min_ssd_span_length": 3},
    "draft_ver-small_block": {**DRAFT_VER, "small_block_length": 2, "draft_ver_rows": "small_block", "block_length": 16},
    "draft_ver-only-never": {"draft_ver": True, "do_verify_policy": "never", "small_block_length": 2},
    "exact": LOSSLESS,
    "exact-draft_ver-small8": {**LOSSLESS, "draft_ver": True, "small_block_length": 8},
    "exact-cached": {**LOSSLESS, **CACHED},
    "exact-sampled": {**LOSSLESS, "temperature": 0.8},
    "exact-sampled-small1": {**LOSSLESS, "temperature": 0.8, "small_block_length": 1},
    "exact-span3": {**LOSSLESS, "do_verify_policy": "mask_span_length", "min_ssd_span_length": 3},
    "no-resample": {"allow_resample": False, "small_block_length": 8},
    "no-resample-sampled": {**SAMPLED, "allow_resample": False, "ssd_ratio_tempering_factor": 2.0, "cache_ver": True},
    "tempered": {"ssd_ratio_tempering_factor": 0.3, "small_block_length": 8, "cache_ver": True},
    "verify-temperature": {"verify_temperature": 0.5, "top_p": 0.9},
    "ratio": {"ssd_ratio_threshold": 0.2, "small_block_length": 8},
    "ratio-all-spans": {"ssd_ratio_threshold": 0.2, "ssd_threshold_all_spans": True, "small_block_length": 8},
    "confident": {"always_check_high_confidence": True, "min_ssd_span_length": 3, "small_block_length": 8},
    "score-margin": {**SCORE, "token_acceptance_estimator": "hard_margin_threshold"},
    "score-entropy": {**SCORE, "token_acceptance_estimator": "hard_entropy_threshold", "ssd_entropy_threshold": 0.4},
    "score-power-dynamic": {
        **SCORE, "token_acceptance_estimator": "soft_confidence_power", "do_verify_score_type": "difference_dynamic",
    },
    "score-linear": {**SCORE, "token_acceptance_estimator": "soft_clipped_linear_margin"},
    "score-negexp": {**SCORE, "token_acceptance_estimator": "soft_entropy_negexp"},
    "score-renyi": {**SCORE, "token_acceptance_estimator": "soft_renyi_2_entropy"},
    "hysteresis": {
        "do_verify_policy": "score_hysteresis", "do_verify_score_type": "difference_static", "score_penalty_coef": 0.0,
        "hysteresis_threshold_on": 0.9, "hysteresis_threshold_off": 0.4, "token_acceptance_estimator": "soft_entropy_negexp",
    },
    "bandit": {"do_verify_policy": "contextual_bandit_ucb", "ucb_beta": 0.4, "ucb_entropy_bins": 3, "small_block_length": 8},
    "bandit-masked-cached": {**CACHED, "do_verify_policy": "contextual_bandit_ucb", "ucb_entropy_source": "masked"},
    "rounded-stops": {**SAMPLED, "round_to_blocks": True, "stopping_criteria_idx": tuple(range(0, 250, 17))},
}  # fmt: skip
UNSAVED = {"plain": {"skip_last_commit": False}, "speculative": {"skip_last_commit": False, "reuse_verify": False}}
EVERY = [("plain", n, f) for n, f in PLAIN.items()] + [("speculative", n, f) for n, f in SPECULATIVE.items()]


def settings(wanted):
    """Those of `EVERY` for which ``wanted(decoder, flat)`` holds, as parameters of a test."""
    flat = {**SMALL, "confidence_threshold": 0.3}
    cases = [pytest.param(d, {**flat, **f}, id=f"{d}-{n}") for d, n, f in EVERY if wanted(d, f)]
    return pytest.mark.parametrize(("decoder", "flat"), cases)


@settings(lambda decoder, flat: True)
def test_equals_reference(decoder, flat):
    checks.check_equals_reference(family(), decoder, flat, PROMPTS[-5:])


@settings(lambda decoder, flat: decoder == "plain" or flat.get("cache_ver"))
def test_unsaved_equals_reference(decoder, flat):
    checks.check_equals_reference(family(), decoder, {**flat, **UNSAVED[decoder]}, PROMPTS[-2:])


def autoregressive(prompt: list[int], count: int) -> list[int]:
    """The definition of block size one: the next token is the argmax of a causal forward over everything before it."""
    model, ids = family().model, list(prompt)
    for _ in range(count):
        positions = torch.arange(len(ids))[None]
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        logits = model(torch.tensor([ids]), positions, None, causal)[0, -1]
        logits[255] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_block_size_one_is_autoregressive():
    one = {**SMALL, "block_length": 1, "small_block_length": 1}
    out = family().run("plain", PROMPTS, one)
    assert out.tokens == [autoregressive(p, 21) for p in PROMPTS]
    assert out.lossless
    for text in out.completions:
        assert text.trace.total_forwards == 21, "the prefill gives the first token, each commit one more"


@pytest.mark.parametrize("draft_ver", [False, True])
@pytest.mark.parametrize("block_cache", [False, True])
@pytest.mark.parametrize("small", [2, 8])
def test_exact_greedy_is_block_size_one(small, block_cache, draft_ver):
    """Also for prompts of whole blocks, and for the prompt of exactly one block that the published code does not look at."""
    flat = {**SMALL, **LOSSLESS, "small_block_length": small, "use_block_cache": block_cache, "draft_ver": draft_ver}
    out = family().run("speculative", PROMPTS, flat)
    assert out.lossless
    assert out.tokens == [autoregressive(p, 21) for p in PROMPTS]
    assert all(c.uniforms_used == 0 for c in out.completions)


def test_exact_distribution_of_the_family():
    flat = {k: v for k, v in SMALL.items() if k != "block_length"} | {"block_length": 8}
    checks.check_exact_greedy_is_block_size_one(family(), flat, PROMPTS)


POLICIES = [
    {"do_verify_policy": "always"},
    {"do_verify_policy": "mask_span_length", "min_ssd_span_length": 3},
    {
        "do_verify_policy": "score_threshold",
        "score_penalty_coef": 0.5,
        "token_acceptance_estimator": "soft_confidence_power",
    },
    {"do_verify_policy": "score_hysteresis", "token_acceptance_estimator": "soft_clipped_linear_margin"},
    {"do_verify_policy": "contextual_bandit_ucb", "token_acceptance_estimator": "hard_entropy_threshold"},
    {"temperature": 0.8, "draft_ver": True, "cache_ver": True},
    {"use_block_cache": True},
]


@pytest.mark.parametrize("extra", POLICIES, ids=lambda e: " ".join(map(str, e.values())))
def test_batch_equals_alone(extra):
    checks.check_batch_equals_alone(family(), "speculative", {**SMALL, **extra}, PROMPTS, 3)


@pytest.mark.parametrize("extra", [*POLICIES, LOSSLESS], ids=lambda e: " ".join(map(str, e.values())))
def test_graphs_change_nothing(extra, monkeypatch):
    checks.check_graphs_change_nothing(family(), "speculative", {**SMALL, **extra}, PROMPTS, 3, monkeypatch)


@pytest.mark.parametrize("extra", [{}, {"use_block_cache": True}, {"temperature": 1.0}], ids=str)
def test_plain_batch_equals_alone(extra):
    checks.check_batch_equals_alone(family(), "plain", {**SMALL, **extra}, PROMPTS, 3)


@pytest.mark.parametrize("decoder", ["plain", "speculative"])
@pytest.mark.parametrize("small", [1, 4, 8])
def test_trace_covers(decoder, small):
    checks.check_trace_covers(family(), decoder, {**SMALL, "small_block_length": small}, PROMPTS)


@pytest.mark.parametrize("decoder", ["plain", "speculative"])
def test_stop_trims(decoder):
    checks.check_stop_trims(family(), decoder, SMALL, PROMPTS)


@pytest.mark.parametrize("decoder", ["plain", "ssd", "speculative"])
def test_unknown_option(decoder):
    checks.check_unknown_option(family(), decoder)


def test_never_is_plain():
    checks.check_never_is_plain(family(), SMALL, PROMPTS)


def reject_everything(draft, verifier_logits, queries, options, sampling, uniforms) -> Verdict:
    """A verifier that finds nothing worth keeping and has nothing to put there."""
    nothing, finite = torch.zeros_like(draft.span), torch.ones_like(draft.rows, dtype=torch.bool)
    return Verdict(nothing, draft.span, None, torch.zeros_like(draft.confidence), finite)


@pytest.mark.parametrize("more", [{}, SAMPLED, DRAFT_VER], ids=str)
@pytest.mark.parametrize("cache", [{}, CACHED, STALE], ids=str)
@pytest.mark.parametrize("small", [2, 8])
def test_rejecting_everything_is_plain(small, cache, more):
    """A verify leaves nothing behind: not in the block cache, not in what later drafts see, not in the random numbers."""
    flat = {**SMALL, "confidence_threshold": 0.3, "small_block_length": small, "max_new_tokens": 13, **cache, **more}
    rejected, never = (
        family().run(
            "speculative", PROMPTS[::2], {**flat, "do_verify_policy": p}, batch_size=3, accept_rule=reject_everything
        )
        for p in ("always", "never")
    )
    assert [c.trace.order() for c in rejected.completions] == [c.trace.order() for c in never.completions]
    assert [c.uniforms_used for c in rejected.completions] == [c.uniforms_used for c in never.completions]
    assert rejected.forwards["verify"] == rejected.forwards["draft"] == never.forwards["draft"]
    plain = never if "draft_ver" in flat else family().run("plain", PROMPTS[::2], flat, batch_size=3)
    assert rejected.tokens == never.tokens == plain.tokens


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("decoder", ["plain", "speculative"])
def test_length_is_max_new_tokens(decoder, count):
    out = family().run(decoder, PROMPTS, {**SMALL, "max_new_tokens": count})
    assert [len(t) for t in out.tokens] == [count] * len(PROMPTS)


def test_savings_never_change_the_text():
    flat = {**SMALL, **LOSSLESS}
    saved, full = (
        family().run("speculative", PROMPTS, {**flat, "reuse_verify": on, "skip_last_commit": on})
        for on in (True, False)
    )
    assert saved.tokens == full.tokens
    assert sum(saved.forwards.values()) < sum(full.forwards.values())


def test_rounded_texts_have_the_token_after_their_last_block_whatever_is_saved():
    flat = {**SMALL, "round_to_blocks": True, "max_new_tokens": 16}
    saved, full = (family().run("plain", PROMPTS, {**flat, "skip_last_commit": on}) for on in (True, False))
    assert saved.tokens == full.tokens
    assert [len(p) + len(t) for p, t in zip(PROMPTS, saved.tokens, strict=True)] == [
        len(p) // 8 * 8 + 16 + 1 for p in PROMPTS
    ]


@pytest.mark.parametrize("block_length", [1, 8])
def test_sampled_savings_never_change_the_text(block_length):
    flat = {**SMALL, **LOSSLESS, "temperature": 1.0, "block_length": block_length, "small_block_length": 1}
    saved, full = (
        family().run("speculative", PROMPTS, {**flat, "reuse_verify": on, "skip_last_commit": on}, seed=3)
        for on in (True, False)
    )
    assert saved.tokens == full.tokens
    assert [c.uniforms_used for c in saved.completions] == [c.uniforms_used for c in full.completions]
    other = family().run("speculative", PROMPTS, flat, seed=4)
    assert all(a != b for a, b in zip(saved.tokens, other.tokens, strict=True)), "texts are drawn"


@pytest.mark.parametrize("flat", [{"block_length": 1}, {"max_new_tokens": 1}, {"small_block_length": 4}], ids=str)
def test_numbers_that_break_name_their_layer(flat):
    """In a prefill, in a commit, and in a draft."""
    broken = copy.deepcopy(family().model)
    broken.model.layers[2].mlp.down_proj.weight.data[0] = float("nan")
    flat = {**SMALL, "small_block_length": 1, **flat}
    with pytest.raises(FloatingPointError, match=r"request 0, .*NaN or infinity, first in layer 2"):
        generate_fast(broken, [list(range(8))], **flat)


def test_an_unrefreshed_block_cache_is_as_published_with_s2d2():
    """A draft goes within the small block from the second of a block on, so a block costs one whole draft."""
    flat = {**SMALL, "use_block_cache": True, "do_verify_policy": "never", "small_block_length": 2}
    stale, fresh = (family().run("speculative", PROMPTS, {**flat, "refresh_block_cache": on}) for on in (False, True))
    assert stale.tokens != fresh.tokens
    assert stale.batch_tokens["draft"] < fresh.batch_tokens["draft"]


def test_prompt_of_one_block_is_seen():
    one, other = family().run("plain", [[1] * 8, [2] * 8], SMALL).tokens
    assert one != other


def test_mask_is_never_predicted():
    assert all(255 not in t for t in family().run("plain", PROMPTS, {**SMALL, "confidence_threshold": 0.0}).tokens)


def test_small_block_must_divide_the_block():
    with pytest.raises(UserError, match=r"small_block_length is 3\. Allowed: a divisor of block_length \(8\)"):
        family().run("plain", [[1, 2]], {**SMALL, "small_block_length": 3})


def test_published_cache_of_s2d2_is_refused():
    family().run("ssd", [[1, 2]], {**SMALL, "use_ssd_cache": False})
    with pytest.raises(UserError, match="use_ssd_cache is True"):
        family().run("ssd", [[1, 2]], {**SMALL, "use_ssd_cache": True})


def test_ssd_has_one_policy():
    with pytest.raises(UserError, match="Allowed with ssd: mask_span_length"):
        family().run("ssd", [[1, 2]], {**SMALL, "do_verify_policy": "always"})
    with pytest.raises(UserError, match="Allowed with ssd: mask_span_length"):
        generate_ssd(family().model, [[1, 2]], Options.from_flat(SMALL), do_verify_policy="always")
    with pytest.raises(UserError, match="options is a StandardOptions"):
        generate_ssd(family().model, [[1, 2]], StandardOptions.from_flat(SMALL))


@pytest.mark.parametrize("count", [1, 9, 21])
@pytest.mark.parametrize("small", [1, 4])
def test_stream_is_the_text(small, count):
    """The ids given as small blocks finish are those of the text."""
    streamed: dict[int, list[int]] = {}
    flat = {**SMALL, "small_block_length": small, "max_new_tokens": count}
    out = family().run("plain", PROMPTS, flat, on_block=lambda k, ids: streamed.setdefault(k, []).extend(ids))
    assert [streamed[k] for k in range(len(PROMPTS))] == out.tokens


def test_previous_row():
    assert previous_row(torch.arange(4)).tolist() == [0, 0, 1, 2]


class Letters:
    """Decodes ids as letters, which is all a stop string needs of a tokenizer."""

    def decode(self, ids, skip_special_tokens=True) -> str:
        return "".join(chr(65 + i) for i in ids)


@pytest.mark.parametrize("small", [1, 4])
@pytest.mark.parametrize("skip_last_commit", [False, True])
def test_stop_strings_end_a_text(small, skip_last_commit):
    settings = {**SMALL, "small_block_length": small, "skip_last_commit": skip_last_commit, "tokenizer": Letters()}
    whole = family().run("plain", PROMPTS, settings)
    stop = whole.texts[0][6:8]
    cut = family().run("plain", PROMPTS, {**settings, "stop": [stop]})
    assert cut.texts == [text.split(stop)[0] for text in whole.texts]
    assert len(cut.texts[0]) <= 6
    assert [c.tokens for c in cut.completions] == [t[: len(x)] for t, x in zip(whole.tokens, cut.texts, strict=True)]
    assert cut.completions[0].trace.total_forwards < whole.completions[0].trace.total_forwards
