"""LLaDA2's decoders against their definition and against each other, on the recorded random checkpoint in float64."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

from llada2 import LLaDA2MoeModelLM, decoding, reference
from llada2.generate_policy_utils import generate_ssd_policy
from llada2.generate_utils import generate_cached, generate_nocache
from llada2.options import (
    NOCACHE_PRESETS,
    PLAIN_PRESETS,
    PRESETS,
    NoCacheOptions,
    Options,
    StandardOptions,
    plain,
)
from shared.errors import UserError
from tests import family_checks as checks

FOLDER = checks.golden_folder("LLaDA2")


def by_definition(model, prompt, options, uniforms) -> SimpleNamespace:
    """The definition's text as `family_checks` reads it."""
    text = reference.generate(model, prompt, options, uniforms)
    order = [[s.start + i for i in s.chosen] for s in text.steps]
    edits = [(k, s.start + i, s.known[i], t) for k, s in enumerate(text.steps) for i, t in sorted(s.edits.items())]
    forwards = Counter("draft" if kind == "full" else kind for kind, _ in text.forwards)
    return SimpleNamespace(tokens=text.tokens, order=order, edits=edits, forwards=forwards)


@lru_cache(maxsize=1)
def family() -> checks.Family:
    return checks.Family(
        LLaDA2MoeModelLM.from_pretrained(FOLDER / "model", dtype=torch.float64),
        {
            "nocache": (generate_nocache, NoCacheOptions),
            "plain": (generate_cached, StandardOptions),
            "speculative": (generate_ssd_policy, Options),
        },
        by_definition,
        one={"block_length": 1},
    )


NO_EDITS = {"editing_threshold": 1.0}
BASE = {
    "block_length": 8, "max_new_tokens": 14, "confidence_threshold": 0.5, "editing_threshold": 0.5, "stopping_criteria_idx": (),
}  # fmt: skip
LOSSLESS = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True, **NO_EDITS}
SCORE = {"do_verify_policy": "score_threshold", "do_verify_score_type": "difference_static", "score_penalty_coef": 0.8}
NOCACHE = {
    "default": {},
    "as-bias-posts": {"as_bias": True, "max_post_steps": 2},
    "sampled": {"temperature": 0.9, "top_k": 30},
    "unedited-post": {**NO_EDITS, "max_post_steps": 2},
}
PLAIN = {
    "default": {},
    "static": {"confidence_threshold": 1.0, "num_to_transfer": 3},
    "transfer3": {"num_to_transfer": 3},
    "unedited-post": {**NO_EDITS, "max_post_steps": 2},
    "posts": {"editing_threshold": 0.3, "max_post_steps": 3},
    "sampled-unedited-posts": {**NO_EDITS, "temperature": 0.9, "top_k": 30, "max_post_steps": 2},
    "sampled-posts": {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "max_post_steps": 2},
    "as-bias": {"as_bias": True},
    "block1": {"block_length": 1, "max_post_steps": 1},
    "block16-late": {"block_length": 16, "eos_early_stop": False, "trim_stop_tokens": False},
    "commit-last": {"skip_last_commit": False, "fuse_commit": False},
}
SPECULATIVE = {
    "span1": {},
    "span1-posts": {"editing_threshold": 0.3, "max_post_steps": 3},
    "span4-legacy": {"min_ssd_span_length": 4, "legacy_ssd_span_strategy": True, "max_post_steps": 1},
    "exact": LOSSLESS,
    "exact-draft_ver-posts": {**LOSSLESS, "draft_ver": True, "max_post_steps": 2},
    "exact-edited": {**LOSSLESS, "draft_ver": True, "editing_threshold": 0.4, "max_post_steps": 2},
    "exact-sampled": {**LOSSLESS, "temperature": 0.8},
    "draft_ver": {"draft_ver": True, "min_ssd_span_length": 4, "max_post_steps": 2},
    "cache_ver-posts": {"cache_ver": True, "max_post_steps": 2},
    "no-resample": {"allow_resample": False, "ssd_ratio_tempering_factor": 2.0},
    "ratio-transfer3": {"ssd_ratio_threshold": 0.3, "num_to_transfer": 3},
    "ratio-all-spans": {"ssd_ratio_threshold": 0.2, "ssd_threshold_all_spans": True, "min_ssd_span_length": 2},
    "confident": {"always_check_high_confidence": True, "min_ssd_span_length": 5},
    "sampled": {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "verify-temperature": {"verify_temperature": 0.5, "top_p": 0.9},
    "as-bias": {"as_bias": True},
    "score-margin": {**SCORE, "token_acceptance_estimator": "hard_margin_threshold"},
    "score-entropy": {**SCORE, "token_acceptance_estimator": "hard_entropy_threshold", "ssd_entropy_threshold": 0.4},
    "score-power-dynamic": {
        **SCORE, "token_acceptance_estimator": "soft_confidence_power", "do_verify_score_type": "difference_dynamic",
    },
    "score-linear": {**SCORE, "token_acceptance_estimator": "soft_clipped_linear_margin"},
    "score-negexp": {**SCORE, "token_acceptance_estimator": "soft_entropy_negexp"},
    "score-renyi": {**SCORE, "token_acceptance_estimator": "soft_renyi_2_entropy"},
    "hysteresis-posts": {
        "do_verify_policy": "score_hysteresis", "do_verify_score_type": "difference_static", "score_penalty_coef": 0.0,
        "hysteresis_threshold_on": 0.9, "hysteresis_threshold_off": 0.4, "token_acceptance_estimator": "soft_entropy_negexp",
        "max_post_steps": 2,
    },
    "hysteresis-unedited-posts": {
        **NO_EDITS, "do_verify_policy": "score_hysteresis", "do_verify_score_type": "difference_static", "score_penalty_coef": 0.0,
        "hysteresis_threshold_on": 0.9, "hysteresis_threshold_off": 0.4, "token_acceptance_estimator": "soft_entropy_negexp",
        "max_post_steps": 2,
    },
    "bandit-posts": {"do_verify_policy": "contextual_bandit_ucb", "ucb_beta": 0.4, "ucb_entropy_bins": 3, "max_post_steps": 2},
    "bandit-masked": {"do_verify_policy": "contextual_bandit_ucb", "ucb_entropy_source": "masked", "cache_ver": True},
}  # fmt: skip
DECODERS = ("nocache", "plain", "speculative")
_UNSAVED_PLAIN = {"skip_last_commit": False, "fuse_commit": False, "reuse_draft": False, "skip_idle_post_steps": False}
UNSAVED = {
    "nocache": {"skip_idle_post_steps": False},
    "plain": _UNSAVED_PLAIN,
    "speculative": {**_UNSAVED_PLAIN, "reuse_verify": False, "short_verify": False},
}
EVERY = [
    (d, n, f)
    for d, table in zip(DECODERS, (NOCACHE, PLAIN, SPECULATIVE), strict=True)
    for n, f in table.items()
]  # fmt: skip
each_setting = pytest.mark.parametrize(
    ("decoder", "flat"), [pytest.param(d, {**BASE, **f}, id=f"{d}-{n}") for d, n, f in EVERY]
)
# Each of these differs from another setting on one line.
ALIKE = ("score-margin", "score-entropy", "score-linear", "score-negexp", "verify-temperature")
each_distinct_setting = pytest.mark.parametrize(
    ("decoder", "flat"), [pytest.param(d, {**BASE, **f}, id=f"{d}-{n}") for d, n, f in EVERY if n not in ALIKE]
)
SAVED = [
    ("nocache", "unedited-post"), ("plain", "default"), ("plain", "posts"), ("plain", "unedited-post"),
    ("plain", "sampled-unedited-posts"), ("plain", "block1"),
    *(("speculative", n) for n in SPECULATIVE if "exact" in n or "posts" in n or n in ("span1", "confident", "ratio-all-spans")),
]  # fmt: skip
each_saved_setting = pytest.mark.parametrize(
    ("decoder", "flat"), [pytest.param(d, {**BASE, **f}, id=f"{d}-{n}") for d, n, f in EVERY if (d, n) in SAVED]
)
each_decoder = pytest.mark.parametrize("decoder", DECODERS)


@each_setting
def test_equals_reference(decoder, flat):
    checks.check_equals_reference(family(), decoder, flat, checks.draw_prompts(2, seed=1, high=24))


@each_saved_setting
def test_unsaved_equals_reference(decoder, flat):
    prompts = checks.draw_prompts(2, seed=9, high=24)
    checks.check_equals_reference(family(), decoder, {**flat, **UNSAVED[decoder]}, prompts)


@each_saved_setting
def test_graphs_change_nothing(decoder, flat, monkeypatch):
    checks.check_graphs_change_nothing(family(), decoder, flat, checks.draw_prompts(3, seed=12), 2, monkeypatch)


@each_distinct_setting
def test_batch_equals_alone(decoder, flat):
    checks.check_batch_equals_alone(family(), decoder, flat, checks.draw_prompts(3, seed=2), 2)


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize(
    ("decoder", "flat"), [("nocache", {}), ("plain", PLAIN["posts"]), ("speculative", SPECULATIVE["exact-edited"])]
)
def test_different_prompts_in_one_batch(decoder, flat, rows):
    prompts = checks.draw_prompts({1: 2, 7: 9, 32: 32}[rows], seed=7, high=60)
    checks.check_batch_equals_alone(family(), decoder, {**BASE, "max_new_tokens": 9, **flat}, prompts, rows)


@each_distinct_setting
def test_trace_covers_every_position_once(decoder, flat):
    """What was decided; what became of it is in the edits."""
    if not flat.get("trim_stop_tokens", True):
        flat = {**flat, "eos_early_stop": True}
    checks.check_trace_covers(family(), decoder, flat, checks.draw_prompts(3, seed=3))


@lru_cache(maxsize=200)
def run_alone(decoder: str, flat: tuple):
    return family().run(decoder, checks.draw_prompts(2, seed=8), dict(flat), seed=5, batch_size=1)


@pytest.mark.parametrize("saving", UNSAVED["speculative"])
@each_saved_setting
def test_a_saving_changes_forwards_and_nothing_else(decoder, flat, saving):
    """Each saving alone, against none: same ids, steps that do something, and edits; never more forwards, and fewer where it applies."""
    if saving not in UNSAVED[decoder]:
        with pytest.raises(UserError, match=f"unknown option '{saving}'"):
            family().run(decoder, [[1, 2]], {**flat, saving: True})
        return
    full = run_alone(decoder, tuple({**flat, **UNSAVED[decoder]}.items()))
    saved = run_alone(decoder, tuple({**flat, **UNSAVED[decoder], saving: True}.items()))
    assert saved.tokens == full.tokens
    spared = options_of(decoder, flat).skips_post_steps and saving == "skip_idle_post_steps"
    orders = [
        [[step for step in c.trace.order() if step or not spared] for c in out.completions] for out in (saved, full)
    ]
    assert orders[0] == orders[1]
    assert [c.trace.edits for c in saved.completions] == [c.trace.edits for c in full.completions]
    assert [c.uniforms_used for c in saved.completions] == [c.uniforms_used for c in full.completions]
    before, after = full.forwards, saved.forwards
    length = flat["block_length"]
    blocks = sum(len(c.trace.token_ids) // length - c.trace.prompt_length // length for c in full.completions)
    assert after["draft"] == before["draft"] - blocks * spared
    assert all(after[k] == before[k] for k in ("prefill", "verify"))
    fewer = saving in ("skip_last_commit", "fuse_commit")
    fewer |= saving == "reuse_verify" and flat.get("acceptance") == "exact" and not flat.get("max_post_steps")
    traces = [c.trace for c in full.completions]
    idle = any(not decided and k not in {s for s, *_ in t.edits} for t in traces for k, decided in enumerate(t.order()))
    fewer |= saving == "reuse_draft" and idle and flat.get("draft_ver", False) == flat.get("cache_ver", False)
    assert after["commit"] < before["commit"] if fewer and before["commit"] else after["commit"] <= before["commit"]
    if saving == "short_verify" and not flat.get("ssd_threshold_all_spans"):
        spared = any(0 < span < flat["block_length"] for t in traces for span in t.verified_span)
        assert (saved.batch_tokens["verify"] < full.batch_tokens["verify"]) == spared


def options_of(decoder: str, flat: dict) -> NoCacheOptions:
    return family().decoders[decoder][1].from_flat(flat)


@each_decoder
def test_post_steps_without_editing_are_free(decoder):
    """They are not taken; kept only where the policy's switch takes notice of them."""
    prompts, posts = checks.draw_prompts(4, seed=16), {"max_post_steps": 3}
    without, with_posts = (family().run(decoder, prompts, {**BASE, **NO_EDITS, **more}) for more in ({}, posts))
    assert with_posts.tokens == without.tokens
    assert with_posts.forwards == without.forwards
    assert [c.trace for c in with_posts.completions] == [c.trace for c in without.completions]
    assert options_of(decoder, {**NO_EDITS, **posts}).skips_post_steps
    assert not options_of(decoder, posts).skips_post_steps
    assert not options_of("speculative", SPECULATIVE["hysteresis-unedited-posts"]).skips_post_steps


def test_a_short_verify_touches_fewer_experts(monkeypatch):
    """Tokens and experts of the verify forwards of one text, the latter counted at the routers."""
    touched, tokens, kinds, original = Counter(), {}, [], decoding.Run.forward
    gates = [layer.mlp.gate for layer in family().model.model.layers if hasattr(layer.mlp, "gate")]
    note = lambda gate, args, out: touched.update({(name, kinds[-1]): len(out[0].unique())})  # noqa: E731
    handles = [gate.register_forward_hook(note) for gate in gates]
    monkeypatch.setattr(
        decoding.Run, "forward", lambda run, kind, *a, **k: kinds.append(kind) or original(run, kind, *a, **k)
    )
    for name, short in (("short", True), ("whole", False)):
        out = family().run("speculative", [[1, 2, 3]], {**BASE, "do_verify_policy": "always", "short_verify": short})
        tokens[name] = out.batch_tokens["verify"]
    for handle in handles:
        handle.remove()
    assert tokens["whole"] == 2 * 8 * out.forwards["verify"]
    assert tokens["short"] < tokens["whole"]
    assert touched["short", "verify"] < touched["whole", "verify"]
    assert touched["short", "draft"] == touched["whole", "draft"]


@each_decoder
def test_stop_trims(decoder):
    checks.check_stop_trims(family(), decoder, {**BASE, "max_new_tokens": 40}, checks.draw_prompts(6, seed=4))


@each_decoder
def test_unknown_option(decoder):
    checks.check_unknown_option(family(), decoder)


def test_stop_tokens_kept_and_late():
    """As published: the stop token stays, and without an early stop later blocks are decoded and cut off."""
    prompts = checks.draw_prompts(6, seed=4)
    whole = family().run("plain", prompts, {**BASE, "max_new_tokens": 40})
    stop = whole.tokens[0][len(whole.tokens[0]) // 2]
    kept = family().run(
        "plain", prompts, {**BASE, "max_new_tokens": 40, "stopping_criteria_idx": stop, "trim_stop_tokens": False}
    )
    late = family().run(
        "plain", prompts, {**BASE, "max_new_tokens": 40, "stopping_criteria_idx": stop, "eos_early_stop": False}
    )
    for full, one, other in zip(whole.tokens, kept.tokens, late.tokens, strict=True):
        end = full.index(stop) if stop in full else len(full)
        assert one == full[: end + 1]
        assert other == full[:end]
    assert late.forwards == whole.forwards
    assert sum(kept.forwards.values()) < sum(whole.forwards.values())


@pytest.mark.parametrize("more", [{}, {"max_post_steps": 2}, {"num_to_transfer": 3}, NO_EDITS], ids=str)
def test_never_is_plain(more):
    checks.check_never_is_plain(family(), {**BASE, **more}, checks.draw_prompts(6, seed=5))


@pytest.mark.parametrize("more", [{}, {"max_post_steps": 2, "editing_threshold": 0.3}, {"temperature": 0.8}], ids=str)
def test_nocache_is_cached(more):
    """With a mask that masks, recomputing everything changes nothing, edits included."""
    prompts = checks.draw_prompts(6, seed=5)
    whole, cached = (family().run(d, prompts, {**BASE, **more}, seed=1) for d in ("nocache", "plain"))
    assert whole.tokens == cached.tokens
    for one, other in zip(whole.completions, cached.completions, strict=True):
        assert (one.trace.order(), one.trace.edits) == (other.trace.order(), other.trace.edits)
        assert one.trace.forwards == {"draft": other.trace.forwards["draft"]}


@pytest.mark.parametrize("draft_ver", [False, True])
@pytest.mark.parametrize("block_length", [4, 8, 16])
def test_exact_greedy_is_block_size_one(block_length, draft_ver):
    flat = {**BASE, **NO_EDITS, "block_length": block_length, "max_new_tokens": 33}
    prompts = checks.draw_prompts(6, seed=6)
    if draft_ver:
        one = family().run("plain", prompts, {**flat, "block_length": 1})
        fast = family().run("speculative", prompts, {**flat, **LOSSLESS, "draft_ver": True, "max_post_steps": 1})
        assert one.lossless
        assert fast.lossless
        assert fast.tokens == one.tokens
    else:
        checks.check_exact_greedy_is_block_size_one(family(), flat, prompts)


def test_exact_sampling_has_the_distribution_of_block_size_one():
    """The first two tokens of many texts, drawn by speculation, against their exact joint distribution. chi-square, 15 cells."""
    model, prompt, count = family().model, [7, 8, 9], 1500
    flat = {**BASE, **NO_EDITS, "block_length": 4, "max_new_tokens": 5, "temperature": 0.6, "top_k": 4}
    distribution = {}
    ids, seen = torch.tensor([[*prompt, 255]]), torch.ones(4, 4, dtype=torch.bool).tril()
    first = _filtered(model(ids, torch.arange(4)[None], None, seen)[0, -1])
    for a in first.nonzero()[:, 0].tolist():
        ids, seen = torch.tensor([[*prompt, a, 255]]), torch.ones(5, 5, dtype=torch.bool).tril()
        second = _filtered(model(ids, torch.arange(5)[None], None, seen)[0, -1])
        distribution |= {(a, b): float(first[a] * second[b]) for b in second.nonzero()[:, 0].tolist()}
    out = family().run("speculative", [prompt] * count, {**flat, **LOSSLESS}, batch_size=1000, seed=3)
    assert out.lossless
    found = Counter(tuple(t[:2]) for t in out.tokens)
    assert set(found) <= set(distribution)
    chi = sum((found[k] - count * p) ** 2 / (count * p) for k, p in distribution.items())
    assert chi < 37.7, "the 99.9 % point of chi-square with 15 degrees of freedom"


def _filtered(logits: torch.Tensor) -> torch.Tensor:
    """The distribution of one token at temperature 0.6, top 4, the mask never predicted."""
    logits = logits.float() / 0.6
    logits[255] = -torch.inf
    return logits.masked_fill(logits < logits.topk(4).values[-1], -torch.inf).softmax(-1)


def test_editing_repairs_and_is_told():
    """Edits replay to the final text: each replaces what stood there, none touches the prompt or an earlier block."""
    prompts = checks.draw_prompts(6, seed=11)
    flat = {**BASE, "editing_threshold": 0.3, "max_post_steps": 3}
    for decoder in DECODERS:
        out = family().run(decoder, prompts, flat)
        assert sum(len(c.trace.edits) for c in out.completions) > 5
        for trace in (c.trace for c in out.completions):
            now = {p: trace.first_token(p) for p in range(len(trace.token_ids))}
            for step, position, old, new in trace.edits:
                assert now[position] == old != new
                assert position >= trace.prompt_length
                assert trace.step_of[position] < step
                now[position] = new
            assert list(now.values()) == trace.token_ids
            assert sum(trace.edit_counts().values()) == len(trace.edits)


def test_without_editing_there_are_no_edits():
    for decoder in DECODERS:
        out = family().run(decoder, checks.draw_prompts(3, seed=11), {**BASE, **NO_EDITS, "max_post_steps": 2})
        assert not any(c.trace.edits for c in out.completions)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_post_steps_are_capped(most):
    """Drafts of a block after its last mask: at most that many, and none after one that changed nothing."""
    flat = {**BASE, "editing_threshold": 0.2, "max_post_steps": most}
    seen = Counter()
    for trace in (c.trace for c in family().run("plain", checks.draw_prompts(8, seed=12), flat).completions):
        edited, posts = {s for s, *_ in trace.edits}, 0
        for step, decided in enumerate(trace.order()):
            if decided:
                assert posts <= most
                posts = 0
            else:
                assert posts == 0 or step - 1 in edited, "a post step that changed nothing is the last"
                posts += 1
                seen[posts] += 1
        assert posts <= most
    assert max(seen, default=0) == most, "the cap was reached, or the test is idle"


@pytest.mark.parametrize("name", ["span1-posts", "hysteresis-posts", "exact-edited"])
def test_at_most_two_packed_reads_a_step(name, monkeypatch):
    """Whatever the number of rows; a text that ends is read once more, in a fixed number of pieces."""
    reads, prompts = Counter(), checks.draw_prompts(5, seed=15)
    for method in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, method)
        note = lambda self, *a, _name=method, _original=original: reads.update([_name]) or _original(self, *a)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, method, note)
    out = family().run("speculative", prompts, {**BASE, **SPECULATIVE[name]})
    pieces = reads["__int__"] / len(prompts)  # one number a text, how many uniforms it used
    assert pieces == 1
    assert set(reads) <= {"tolist", "__int__"}
    assert out.batch_forwards["draft"] < reads["tolist"] <= 2 * out.batch_forwards["draft"] + 6 * len(prompts)


def test_max_new_tokens_is_kept():
    for decoder in DECODERS:
        for n in (1, 7, 8, 9):
            assert len(family().run(decoder, [[1, 2, 3]], {**BASE, "max_new_tokens": n}).tokens[0]) == n


@pytest.mark.parametrize(
    ("decoder", "flat", "message"),
    [
        ("nocache", {"fuse_commit": True}, "unknown option 'fuse_commit'"),
        ("plain", {"cache_ver": True}, "unknown option 'cache_ver'"),
        ("plain", {"editing_treshold": 0.5}, "did you mean editing_threshold"),
        ("plain", {"num_to_transfer": 0}, "num_to_transfer is 0. Allowed: at least 1"),
        ("plain", {"max_post_steps": -1}, "max_post_steps is -1. Allowed: at least 0"),
        ("plain", {"max_post_steps": 20000}, "max_post_steps is 20000. Allowed: at least 0 and at most 1024"),
        ("speculative", {"as_bias": True, "cache_ver": True}, "cache_ver is True. Allowed with as_bias: false"),
        ("speculative", {"do_verify_policy": "score_treshold"}, "did you mean score_threshold"),
    ],
)
def test_options_that_do_not_exist(decoder, flat, message):
    with pytest.raises(UserError, match=message):
        family().run(decoder, [[1, 2]], {**BASE, **flat})


@pytest.mark.parametrize(
    ("prompt", "flat", "message"),
    [
        ([], {}, "empty"),
        ([1] * 5000, {}, "5000 tokens"),
        ([1, 255, 2], {}, "mask token"),
        ([1, 300], {}, "outside the vocabulary"),
        ([1], {"mask_id": 999}, "mask_id 999"),
        ([1], {"stopping_criteria_idx": (999,)}, "999"),
    ],
)
@each_decoder
def test_bad_prompts_are_refused(decoder, prompt, flat, message):
    with pytest.raises(UserError, match=message):
        family().run(decoder, [prompt], {**BASE, **flat})


def test_lossless_says_why():
    run = lambda **f: family().run("speculative", [[1, 2]], {**BASE, "max_new_tokens": 6, **LOSSLESS, **f})  # noqa: E731
    assert run().lossless
    assert run(draft_ver=True, max_post_steps=1).lossless
    assert run(temperature=1.0).lossless
    for broken, reason in [
        ({"editing_threshold": 0.9}, "editing replaces verified tokens"),
        ({"num_to_transfer": 2}, "num_to_transfer"),
        ({"acceptance": "published"}, "published rule"),
        ({"cache_ver": False}, "cache_ver"),
        ({"min_ssd_span_length": 2, "do_verify_policy": "mask_span_length"}, "skip verification"),
        ({"ssd_ratio_threshold": 0.5}, "ssd_ratio_threshold"),
        ({"suppress_mask": False}, "suppress_mask"),
    ]:
        out = run(**broken)
        assert not out.lossless, broken
        assert reason in out.lossless.reason
    one = {**BASE, "block_length": 1, "max_new_tokens": 4}
    assert family().run("plain", [[1, 2]], one).lossless, "a block of one has nothing to edit while it is masked"
    assert not family().run("plain", [[1, 2]], {**one, "max_post_steps": 1}).lossless
    assert not family().run("plain", [[1, 2]], {**BASE, **NO_EDITS}).lossless


def test_presets_are_options():
    for kind, presets in ((NoCacheOptions, NOCACHE_PRESETS), (StandardOptions, PLAIN_PRESETS), (Options, PRESETS)):
        for name, flat in presets.items():
            assert json.dumps(kind.from_flat(flat).to_flat()), name
    for name in UNSAVED["plain"]:
        flat = {**BASE, name: False}
        assert plain(Options.from_flat(flat)) == StandardOptions.from_flat(flat)
    assert plain(NoCacheOptions.from_flat(BASE)) == StandardOptions.from_flat(BASE)


def test_published_spellings():
    options = Options.from_flat(
        {"threshold": 0.9, "gen_length": 64, "block_size": 8, "eos_id": 3, "top_p": 1.0, "eos_early_stop": "yes"}
    )
    assert options.unmask.confidence_threshold == 0.9
    assert (options.blocks.max_new_tokens, options.blocks.block_length) == (64, 8)
    assert (options.blocks.stopping_criteria_idx, options.blocks.eos_early_stop) == ((3,), True)


def test_streamed_blocks_are_the_tokens_returned():
    streamed: dict[int, list[int]] = {}
    note = lambda k, ids: streamed.setdefault(k, []).extend(ids)  # noqa: E731
    out = family().run("speculative", checks.draw_prompts(3, seed=14), {**BASE, "max_post_steps": 2}, on_block=note)
    assert [streamed[k] for k in range(3)] == out.tokens


def test_a_reused_row_keeps_nothing_of_the_text_before():
    prompts, flat = checks.draw_prompts(4, seed=13), {**BASE, "editing_threshold": 0.3, "max_post_steps": 2}
    rows = family().run("speculative", prompts, flat, batch_size=1, seed=2).completions
    for k, prompt in enumerate(prompts):
        (alone,) = family().run("speculative", [prompt], flat, requests=[k], seed=2).completions
        assert alone.trace == rows[k].trace


def test_a_model_that_predicts_masks_is_stopped():
    model = LLaDA2MoeModelLM.from_pretrained(FOLDER / "model", dtype=torch.float64)
    original = model.forward
    model.forward = lambda *a, **k: original(*a, **k).index_fill(-1, torch.tensor([255]), 50.0)
    for decoder in (generate_nocache, generate_cached):
        with pytest.raises(RuntimeError, match="block at position 0, step 16: 5 positions still masked"):
            decoder(model, [1, 2, 3], **BASE, suppress_mask=False)
        assert decoder(model, [1, 2, 3], **BASE).tokens, "suppressed by default"


def test_nan_logits_are_reported():
    model = LLaDA2MoeModelLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
    model.model.layers[1].attention.dense.weight[3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"request 0, block at position 0, step 1.*layer 1"):
        generate_cached(model, [1, 2, 3], **BASE)
