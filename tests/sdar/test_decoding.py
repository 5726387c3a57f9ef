"""SDAR's decoders against their definition and against each other, on the recorded random checkpoint in float64."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch

from sdar import SDARForCausalLM, generate, generate_ssd_policy, reference
from sdar.options import PRESETS, Options, StandardOptions
from shared.errors import UserError
from shared.policy.accept import accept_span
from tests import family_checks as checks

FOLDER = checks.golden_folder("SDAR")


@lru_cache(maxsize=1)
def family() -> checks.Family:
    model = SDARForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float64)
    return checks.Family(
        model,
        {
            "plain": (generate.block_diffusion_generate, StandardOptions),
            "speculative": (generate_ssd_policy.block_diffusion_generate, Options),
        },
        reference.generate,
    )


BASE = {"block_length": 8, "max_new_tokens": 21, "confidence_threshold": 0.6, "stopping_criteria_idx": ()}
SHORT = {"max_new_tokens": 13}  # two blocks or three: what a block leaves to the next is read
PLAIN = {
    "static": {"remasking_strategy": "low_confidence_static"},
    "static-steps3": {"remasking_strategy": "low_confidence_static", "denoising_steps": 3},
    "static-steps20": {"remasking_strategy": "low_confidence_static", "denoising_steps": 20},
    "dynamic": {},
    "dynamic-sampled": {"temperature": 0.9, "top_k": 30, "top_p": 0.95},
    "sequential": {"remasking_strategy": "sequential", "denoising_steps": 4},
    "entropy": {"remasking_strategy": "entropy_bounded", "eb_threshold": 2.0},
    "entropy-overtime": {"remasking_strategy": "entropy_bounded", "eb_threshold": 0.01, "denoising_steps": 2},
    "blocksum": {"remasking_strategy": "entropy_bounded_blocksum", "eb_threshold": 4.0},
    "block1": {"block_length": 1},
    "block16": {"block_length": 16, "round_to_blocks": True, "trim_stop_tokens": False},
    "commit-last": {"skip_last_commit": False, "fuse_commit": False},
}
SCORE = {"do_verify_policy": "score_threshold", "do_verify_score_type": "difference_static", "score_penalty_coef": 0.8}
SPECULATIVE = {
    "span1": {},
    "span3": {"min_ssd_span_length": 3},
    "span4-legacy": {"min_ssd_span_length": 4, "legacy_ssd_span_strategy": True},
    "always-exact": {"do_verify_policy": "always", "acceptance": "exact", "cache_ver": True},
    "always-exact-draft_ver": {
        "do_verify_policy": "always", "acceptance": "exact", "cache_ver": True, "draft_ver": True,
    },
    "exact-sampled": {"acceptance": "exact", "temperature": 0.8, "cache_ver": True},
    "draft_ver": {"draft_ver": True, "min_ssd_span_length": 4},
    "no-resample": {"allow_resample": False, "ssd_ratio_tempering_factor": 2.0},
    "ratio": {"ssd_ratio_threshold": 0.3, "denoising_steps": 3},
    "ratio-all-spans": {"ssd_ratio_threshold": 0.2, "ssd_threshold_all_spans": True, "min_ssd_span_length": 2},
    "confident": {"always_check_high_confidence": True, "min_ssd_span_length": 5},
    "sampled": {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "verify-temperature": {"verify_temperature": 0.5, "top_p": 0.9},
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
    "bandit": {"do_verify_policy": "contextual_bandit_ucb", "ucb_beta": 0.4, "ucb_entropy_bins": 3},
    "bandit-masked": {"do_verify_policy": "contextual_bandit_ucb", "ucb_entropy_source": "masked", "cache_ver": True},
    "never-sequential": {"do_verify_policy": "never", "remasking_strategy": "sequential", "denoising_steps": 3},
    "entropy-capped": {"min_ssd_span_length": 5, "remasking_strategy": "entropy_bounded", "eb_threshold": 3.0, "denoising_steps": 3},
}  # fmt: skip
UNSAVED = {"skip_last_commit": False, "fuse_commit": False, "reuse_verify": False, "short_verify": False}
EVERY = [("plain", n, f) for n, f in PLAIN.items()] + [("speculative", n, f) for n, f in SPECULATIVE.items()]
each_setting = pytest.mark.parametrize(
    ("decoder", "flat"), [pytest.param(d, {**BASE, **f}, id=f"{d}-{n}") for d, n, f in EVERY]
)


@each_setting
def test_equals_reference(decoder, flat):
    checks.check_equals_reference(family(), decoder, flat, checks.draw_prompts(5, seed=1))


@each_setting
def test_a_saving_changes_forwards_and_nothing_else(decoder, flat):
    """Each saving alone, against none: same ids, same steps; never more forwards, and fewer where it applies."""
    prompts, flat = checks.draw_prompts(4, seed=8), {**flat, **SHORT, **UNSAVED}
    plain = family().run(decoder, prompts, flat, seed=5)
    for saving in UNSAVED:
        saved = family().run(decoder, prompts, {**flat, saving: True}, seed=5)
        assert saved.tokens == plain.tokens, saving
        assert [c.trace.order() for c in saved.completions] == [c.trace.order() for c in plain.completions], saving
        before, after = plain.forwards, saved.forwards
        assert all(after[k] == before[k] for k in ("prefill", "draft", "verify")), saving
        if saving in ("skip_last_commit", "fuse_commit") or (
            saving == "reuse_verify" and flat.get("cache_ver") and flat.get("acceptance") == "exact"
        ):
            assert after["commit"] < before["commit"], saving
        else:
            assert after["commit"] <= before["commit"], saving


@each_setting
def test_unsaved_equals_reference(decoder, flat):
    checks.check_equals_reference(family(), decoder, {**flat, **UNSAVED}, checks.draw_prompts(2, seed=9))


def test_other_options_get_graphs_of_their_own(monkeypatch):
    """Decodes one after the other on one engine: what lies between forwards depends on the options, and so do its graphs."""
    model, prompts = family().model, checks.draw_prompts(3, seed=13)
    settings = [{"temperature": 0.9}, {}, {"acceptance": "exact"}, {"temperature": 0.9, "top_k": 3}, {}]
    run = lambda flat: family().run("speculative", prompts, {**BASE, "cache_ver": True, **flat}, seed=4).tokens  # noqa: E731
    plain = [run(flat) for flat in settings]
    phases, engines = checks.see_only_what_was_staged(monkeypatch), set()
    try:
        for flat, want in zip(settings, plain, strict=True):
            assert run(flat) == want, flat
            engines.add(id(model.engine))
    finally:
        model.engine = None
    assert len(engines) == 1, "forwards are the same whatever the options"
    assert len(phases) == len(settings)


@each_setting
def test_graphs_change_nothing(decoder, flat, monkeypatch):
    # Of five rows three are no captured size: a graph of four serves them, with a row of padding.
    short = {**flat, **SHORT}
    checks.check_graphs_change_nothing(family(), decoder, short, checks.draw_prompts(6, seed=12), 5, monkeypatch)


@pytest.mark.parametrize(
    ("decoder", "flat", "first"),
    [pytest.param(d, {**BASE, **f}, k % 5, id=f"{d}-{n}") for k, (d, n, f) in enumerate(EVERY)],
)
def test_batch_equals_alone(decoder, flat, first):
    """Among 32 rows, and three at a time. Every fifth of the 32 texts, others with the next setting: each with seven settings or more."""
    prompts = checks.draw_prompts(32, seed=7, high=60)
    checks.check_batch_equals_alone(family(), decoder, flat, prompts, 32, 3, texts=range(first, 32, 5))


@each_setting
def test_trace_covers_every_position_once(decoder, flat):
    checks.check_trace_covers(family(), decoder, flat, checks.draw_prompts(3, seed=3))


@pytest.mark.parametrize("decoder", ["plain", "speculative"])
def test_stop_trims(decoder):
    checks.check_stop_trims(family(), decoder, {**BASE, "max_new_tokens": 40}, checks.draw_prompts(6, seed=4))


@pytest.mark.parametrize("decoder", ["plain", "speculative"])
def test_unknown_option(decoder):
    checks.check_unknown_option(family(), decoder)


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential"])
def test_never_is_plain(strategy):
    checks.check_never_is_plain(family(), {**BASE, "remasking_strategy": strategy}, checks.draw_prompts(6, seed=5))


@pytest.mark.parametrize("draft_ver", [False, True])
@pytest.mark.parametrize("block_length", [4, 8, 16])
def test_exact_greedy_is_block_size_one(block_length, draft_ver):
    flat = {**BASE, "block_length": block_length, "max_new_tokens": 40}
    prompts = checks.draw_prompts(8, seed=6)
    lossless = {**flat, "draft_ver": draft_ver} if draft_ver else flat
    if draft_ver:
        one = family().run("plain", prompts, {**flat, "block_length": 1})
        fast = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True}
        assert family().run("speculative", prompts, {**lossless, **fast}).tokens == one.tokens
    else:
        checks.check_exact_greedy_is_block_size_one(family(), flat, prompts)


@pytest.mark.parametrize(
    ("decoder", "flat"),
    [("plain", PLAIN["dynamic-sampled"]), ("speculative", SPECULATIVE["exact-sampled"])],
    ids=["plain", "speculative"],
)
def test_each_of_thirty_two_prompts_in_one_batch(decoder, flat):
    prompts = checks.draw_prompts(32, seed=7, high=60)
    checks.check_batch_equals_alone(family(), decoder, {**BASE, **flat}, prompts, 32)


def test_max_new_tokens_is_kept():
    for n in (1, 7, 8, 9):
        out = family().run("speculative", [[1, 2, 3]], {**BASE, "max_new_tokens": n})
        assert len(out.tokens[0]) == n


def test_options_object_and_flat_keywords_agree():
    options = Options.from_flat(BASE).replace(do_verify_policy="always")
    call = generate_ssd_policy.block_diffusion_generate
    assert call(family().model, [1, 2, 3], options).tokens == call(
        family().model, torch.tensor([[1, 2, 3]]), do_verify_policy="always", **BASE
    ).tokens  # fmt: skip
    with pytest.raises(UserError, match="StandardOptions"):
        generate.block_diffusion_generate(family().model, [1, 2, 3], options)


def test_padding_is_removed():
    call = generate.block_diffusion_generate
    padded = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert call(family().model, padded, attention_mask=mask, **BASE).tokens == call(
        family().model, [[5, 6, 7], [9, 8, 7, 6, 5]], **BASE
    ).tokens  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "flat", "message"),
    [
        ([], {}, "empty"),
        ([1] * 600, {}, "600 tokens"),
        ([1, 255, 2], {}, "mask token"),
        ([1, 300], {}, "outside the vocabulary"),
        ([1], {"mask_id": 999}, "mask_id 999"),
        ([1], {"stopping_criteria_idx": (999,)}, "999"),
        ([1], {"stopping_criteria_idx": (255,)}, "also a stop id"),
    ],
)
def test_bad_prompts_are_refused(prompt, flat, message):
    with pytest.raises(UserError, match=message):
        family().run("speculative", [prompt], {**BASE, **flat})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"requests": [2, 2]}, "all different"),
        ({"requests": [1]}, "each of the 2 prompts"),
        ({"uniforms": [[0.5] * 100]}, "one for each"),
        ({"batch_size": -1}, "batch_size is -1"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        family().run("speculative", [[1, 2], [3, 4]], BASE, **call)


def test_completions_come_in_the_order_of_the_prompts():
    """Whatever their numbers and whoever finishes first."""
    prompts = checks.draw_prompts(5, seed=12)
    out = family().run("plain", prompts, BASE, requests=[9, 2, 7, 4, 5], batch_size=2)
    assert [c.request for c in out.completions] == [9, 2, 7, 4, 5]
    assert [c.trace.token_ids[: c.trace.prompt_length] for c in out.completions] == prompts


def test_a_reused_row_keeps_nothing_of_the_text_before():
    prompts = checks.draw_prompts(4, seed=13)
    rows = family().run("speculative", prompts, BASE, batch_size=1, seed=2).completions
    for k, prompt in enumerate(prompts):
        (alone,) = family().run("speculative", [prompt], BASE, requests=[k], seed=2).completions
        assert alone.trace == rows[k].trace


def test_blocks_streamed_are_the_tokens_returned():
    streamed: dict[int, list[int]] = {}
    out = family().run(
        "plain", checks.draw_prompts(3, seed=14), BASE, on_block=lambda k, ids: streamed.setdefault(k, []).extend(ids)
    )
    assert [streamed[k] for k in range(3)] == out.tokens


def test_nan_verifier_logits_stop_the_decode():
    """Logits of mask queries only: the draft is fine, the verifier is not, and nothing of it is accepted."""
    model = SDARForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
    original = model.forward

    def forward(*args, logits_at=None, **kwargs):
        logits = original(*args, logits_at=logits_at, **kwargs)
        return logits if logits_at is None else logits * float("nan")

    model.forward = forward
    for acceptance in ("published", "exact"):
        with pytest.raises(FloatingPointError, match="the verifier logits"):
            generate_ssd_policy.block_diffusion_generate(model, [1, 2, 3], acceptance=acceptance, **BASE)


def test_a_model_that_predicts_masks_is_stopped():
    """With the mask token allowed and always predicted, the block is never finished: an error names it."""
    model = SDARForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float64)
    model.lm_head.weight.zero_()
    model.lm_head.weight[255] = 1e-9  # argmax of all-equal logits would be id 0
    original = model.forward
    model.forward = lambda *a, **k: original(*a, **k).index_fill(-1, torch.tensor([255]), 50.0)
    with pytest.raises(RuntimeError, match="block at position 0, step 16: 5 positions still masked"):
        generate.block_diffusion_generate(model, [1, 2, 3], **BASE, suppress_mask=False)
    assert generate.block_diffusion_generate(model, [1, 2, 3], **BASE).tokens, "suppressed by default"


def test_nan_logits_are_reported():
    model = SDARForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"request 0, block at position 0, step 1.*layer 1"):
        generate.block_diffusion_generate(model, [1, 2, 3], **BASE)


def test_lossless_says_why():
    run = lambda **f: family().run("speculative", [[1, 2]], {**BASE, **f})  # noqa: E731
    exact = {"acceptance": "exact", "cache_ver": True}
    assert run(**exact).lossless
    assert run(cache_ver=True, temperature=1.0).lossless, "the published rule on sampled drafts is speculative sampling"
    for broken, reason in [
        ({}, "published rule"),
        ({"acceptance": "exact"}, "cache_ver"),
        ({**exact, "do_verify_policy": "never"}, "skip verification"),
        ({**exact, "min_ssd_span_length": 2}, "skip verification"),
        ({**exact, "denoising_steps": 4}, "denoising_steps"),
        ({**exact, "ssd_ratio_threshold": 0.5}, "ssd_ratio_threshold"),
        ({**exact, "always_check_high_confidence": True}, "always_check_high_confidence"),
        ({"cache_ver": True, "temperature": 1.0, "ssd_ratio_tempering_factor": 0.5}, "tempering"),
        ({"cache_ver": True, "temperature": 1.0, "allow_resample": False}, "allow_resample"),
    ]:
        out = run(**broken)
        assert not out.lossless, broken
        assert reason in out.lossless.reason
    for flag in ({"round_to_blocks": True}, {"trim_stop_tokens": False}):
        assert next(iter(flag)) in run(**exact, **flag).lossless.reason
        assert run(**exact, **flag, block_length=1).lossless
    scripted = family().run("speculative", [[1, 2]], {**BASE, **exact}, accept_rule=lambda *call: accept_span(*call))
    assert scripted.lossless.reason == "acceptance is by a script"
    assert family().run("plain", [[1, 2]], {**BASE, "block_length": 1}).lossless
    assert not family().run("plain", [[1, 2]], BASE).lossless


def test_presets_are_options():
    for name, flat in PRESETS.items():
        assert Options.from_flat(flat), name
    assert json.dumps(Options.from_flat(PRESETS["paper-a"]).to_flat())
