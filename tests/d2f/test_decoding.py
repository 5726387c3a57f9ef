"""D2F's decoders against their definition and against each other, on the recorded random checkpoints in float64, both backends."""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

from d2f import decoding, reference
from d2f.cursor import Pipeline
from d2f.generation_utils import generate_block_single, generate_block_speculative
from d2f.modeling_d2f import BACKENDS
from d2f.options import PLAIN_PRESETS, PLAIN_PUBLISHED, PRESETS, PUBLISHED, Options, StandardOptions, plain
from d2f.stats import forward_stats
from shared.errors import UserError
from tests import family_checks as checks

NAMES = list(BACKENDS)
ONE = {"block_length": 1, "block_add_threshold": 1.0}


@lru_cache(maxsize=2)
def family(name: str) -> checks.Family:
    folder = checks.golden_folder(f"D2F-{name}")
    return checks.Family(
        BACKENDS[name].from_pretrained(folder / "model", dtype=torch.float64),
        {"plain": (generate_block_single, StandardOptions), "speculative": (generate_block_speculative, Options)},
        reference.generate,
        one=ONE,
        one_block_a_step=False,
    )


BASE = {
    "block_length": 8, "max_new_tokens": 21, "block_add_threshold": 0.3, "decoded_token_threshold": 0.6, "skip_threshold": 0.6,
    "stopping_criteria_idx": (),
}  # fmt: skip
LOSSLESS = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True}
SCORE = {"do_verify_policy": "score_threshold", "do_verify_score_type": "difference_static", "score_penalty_coef": 0.8}
PLAIN = {
    "default": {},
    "all-at-once": {"block_add_threshold": 0.0},
    "one-at-a-time": {"block_add_threshold": 1.0, "decoded_token_threshold": 1.0},
    "two-in-flight": {"block_add_threshold": 0.0, "max_blocks_in_flight": 2},
    "margin": {"margin_confidence": True},
    "neg-entropy": {"neg_entropy": True},
    "sampled": {"temperature": 0.9, "top_k": 30, "top_p": 0.9},
    "published-filters": {"top_p_first": True, "top_p": 0.7, "top_k": 5},
    "sampled-top-p-first": {
        "top_p_first": True,
        "top_p": 0.8,
        "top_k": 5,
        "temperature": 1.1,
        "block_add_threshold": 0.1,
    },
    "published": PLAIN_PUBLISHED | {"suppress_mask": True},
    "block1": {**ONE, "max_new_tokens": 6},
    "short-length": {"max_length": 30},
    "block5": {"block_length": 5, "block_add_threshold": 0.1},
}
SPECULATIVE = {
    "default": {},
    "exact": LOSSLESS,
    "exact-draft_ver": {**LOSSLESS, "draft_ver": True, "block_add_threshold": 0.0},
    "exact-sampled": {**LOSSLESS, "temperature": 0.8, "top_k": 20},
    "exact-span3": {**LOSSLESS, "do_verify_policy": "mask_span_length", "min_ssd_span_length": 3, "block_add_threshold": 0.1},
    "cache_ver": {"cache_ver": True, "block_add_threshold": 0.1},
    "draft_ver": {"draft_ver": True, "block_add_threshold": 0.1, "min_ssd_span_length": 4},
    "published": PUBLISHED | {"suppress_mask": True, "cache_ver": True, "draft_ver": True},
    "span4-legacy": {"min_ssd_span_length": 4, "legacy_ssd_span_strategy": True, "block_add_threshold": 0.1},
    "min-tokens3": {"min_tokens_per_step": 3, "block_add_threshold": 0.1, "decoded_token_threshold": 0.2},
    "partial2": {"ssd_partial_ar_span": 2, "block_length": 16, "ssd_ratio_tempering_factor": 0.5},
    "partial1-no-resample": {"ssd_partial_ar_span": 1, "allow_resample": False},
    "draft-conf": {"ssd_threshold_draft_confidence": True, "draft_confidence_threshold": 0.3},
    "verify-conf": {"verify_confidence_threshold": 0.05},
    "no-resample": {"allow_resample": False, "ssd_ratio_tempering_factor": 2.0},
    "ratio": {"ssd_ratio_threshold": 0.3},
    "ratio-all-spans": {"ssd_ratio_threshold": 0.2, "ssd_threshold_all_spans": True, "min_ssd_span_length": 2},
    "confident": {"always_check_high_confidence": True, "min_ssd_span_length": 5, "block_add_threshold": 0.1},
    "target2": {"target_block_size": 2},
    "target4": {"target_block_size": 4, "cache_ver": True, "draft_ver": True},
    "target3": {"target_block_size": 3, "block_add_threshold": 0.1},
    "sampled": {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "sampled-margin": {"temperature": 0.7, "top_k": 40, "margin_confidence": True, "block_add_threshold": 0.1},
    "neg-entropy": {"neg_entropy": True, "block_add_threshold": 0.1},
    "verify-temperature": {"verify_temperature": 0.5, "top_p": 0.9},
    "score-margin": {**SCORE, "token_acceptance_estimator": "hard_margin_threshold"},
    "score-entropy": {**SCORE, "token_acceptance_estimator": "hard_entropy_threshold", "ssd_entropy_threshold": 0.4},
    "score-power-dynamic": {
        **SCORE, "token_acceptance_estimator": "soft_confidence_power", "do_verify_score_type": "difference_dynamic",
        "block_add_threshold": 0.1,
    },
    "score-linear": {**SCORE, "token_acceptance_estimator": "soft_clipped_linear_margin"},
    "score-negexp": {**SCORE, "token_acceptance_estimator": "soft_entropy_negexp"},
    "score-renyi": {**SCORE, "token_acceptance_estimator": "soft_renyi_2_entropy"},
    "hysteresis": {
        "do_verify_policy": "score_hysteresis", "do_verify_score_type": "difference_static", "score_penalty_coef": 0.0,
        "hysteresis_threshold_on": 0.9, "hysteresis_threshold_off": 0.4, "token_acceptance_estimator": "soft_entropy_negexp",
    },
    "bandit": {"do_verify_policy": "contextual_bandit_ucb", "ucb_beta": 0.4, "ucb_entropy_bins": 3, "block_add_threshold": 0.1},
    "bandit-masked": {"do_verify_policy": "contextual_bandit_ucb", "ucb_entropy_source": "masked", "cache_ver": True},
}  # fmt: skip
FULL = {"attention": "full"}  # Dream alone
EVERY = [("plain", n, f) for n, f in PLAIN.items()] + [("speculative", n, f) for n, f in SPECULATIVE.items()]
CASES = [(name, d, n, f) for name in NAMES for d, n, f in EVERY]
CASES += [("dream", d, f"full-{n}", {**f, **FULL}) for d, n, f in EVERY if n in ("default", "all-at-once", "target2")]
# Settings that differ in how rows share a forward or a step.
APART = (
    "default", "all-at-once", "two-in-flight", "sampled", "short-length", "block5", "exact", "exact-draft_ver", "exact-span3", "published", "min-tokens3",
    "partial2", "target4", "hysteresis", "bandit", "full-default",
)  # fmt: skip


def settings(cases):
    parameters = [pytest.param(name, d, {**BASE, **f}, id=f"{name}-{d}-{n}") for name, d, n, f in cases]
    return pytest.mark.parametrize(("name", "decoder", "flat"), parameters)


each_setting = settings(CASES)
each_distinct_setting = settings([c for c in CASES if c[2] in APART])
each_decoder = pytest.mark.parametrize("decoder", ["plain", "speculative"])
each_backend = pytest.mark.parametrize("name", NAMES)


@each_setting
def test_equals_reference(name, decoder, flat):
    checks.check_equals_reference(family(name), decoder, flat, checks.draw_prompts(2, seed=1, high=24))


def random_setting(rng: random.Random) -> dict:
    """Options that fit together, drawn at random."""
    flat = {
        "block_length": rng.choice([1, 2, 3, 5, 8, 16]),
        "max_new_tokens": rng.randrange(1, 24),
        "block_add_threshold": rng.choice([0.0, 0.1, 0.3, 0.7, 1.0]),
        "decoded_token_threshold": rng.choice([0.0, 0.2, 0.5, 0.9, 1.0]),
        "skip_threshold": rng.choice([0.2, 0.5, 0.9]),
        "max_blocks_in_flight": rng.choice([None, 1, 2, 3]),
        "floor_to_blocks": rng.random() < 0.2,
        "end_early": rng.random() < 0.7,
        "stopping_criteria_idx": rng.choice([(), (3, 77, 140, 210)]),
        "temperature": rng.choice([0.0, 0.0, 0.9]),
        "margin_confidence": rng.random() < 0.2,
        "neg_entropy": rng.random() < 0.1,
    }
    if rng.random() < 0.3:
        return flat
    flat |= {
        "cache_ver": rng.random() < 0.5,
        "draft_ver": rng.random() < 0.5,
        "short_verify": rng.random() < 0.7,
        "do_verify_policy": rng.choice(
            ["always", "never", "mask_span_length", "score_threshold", "score_hysteresis", "contextual_bandit_ucb"]
        ),
        "min_ssd_span_length": rng.choice([1, 3]),
        "target_block_size": rng.choice([1, 1, 1, 2]),
        "acceptance": rng.choice(["exact", "published"]),
    }
    if flat["acceptance"] == "published":
        flat |= {
            "min_tokens_per_step": rng.choice([1, 2, 4]),
            "ssd_partial_ar_span": rng.choice([0, 1, 3]),
            "allow_resample": rng.random() < 0.7,
            "verify_confidence_threshold": rng.choice([None, 0.1]),
        }
    return flat


@each_backend
@pytest.mark.parametrize("seed", range(12))
def test_random_settings_equal_reference(name, seed):
    flat = random_setting(random.Random(seed))
    decoder = "speculative" if "acceptance" in flat else "plain"
    checks.check_equals_reference(family(name), decoder, flat, checks.draw_prompts(3, seed=seed, high=24))


@each_distinct_setting
def test_batch_equals_alone(name, decoder, flat):
    checks.check_batch_equals_alone(family(name), decoder, flat, checks.draw_prompts(3, seed=2), 2)


@pytest.mark.parametrize("rows", [1, 7, 32])
@each_backend
@pytest.mark.parametrize(("decoder", "flat"), [("plain", {}), ("speculative", SPECULATIVE["exact-draft_ver"])])
def test_different_prompts_in_one_batch(name, decoder, flat, rows):
    prompts = checks.draw_prompts({1: 2, 7: 9, 32: 32}[rows], seed=7, high=60)
    checks.check_batch_equals_alone(family(name), decoder, {**BASE, "max_new_tokens": 11, **flat}, prompts, rows)


@settings(
    [
        c
        for c in CASES
        if c[2]
        in ("default", "exact", "exact-draft_ver", "exact-span3", "bandit", "sampled", "full-default", "min-tokens3")
    ]
)
def test_graphs_change_nothing(name, decoder, flat, monkeypatch):
    flat = {**flat, "max_new_tokens": 14}
    checks.check_graphs_change_nothing(family(name), decoder, flat, checks.draw_prompts(3, seed=12), 2, monkeypatch)


@each_distinct_setting
def test_trace_covers_every_position_once(name, decoder, flat):
    checks.check_trace_covers(family(name), decoder, flat, checks.draw_prompts(3, seed=3))


@each_backend
@each_decoder
def test_stop_trims(name, decoder):
    checks.check_stop_trims(family(name), decoder, {**BASE, "max_new_tokens": 40}, checks.draw_prompts(6, seed=4))


@each_decoder
def test_unknown_option(decoder):
    checks.check_unknown_option(family("llada"), decoder)


@each_backend
@pytest.mark.parametrize(
    "more", [{}, {"block_add_threshold": 0.0}, {"temperature": 0.8}, {"neg_entropy": True}], ids=str
)
def test_never_is_plain(name, more):
    checks.check_never_is_plain(family(name), {**BASE, **more}, checks.draw_prompts(6, seed=5))


@each_backend
@pytest.mark.parametrize("draft_ver", [False, True])
@pytest.mark.parametrize(("block_length", "add"), [(4, 0.0), (8, 0.3), (8, 1.0), (16, 0.1)])
def test_exact_greedy_is_block_size_one(name, block_length, add, draft_ver):
    flat = {**BASE, "block_length": block_length, "max_new_tokens": 33, "block_add_threshold": add}
    model, prompts = family(name), checks.draw_prompts(6, seed=25)
    if draft_ver:
        one = model.run("plain", prompts, {**flat, **ONE})
        fast = model.run("speculative", prompts, {**flat, **LOSSLESS, "draft_ver": True})
        assert one.lossless
        assert fast.lossless
        assert fast.tokens == one.tokens
    else:
        checks.check_exact_greedy_is_block_size_one(model, flat, prompts)


@each_backend
@pytest.mark.parametrize(
    "broken",
    [
        {"cache_ver": False}, {"cache_ver_is_noop": True}, {"acceptance": "published"}, {"do_verify_policy": "mask_span_length", "min_ssd_span_length": 5},
        {"target_block_size": 2}, {"ssd_partial_ar_span": 1}, {"always_check_high_confidence": True, "skip_threshold": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_what_breaks_losslessness_says_so(name, broken):
    """Each condition of `Output.lossless` is a real one: without it the text is another."""
    model, prompts = family(name), checks.draw_prompts(12, seed=6)
    flat = {**BASE, "max_new_tokens": 40, "block_add_threshold": 0.1}
    one = model.run("plain", prompts, {**flat, **ONE})
    out = model.run("speculative", prompts, {**flat, **LOSSLESS, **broken})
    assert not out.lossless
    assert out.tokens != one.tokens


@each_backend
def test_same_seed_same_text(name):
    flat, prompts = {**BASE, "temperature": 0.9}, checks.draw_prompts(3, seed=5)
    texts = [family(name).run("speculative", prompts, flat, seed=seed).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@each_backend
@each_decoder
def test_max_new_tokens_is_kept(name, decoder):
    for n in (1, 7, 8, 9):
        assert len(family(name).run(decoder, [[1, 2, 3]], {**BASE, "max_new_tokens": n}).tokens[0]) == n
        floored = family(name).run(decoder, [[1, 2, 3]], {**BASE, "max_new_tokens": n, "floor_to_blocks": True})
        assert len(floored.tokens[0]) == n // 8 * 8


@each_backend
@each_decoder
def test_a_text_may_take_every_position(name, decoder):
    """Blocks of 24 do not divide the positions; the last one is cut to what there is."""
    model = family(name)
    positions = model.model.config.max_position_embeddings
    flat = {**BASE, "block_length": 24, "max_new_tokens": 56, "skip_threshold": 0.2}
    (text,) = model.run(decoder, [[7] * (positions - 56)], flat).tokens
    assert len(text) == 56
    with pytest.raises(UserError, match=f"Allowed: {positions - 56}"):
        model.run(decoder, [[7] * (positions - 55)], flat)


def test_a_text_without_room_is_empty():
    out = family("llada").run("plain", [[1, 2, 3, 4], [1, 2]], {**BASE, "max_length": 4})
    assert [len(t) for t in out.tokens] == [0, 2]
    assert forward_stats(out.completions[0].trace)["total_forwards"] == 0


@each_backend
def test_ending_early_spares_forwards_and_changes_no_text(name):
    prompts, flat = checks.draw_prompts(8, seed=4), {**BASE, "block_add_threshold": 0.0, "max_new_tokens": 40}
    whole = family(name).run("plain", prompts, flat)
    stop = whole.tokens[0][3]
    late, early = (
        family(name).run("plain", prompts, {**flat, "stopping_criteria_idx": stop, "end_early": e})
        for e in (False, True)
    )
    assert late.tokens == early.tokens
    assert early.forwards["draft"] < late.forwards["draft"]


@each_backend
def test_blocks_are_in_flight_together(name):
    """Pipelined: fewer passes than one block at a time, several blocks in each, never more than asked for."""
    prompts, flat = checks.draw_prompts(4, seed=4), {**BASE, "max_new_tokens": 40, "skip_threshold": 0.95}
    one, many, two = (
        family(name).run("plain", prompts, {**flat, "block_add_threshold": add, "max_blocks_in_flight": most})
        for add, most in ((1.0, None), (0.0, None), (0.0, 2))
    )
    most_in_flight = lambda out: max((p.end - p.first + 7) // 8 for c in out.completions for p in c.trace.passes)  # noqa: E731
    assert [most_in_flight(out) for out in (one, many, two)] == [1, 5, 2]
    assert sum(many.forwards.values()) < sum(one.forwards.values())


@each_backend
@pytest.mark.parametrize("flat", [{}, SPECULATIVE["exact"], SPECULATIVE["bandit"]], ids=str)
def test_at_most_two_packed_reads_a_step(name, flat, monkeypatch):
    """Whatever the number of rows; a text that ends is read once more, in a fixed number of pieces."""
    reads, prompts = Counter(), checks.draw_prompts(5, seed=15)
    for method in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, method)
        note = lambda self, *a, _name=method, _original=original: reads.update([_name]) or _original(self, *a)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, method, note)
    out = family(name).run("speculative", prompts, {**BASE, **flat})
    assert reads["__int__"] == len(prompts)
    assert set(reads) <= {"tolist", "__int__"}
    steps = out.batch_forwards["draft"] + out.batch_forwards["prefill"]
    assert steps <= reads["tolist"] <= 2 * steps + 6 * len(prompts)


def test_streamed_tokens_are_the_text():
    shown = {}
    flat = {**BASE, "block_add_threshold": 0.0, "max_new_tokens": 30}
    note = lambda request, ids: shown.setdefault(request, []).extend(ids)  # noqa: E731
    out = family("llada").run("speculative", checks.draw_prompts(3, seed=2), flat, on_block=note)
    assert [shown[k] for k in range(3)] == out.tokens


def test_numbers_that_broke_are_named():
    model = family("llada").model
    weight = model.model.layers[1].mlp.down_proj.weight
    kept = weight[0, 0].clone()
    weight[0, 0] = float("nan")
    try:
        with pytest.raises(FloatingPointError, match="draft logits hold NaN or infinity, first in layer 1"):
            family("llada").run("plain", [[1, 2, 3]], BASE)
    finally:
        weight[0, 0] = kept


@pytest.mark.parametrize(
    ("decoder", "flat", "message"),
    [
        ("plain", {"cache_ver": True}, "unknown option 'cache_ver'"),
        ("plain", {"block_add_treshold": 0.5}, "did you mean block_add_threshold"),
        ("plain", {"block_add_threshold": 1.5}, "block_add_threshold is 1.5. Allowed: at least 0.0 and at most 1.0"),
        ("plain", {"max_blocks_in_flight": 0}, "max_blocks_in_flight is 0. Allowed: at least 1"),
        ("plain", {"attention": "full"}, "attention is 'full'. Allowed with this network: block"),
        ("plain", {"max_new_tokens": 256}, "max_new_tokens is 256. Allowed: at most 255"),
        ("speculative", {"acceptance": "exact", "min_tokens_per_step": 2}, "min_tokens_per_step is 2. Allowed with acceptance exact: 1"),
        ("speculative", {"acceptance": "exact", "verify_confidence_threshold": 0.1}, "Allowed with acceptance exact: None"),
    ],
)  # fmt: skip
def test_bad_options(decoder, flat, message):
    with pytest.raises(UserError, match=message):
        family("llada").run(decoder, [[1, 2]], flat)


@pytest.mark.parametrize(("kind", "presets"), [(StandardOptions, PLAIN_PRESETS), (Options, PRESETS)])
def test_presets_are_options(kind, presets):
    for values in presets.values():
        options = kind.from_flat(values)
        flat = options.to_flat()
        assert kind.from_flat(flat) == options
        assert kind is StandardOptions or plain(options).unmask == options.unmask


@pytest.mark.parametrize(("size", "tokens", "start"), [(2, 5, 11), (3, 8, 19), (4, 8, 11), (1, 4, 12)])
def test_the_mask_of_a_verifier_of_blocks_pair_by_pair(size, tokens, start):
    """D2F's verifier mask: drafts in blocks from the prompt's end (11), queries see those of earlier blocks unless shifted out, and their own block from the
    first query on. What lies past the end is seen by nobody before it."""
    width, end = tokens + 2, start + tokens
    canvas = SimpleNamespace(prompt_length=torch.tensor([11]), tokens=torch.zeros(1, 99))
    cursor = SimpleNamespace(canvas=canvas, plan=torch.tensor([[start, end, 1]]))
    cursor.block_of = lambda *given: Pipeline.block_of(cursor, *given)
    run = SimpleNamespace(target_block=size, cursor=cursor)
    mask = decoding.block_verify(run, torch.tensor([0]), torch.arange(start, start + width)[None])[0]
    block = [(start + i - 11) // size for i in range(width)]
    for i in range(tokens):
        assert mask[i, :width].tolist() == [j < tokens and block[j] <= block[i] for j in range(width)]
        assert not mask[i, width:].any()
        earlier = [j + size < tokens and block[j] < block[i] for j in range(width)]
        assert mask[width + i, :width].tolist() == earlier
        assert mask[width + i, width:].tolist() == [j < tokens and j // size == i // size for j in range(width)]
