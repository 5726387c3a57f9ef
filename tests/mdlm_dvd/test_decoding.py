"""The decoders, held to definitions and to each other on small random networks in float64."""

from __future__ import annotations

import pytest
import torch

from mdlm_dvd import decoding
from mdlm_dvd.src.network import Network
from mdlm_dvd.src.texts import Ask, Texts
from shared.errors import UserError
from shared.policy.uniforms import request_uniforms
from shared.trace import How
from tests.mdlm_dvd.models import EOS, MASK, nearly, network, prompts

LENGTH = 16
WHOLE = {"max_new_tokens": LENGTH, "truncate_at_eos": False}
DRAFTERS = {"another": lambda: network(1), "nearly the verifier": lambda: nearly(1), "itself": lambda: network(0)}
EVERY = {
    "llada": (decoding.llada_generate, {"steps": 9, "block_length": 8}),
    "llada threshold": (decoding.llada_generate, {"confidence_threshold": 0.3, "block_length": 10}),
    "llada sampled": (decoding.llada_generate, {"temperature": 0.7, "steps": 10}),
    "llada random": (decoding.llada_generate, {"remasking": "random", "steps": 10}),
    "llada guided": (decoding.llada_generate, {"cfg_scale": 0.5, "steps": 7}),
    "llada eos last": (decoding.llada_generate, {"confidence_eos_eot_inf": True, "eot_token_id": 61, "steps": 6}),
    "baseline_cascade": (decoding.baseline_cascade_generate, {"steps": 7}),
    "threshold_verifier": (decoding.threshold_verifier_generate, {"steps": 7, "threshold": 0.2}),
    "top_k_intersection": (decoding.top_k_intersection_generate, {"steps": 10}),
    "cascade": (decoding.cascade, {"block_length": 8}),
    "cascade threshold": (decoding.cascade, {"accept": "threshold", "accept_threshold": 0.05, "draft_steps": 3, "draft_threshold": 0.3}),
    "cascade visible": (decoding.cascade, {"verify_mode": "visible", "block_length": 8, "fill_threshold": 0.3}),
    "cascade queried": (decoding.cascade, {"verify_mode": "queried", "accept": "disagreement", "accept_threshold": 0.1}),
    "cascade leave_out": (decoding.cascade, {"verify_mode": "leave_out", "verify_groups": 3, "block_length": 10}),
    "cascade all": (decoding.cascade, {"accept": "all", "draft_steps": 2, "block_length": 8, "steps": 9}),
    "cascade cut short": (decoding.cascade, {"max_iterations": 2, "block_length": 8}),
    "topk_sets": (decoding.topk_sets_generate, {"set_size": 3, "min_prob": 0.01, "verify_mode": "visible"}),
    "verify_exact": (decoding.verify_exact_generate, {"steps": 9, "block_length": 8}),
    "verify_exact by itself": (decoding.verify_exact_generate, {"steps": 12, "draft_with": "verifier", "lookahead": 5}),
}  # fmt: skip


def run(name: str, ids: list[list[int]], drafter=None, **flat):
    decode, options = EVERY[name]
    alone = decode in (decoding.llada_generate, decoding.baseline_cascade_generate)
    how = {} if alone else {"drafter": drafter or nearly(1)}
    return decode(network(0), ids, **{**WHOLE, **options, **flat, **how})


@pytest.mark.parametrize("name", EVERY)
def test_a_row_is_what_it_is_alone(name):
    """Whatever stands beside it: ids, order, forwards, verifies."""
    ids = prompts(4)
    together = run(name, ids, seed=3)
    assert len(together.completions) == 4
    for k, prompt in enumerate(ids):
        (alone,) = run(name, [prompt], seed=3, requests=[k]).completions
        for part in ("tokens", "uniforms_used"):
            assert getattr(together.completions[k], part) == getattr(alone, part)
        for part in ("how_of", "step_of", "rank_of", "verifies", "lanes"):
            assert getattr(together.completions[k].trace, part) == getattr(alone.trace, part), part
    halves = run(name, ids, seed=3, batch_size=2)
    assert halves.tokens == together.tokens


@pytest.mark.parametrize("name", EVERY)
def test_every_place_is_decided_once_and_prompts_stay(name):
    ids = prompts(3, seed=1)
    out = run(name, ids)
    for prompt, text in zip(ids, out.completions, strict=True):
        trace = text.trace
        assert trace.token_ids == prompt + text.tokens
        assert len(text.tokens) == LENGTH
        assert MASK not in text.tokens
        assert sorted(p for step in trace.order() for p in step) == list(range(len(prompt), len(prompt) + LENGTH))
        assert sum(trace.counts().values()) == LENGTH
        ranks = [sorted(trace.rank_of[p] for p in step) for step in trace.order()]
        assert ranks == [list(range(len(r))) for r in ranks]


@pytest.mark.parametrize("name", EVERY)
def test_forwards_are_counted(name, monkeypatch):
    """Counted passes are real ones: of the verifier, and of the drafter."""
    real = {}
    for role, model in (("verifier", network(0)), ("drafter", nearly(1))):
        real[role] = 0

        def forward(*given, _role=role, _model=model, **how):
            real[_role] += 1
            return type(_model).forward(_model, *given, **how)

        monkeypatch.setattr(model, "forward", forward, raising=False)
    out = run(name, prompts(3, seed=2))
    counted = {lane: sum(s.forwards for s in kinds.values()) for lane, kinds in out.batch.items()}
    assert {k: v for k, v in real.items() if v} == counted


@pytest.mark.parametrize(("block_length", "steps"), [(None, 9), (8, None), (7, 9)])
@pytest.mark.parametrize("by", [*DRAFTERS, "the verifier before"])
def test_verify_exact_is_the_verifier_alone(by, steps, block_length):
    """Whatever is proposed: the greedy text of ``llada``, written in the same order, in no more passes."""
    drafter = DRAFTERS.get(by, DRAFTERS["another"])()
    how = {**WHOLE, "steps": steps, "block_length": block_length}
    alone = decoding.llada_generate(network(0), prompts(4), **how)
    extra = {"draft_with": "verifier"} if by not in DRAFTERS else {}
    exact = decoding.verify_exact_generate(network(0), prompts(4), drafter=drafter, lookahead=3, **how, **extra)
    assert exact.tokens == alone.tokens
    assert exact.lossless
    decided = lambda out: [[p for step in c.trace.order() for p in step] for c in out.completions]  # noqa: E731
    assert decided(exact) == decided(alone)
    for one, other in zip(exact.completions, alone.completions, strict=True):
        assert one.trace.forwards["verify"] <= other.trace.forwards["draft"]
    if by == "itself":
        assert exact.batch_forwards["verify"] <= -(-(steps or LENGTH) // 3) + 3, "its own drafts are all accepted"


@pytest.mark.parametrize("block_length", [None, 7])
@pytest.mark.parametrize("how", [{}, {"draft_steps": 3, "draft_threshold": 0.4}, {"draft_cache": False}])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_exact_cascade_is_the_verifier_token_by_token(drafter, how, block_length):
    """Any drafter, any draft: the verifier's greedy text at block size one, by definition one token a forward."""
    found = Network(DRAFTERS[drafter](), block_length=8)
    out = decoding.cascade(network(0), prompts(4), drafter=found, block_length=block_length, **WHOLE, **how)
    assert out.lossless
    assert out.tokens == [token_by_token(p) for p in prompts(4)]
    assert out.forwards["verify"] < 4 * LENGTH or drafter == "another"
    none = decoding.cascade(network(0), prompts(4), drafter=found, draft_steps=0, **WHOLE)
    assert none.tokens == out.tokens
    assert none.forwards["verify"] == 4 * LENGTH


def token_by_token(prompt: list[int]) -> list[int]:
    """The definition: each token from a mask that sees the prompt, which sees itself whole, and the tokens before, which see those before them."""
    model, tokens = network(0), []
    for _ in range(LENGTH):
        ids = torch.tensor([[*prompt, *tokens, MASK]])
        place = torch.tensor([*[-1] * len(prompt), *range(len(tokens) + 1)])
        logits = model(ids, torch.arange(ids.shape[1])[None], None, place[None, :] <= place[:, None])[0, -1]
        logits[MASK] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


def test_a_draft_of_everything_is_kept_and_one_of_nothing_is_the_verifier():
    """``accept all``: what the drafter fills stays, what it leaves is the verifier's own decode."""
    how = {**WHOLE, "block_length": 8, "steps": 12}
    nothing = decoding.cascade(network(0), prompts(3), drafter=network(1), accept="all", draft_steps=0, **how)
    assert nothing.tokens == decoding.llada_generate(network(0), prompts(3), **how).tokens
    some = {**WHOLE, "block_length": 8, "confidence_threshold": 0.4}
    drafted = decoding.llada_generate(network(1), prompts(3), **some)
    everything = decoding.cascade(
        network(0), prompts(3), drafter=network(1), accept="all", draft_steps=LENGTH, draft_threshold=0.4, **how
    )
    assert everything.tokens == drafted.tokens
    assert "verify" not in everything.batch.get("verifier", {})


def test_thresholds_at_their_ends():
    """At 0 every proposal stays, above 1 none does, and both end in time."""
    how = {**WHOLE, "steps": 8, "drafter": network(1)}
    kept = decoding.threshold_verifier_generate(network(0), prompts(2), threshold=0.0, **how)
    assert all(v.accepted == v.sent for c in kept.completions for v in c.trace.verifies)
    assert {How(h) for c in kept.completions for h in c.trace.how_of} == {How.PROMPT, How.ACCEPTED}
    none = decoding.threshold_verifier_generate(network(0), prompts(2), threshold=1.1, **how)
    assert all(v.accepted == 0 for c in none.completions for v in c.trace.verifies)
    cascade = decoding.cascade(
        network(0), prompts(2), drafter=network(1), accept="threshold", accept_threshold=1.1, verify_mode="visible", fill_threshold=None, **WHOLE
    )  # fmt: skip
    assert all(c.trace.steps == LENGTH for c in cascade.completions), "one forced token a round"


@pytest.mark.parametrize("size", [1, 64])
def test_topk_sets_at_their_ends(size):
    """One token is an exact match; the whole vocabulary is the verifier's own likeliest."""
    how = {**WHOLE, "drafter": nearly(1), "verify_mode": "visible", "block_length": 8}
    sets = decoding.topk_sets_generate(network(0), prompts(3), set_size=size, **how)
    if size == 1:
        exact = decoding.cascade(network(0), prompts(3), accept="exact", **how)
        assert sets.tokens == exact.tokens
    else:
        assert all(v.accepted == v.sent for c in sets.completions for v in c.trace.verifies)


@pytest.mark.parametrize("from_prompt", [True, False])
@torch.inference_mode()
def test_a_cached_pass_is_that_without_a_cache(from_prompt):
    model = network(0)
    texts = Texts(prompts(3), Ask(LENGTH, MASK, whole=True))
    drafter, plain = (Network(model, 8, from_prompt=from_prompt) for _ in range(2))
    held = []
    for count in (0, 5, 8, 9, 13, 16):
        for i in range(3):
            texts.canvas.tokens[i, texts.lengths[i] : texts.lengths[i] + count] = torch.arange(count)
        rows = [0, 1, 2] if count != 9 else [2, 0]
        region = texts.region(rows)
        got, spent = drafter.cached(texts, rows, region)
        want, _ = plain.whole(texts, rows, region)
        masked = region == MASK
        assert torch.allclose(got[masked], want[masked], atol=1e-9)
        held.append(sum(s.context for s in spent))
    assert held[-1] > held[3] > 0
    drafter.crop(6)
    assert max(drafter.held) <= 6
    got, _ = drafter.cached(texts, [0, 1, 2], texts.region([0, 1, 2]))


def test_early_ends():
    """A stop token ends a text before it, and what is behind it costs nothing more; without one the texts are those of whole regions."""
    whole = decoding.llada_generate(network(0), prompts(6), block_length=4, **WHOLE)
    stop = whole.tokens[0][LENGTH // 2]
    for name in ("llada", "cascade", "verify_exact"):
        full = run(name, prompts(6), block_length=4, steps=None)
        cut = run(name, prompts(6), block_length=4, steps=None, truncate_at_eos=True, stopping_criteria_idx=(stop,))
        for one, other in zip(full.tokens, cut.tokens, strict=True):
            assert other == one[: one.index(stop) if stop in one else LENGTH]
        assert sum(cut.forwards.values()) <= sum(full.forwards.values())
    out = decoding.llada_generate(
        network(0), prompts(6), block_length=4, max_new_tokens=LENGTH, stopping_criteria_idx=(stop,)
    )
    assert sum(out.forwards.values()) < sum(whole.forwards.values())


def test_streams_what_is_decided():
    given: dict[int, list[int]] = {}
    out = decoding.cascade(
        network(0), prompts(3), drafter=nearly(1), on_block=lambda k, new: given.setdefault(k, []).extend(new), **WHOLE
    )
    assert [given[k] for k in range(3)] == out.tokens


def test_seeds_and_recorded_numbers():
    how = {**WHOLE, "temperature": 0.8, "steps": 6}
    one, two, other = (decoding.llada_generate(network(0), prompts(3), seed=s, **how).tokens for s in (5, 5, 6))
    assert one == two != other
    used = 6 * LENGTH
    recorded = [request_uniforms(5, k, used).tolist() for k in range(3)]
    assert decoding.llada_generate(network(0), prompts(3), uniforms=recorded, **how).tokens == one


def test_sampling_follows_the_softmax():
    """One place, many seeds: the first token's frequencies are the network's probabilities (4 deviations)."""
    prompt, count = [5, 6, 7], 3000
    out = decoding.llada_generate(
        network(0), [prompt] * count, max_new_tokens=1, temperature=1.5, truncate_at_eos=False
    )
    ids = torch.tensor([[*prompt, MASK]])
    logits = network(0)(ids, torch.arange(4)[None])[0, -1]
    logits[MASK] = -torch.inf
    want = (logits / 1.5).softmax(-1)
    got = torch.bincount(torch.tensor([t[0] for t in out.tokens]), minlength=64) / count
    assert ((got - want).abs() <= 4 * (want * (1 - want) / count).sqrt() + 1e-9).all()


def test_bad_input_is_refused():
    refused = [
        (lambda: run("llada", prompts(1), steps=1, block_length=8), "steps is 1. Allowed: at least 2"),
        (lambda: run("llada", prompts(1), block_lenght=4), "block_length"),
        (lambda: run("llada", [[1, MASK]]), "contains the mask token"),
        (lambda: run("llada", [[]]), "is empty"),
        (lambda: run("llada", [[1] * 120]), "120 tokens"),
        (lambda: run("cascade", prompts(1), accept="exat"), "exact"),
        (lambda: run("topk_sets", prompts(1), accept="threshold"), "accept is 'threshold'"),
        (lambda: run("verify_exact", prompts(1), confidence_threshold=0.5), "confidence_threshold is 0.5"),
        (lambda: run("verify_exact", prompts(1), remasking="random"), "remasking is random"),
    ]
    for call, said in refused:
        with pytest.raises(UserError, match=said):
            call()
    with pytest.raises(UserError, match="block by block"):
        decoding.verify_exact_generate(Network(network(0), block_length=8), prompts(1), drafter=network(1), **WHOLE)


def test_eos_flags_at_a_temperature():
    """``logits_eos_inf`` forbids the end; ``confidence_eos_eot_inf`` takes it last, at any temperature."""
    how = {**WHOLE, "temperature": 2.5, "steps": LENGTH, "eos_token_id": EOS, "eot_token_id": 61}
    free = decoding.llada_generate(network(0), prompts(25), **how)
    assert any(EOS in t for t in free.tokens)
    never = decoding.llada_generate(network(0), prompts(25), logits_eos_inf=True, **how)
    assert not any(EOS in t for t in never.tokens)
    last = decoding.llada_generate(network(0), prompts(25), confidence_eos_eot_inf=True, **how)
    for text in last.completions:
        trace = text.trace
        ends = [
            trace.confidence_of[p]
            for p in range(trace.prompt_length, len(trace.token_ids))
            if trace.token_ids[p] in (EOS, 61)
        ]
        assert all(c == 0 for c in ends)
