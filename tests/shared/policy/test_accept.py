from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.options import Acceptance, Blocks, Cache, Routing, Sampling, Unmask
from shared.output import Lossless
from shared.policy.accept import (
    accept_span,
    acceptance_ratio,
    accepted_length,
    residual,
    sample_and_match,
    self_speculative_losslessness,
    take_confident,
    verified_choice,
)
from shared.policy.draft import Choice, Draft
from shared.policy.uniforms import Uniforms
from shared.trace import How

SAMPLED = Sampling(temperature=1.0)


def make_draft(masked, tokens, probs, sampling=SAMPLED) -> Draft:
    """``probs [b, L, V]``: the drafter's distribution at every position."""
    masked, tokens, probs = torch.tensor(masked), torch.tensor(tokens), torch.tensor(probs)
    confidence = probs.gather(-1, tokens[..., None])[..., 0]
    rows = torch.arange(len(masked))
    return Draft(rows, torch.full_like(tokens, 9), masked, tokens, confidence, probs.log(), rows, rows * 0, sampling)


def given_uniforms(*rows: list[float]) -> Uniforms:
    source = Uniforms(len(rows), max(map(len, rows)), recorded=rows)
    for k in range(len(rows)):
        source.assign(k, k)
    return source


def judge_block(draft: Draft, logits, options: Acceptance, sampling: Sampling, source: Uniforms):
    """`accept_span` with a query at every position of the block."""
    queries = torch.arange(draft.tokens.shape[1]).expand_as(draft.tokens)
    return accept_span(draft, logits, queries, options, sampling, source)


flags = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8)


@given(flags)
def test_accepted_length(cells):
    passed, span = (torch.tensor([row]) for row in zip(*cells, strict=True))
    inside = [good for good, inside in cells if inside]
    want = inside.index(False) if False in inside else len(inside)
    assert accepted_length(passed, span).tolist() == [want]


simplex = st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(any).map(lambda w: [x / sum(w) for x in w])


@given(simplex, simplex)
def test_residual_by_its_definition(q, p):
    positive = [max(a - b, 0.0) for a, b in zip(q, p, strict=True)]
    want = [x / sum(positive) for x in positive] if sum(positive) > 1e-6 else None
    got = residual(torch.tensor([q]), torch.tensor([p]))[0]
    assert float(got.sum()) == pytest.approx(1, abs=1e-5)
    if want:
        assert got.tolist() == pytest.approx(want, abs=1e-5)


def test_residual_by_hand():
    # q - p = 0.3, -0.1, -0.2: all of the residual is on token 0
    q, p = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.4, 0.4]])
    assert residual(q, p).tolist() == [[1, 0, 0]]
    assert residual(q, q).tolist() == q.tolist(), "no mass: the target itself"
    assert residual(q, torch.full_like(p, math.nan)).tolist() == q.tolist(), "not finite: the target itself"


@given(simplex, simplex)
def test_accept_or_resample_has_the_target_distribution(q, p):
    """P(x) = p(x) min(1, q(x)/p(x)) + P(reject) residual(x) = q(x), in closed form."""
    q, p = torch.tensor(q, dtype=torch.float64), torch.tensor(p, dtype=torch.float64)
    kept = p * acceptance_ratio(q, p, 1.0)
    distribution = kept + (1 - kept.sum()) * residual(q[None], p[None])[0]
    assert distribution.tolist() == pytest.approx(q.tolist(), abs=1e-6)


def test_acceptance_ratio_by_hand():
    q, p = torch.tensor([[0.2, 0.9, 0.5]]), torch.tensor([[0.8, 0.5, 0.25]])
    # 0.2 / 0.8, 0.9 / 0.5 capped, 0.5 / 0.25 capped
    assert acceptance_ratio(q, p, 1.0)[0].tolist() == pytest.approx([0.25, 1, 1])
    assert acceptance_ratio(q, p, 0.5)[0].tolist() == pytest.approx([0.5, 1, 1])
    assert acceptance_ratio(torch.zeros(1), torch.zeros(1), 1.0).tolist() == [0], "nothing is divided by nothing"


Q = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]])  # the verifier's distribution of three positions


@pytest.mark.parametrize(
    ("uniforms", "accepted", "resampled", "used"),
    [
        # drafts are token 0 with p = 0.5: ratios 0.5, 1, 1; q - p = (-0.25, 0.25) at position 0, so 1 is drawn
        ([0.4, 0.9, 0.9, 0.3], [0, 1, 2], {}, 3),
        ([0.5, 0.9, 0.9, 0.3], [], {0: 1}, 4),
        ([0.6, 0.0, 0.0, 0.99], [], {0: 1}, 4),
    ],
    ids=["accepted", "equality rejects", "rejected"],
)
def test_random_rule_worked(uniforms, accepted, resampled, used):
    draft = make_draft([[True] * 3], [[0, 0, 0]], [[[0.5, 0.5]] * 3])
    source = given_uniforms(uniforms)
    verdict = judge_block(draft, Q.log()[None], Acceptance(), SAMPLED, source)
    assert verdict.ratio[0].tolist() == pytest.approx([0.5, 1, 1])
    assert verdict.accepted[0].nonzero()[:, 0].tolist() == accepted
    assert verdict.rejected[0].nonzero()[:, 0].tolist() == list(resampled)
    for position, token in resampled.items():
        assert int(verdict.replacement[0, position]) == token
    assert source.cursor.tolist() == [used]


def test_uniforms_are_taken_in_span_order_by_each_row_alone():
    """Row 0 has a span of 1 at position 2, row 1 a span of 2 at position 0, row 2 a span of 3: 1, 2 and 3 numbers, plus 1 each on rejection."""
    masked = [[False, False, True], [True, True, False], [True, True, True]]
    draft = make_draft(masked, [[0, 0, 0]] * 3, [[[1.0, 0.0]] * 3] * 3)
    target = torch.tensor([[0.6, 0.4]]).log().expand(3, 3, 2)
    source = given_uniforms([0.5, 0.7], [0.5, 0.7, 0.1], [0.1, 0.2, 0.3, 0.9])
    verdict = judge_block(draft, target, Acceptance(), SAMPLED, source)
    assert verdict.accepted.tolist() == [[False, False, True], [True, False, False], [True] * 3]
    assert verdict.rejected.tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert int(verdict.replacement[1, 1]) == 1
    assert source.cursor.tolist() == [1, 3, 3]


@st.composite
def judgements(draw):
    """A draft of some rows with spans anywhere, the verifier's logits over the whole block, and enough uniforms for every row."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    masked = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(rows)]
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    probs = torch.rand(rows, length, 3, generator=rng).softmax(-1)
    tokens = torch.randint(3, (rows, length), generator=rng)
    logits = 2 * torch.randn(rows, length, 3, generator=rng)
    numbers = torch.rand(rows, length + 1, generator=rng)
    return masked, tokens.tolist(), probs.tolist(), logits, numbers.tolist()


@given(
    judgements(),
    st.sampled_from([(Acceptance(), SAMPLED), (Acceptance(acceptance="exact"), Sampling())]),
    st.integers(0, 2),
)
def test_queries_of_the_span_alone_give_the_same_verdict(problem, mode, spare):
    """Rows of a short verify have as many queries as the longest span (and ``spare`` more), padded with L; what their logits are is nobody's business."""
    masked, tokens, probs, logits, numbers = problem
    options, sampling = mode
    draft, length = make_draft(masked, tokens, probs, sampling), len(tokens[0])
    whole_source, short_source = given_uniforms(*numbers), given_uniforms(*numbers)
    want = judge_block(draft, logits, options, sampling, whole_source)
    spans = [span.nonzero()[:, 0].tolist() for span in draft.span]
    count = max(1, *map(len, spans), min(length, max(map(len, spans)) + spare))
    queries = torch.tensor([span + [length] * (count - len(span)) for span in spans])
    some = torch.full((len(spans), count, 3), 77.0)
    for row, span in enumerate(spans):
        some[row, : len(span)] = logits[row, span]
    got = accept_span(draft, some, queries, options, sampling, short_source)
    assert torch.equal(got.accepted, want.accepted)
    assert torch.equal(got.rejected, want.rejected)
    assert torch.equal(got.ratio[draft.span], want.ratio[draft.span])
    assert not got.ratio[~draft.span].any(), "nothing is known of the other positions"
    assert torch.equal(got.replacement[got.rejected], want.replacement[want.rejected])
    assert torch.equal(short_source.cursor, whole_source.cursor)


def test_no_resample_draws_no_replacement():
    draft = make_draft([[True] * 2], [[0, 0]], [[[1.0, 0.0]] * 2])
    source = given_uniforms([0.9, 0.9, 0.9])
    options = Acceptance(allow_resample=False)
    verdict = judge_block(draft, torch.tensor([[[0.5, 0.5]] * 2]).log(), options, SAMPLED, source)
    assert verdict.replacement is None
    assert source.cursor.tolist() == [2]
    choice = verified_choice(draft, verdict, options)
    assert choice.how.tolist() == [[How.KEPT, How.NONE]]
    assert choice.tokens[0, 0] == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_exact_greedy_accepts_while_the_draft_is_the_argmax(cells):
    tokens, best, masked = (list(c) for c in zip(*cells, strict=True))
    greedy = Sampling()
    draft = make_draft([masked], [tokens], [[[0.4, 0.3, 0.3]] * len(tokens)], greedy)
    logits = torch.nn.functional.one_hot(torch.tensor([best]), 3).float()
    source = given_uniforms([0.999])
    verdict = judge_block(draft, logits, Acceptance(acceptance="exact"), greedy, source)
    choice = verified_choice(draft, verdict, Acceptance(acceptance="exact"))
    assert source.cursor.tolist() == [0], "nothing random"
    want = {}
    for i in [i for i, inside in enumerate(draft.span[0].tolist()) if inside]:
        want[i] = best[i]
        if tokens[i] != best[i]:
            break
    assert choice.take[0].nonzero()[:, 0].tolist() == list(want)
    assert [int(choice.tokens[0, i]) for i in want] == list(want.values())


def test_published_greedy_is_random():
    """On argmax drafts the published rule still compares a uniform with q / p."""
    draft = make_draft([[True]], [[0]], [[[0.8, 0.2]]], Sampling())
    logits = torch.tensor([[[0.4, 0.6]]]).log()
    outcome = lambda u: judge_block(draft, logits, Acceptance(), Sampling(), given_uniforms([u, 0.5]))  # noqa: E731
    assert outcome(0.49).accepted.any()
    assert outcome(0.51).rejected.any()


def test_verifier_logits_go_through_the_same_filters():
    """Top-k 1 leaves token 1 alone in q: the draft of token 0 has ratio 0."""
    sampling = Sampling(temperature=1.0, top_k=1)
    draft = make_draft([[True]], [[0]], [[[1.0, 0.0]]], sampling)
    verdict = judge_block(draft, torch.tensor([[[0.0, 0.1]]]), Acceptance(), sampling, given_uniforms([0.0, 0.5]))
    assert verdict.ratio.tolist() == [[0]]
    assert verdict.rejected.tolist() == [[True]]
    assert verdict.replacement.tolist() == [[1]]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.5), Sampling(verify_temperature=0.5)])
def test_verifier_logits_have_the_target_temperature(sampling):
    # logits ln 2 and 0 at temperature 1/2: weights 4 and 1, so q(1) = 0.2, against p = 0.4
    draft = make_draft([[True]], [[1]], [[[0.6, 0.4]]], sampling)
    verdict = judge_block(
        draft, torch.tensor([[[math.log(2.0), 0.0]]]), Acceptance(), sampling, given_uniforms([0.0, 0.5])
    )
    assert verdict.ratio.item() == pytest.approx(0.5)


def test_replacements_at_even_uniforms_have_the_residual_distribution():
    # q - p = (0.1, 0.2, -0.3): residual 1/3, 2/3, 0
    n = 300
    draft = make_draft([[True]] * n, [[2]] * n, [[[0.2, 0.2, 0.6]]] * n)
    source = given_uniforms(*([0.99, (k + 0.5) / n] for k in range(n)))
    verdict = judge_block(draft, torch.tensor([[[0.3, 0.4, 0.3]]] * n).log(), Acceptance(), SAMPLED, source)
    assert verdict.rejected.all()
    assert verdict.replacement[:, 0].bincount(minlength=3).tolist() == [100, 200, 0]


def test_ratio_side_door():
    # drafts of token 0 with p = 0.5; q = 0.1, 0.3, 0.2, 0.45: ratios 0.2, 0.6, 0.4, 0.9; position 2 is known
    draft = make_draft([[True, True, False, True]], [[0] * 4], [[[0.5, 0.5]] * 4])
    target = torch.tensor([[[0.1, 0.9], [0.3, 0.7], [0.2, 0.8], [0.45, 0.55]]]).log()
    verdict = judge_block(draft, target, Acceptance(), SAMPLED, given_uniforms([0.9, 0.9, 0.5]))
    how = lambda **flat: verified_choice(draft, verdict, Acceptance(**flat)).how[0].tolist()  # noqa: E731
    assert how() == [How.RESAMPLED, 0, 0, 0]
    assert how(ssd_ratio_threshold=0.5) == [How.RESAMPLED, How.RATIO, 0, 0], "the span only"
    assert how(ssd_ratio_threshold=0.7, ssd_threshold_all_spans=True) == [How.RESAMPLED, 0, 0, How.RATIO]
    assert how(ssd_ratio_threshold=0.0, ssd_threshold_all_spans=True) == [How.RESAMPLED, How.RATIO, 0, How.RATIO]


def test_ratio_threshold_takes_equality():
    # q / p = 0.25 / 0.5, exact in binary
    draft = make_draft([[True, True]], [[0, 0]], [[[0.5, 0.5]] * 2])
    verdict = judge_block(
        draft, torch.tensor([[[0.25, 0.75]] * 2]).log(), Acceptance(), SAMPLED, given_uniforms([0.9] * 3)
    )
    at = float(verdict.ratio[0, 1])
    assert verified_choice(draft, verdict, Acceptance(ssd_ratio_threshold=at)).count.tolist() == [2]
    assert verified_choice(draft, verdict, Acceptance(ssd_ratio_threshold=at + 1e-6)).count.tolist() == [1]


def test_take_confident_is_strict_and_descending():
    draft = make_draft([[True, True, False, True]], [[0] * 4], [[[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.875, 0.125]]])
    choice = Choice.none(draft)
    take_confident(choice, draft, Unmask(confidence_threshold=0.5))
    assert choice.how[0].tolist() == [0, How.CONFIDENT, 0, How.CONFIDENT]
    assert choice.rank[0, [1, 3]].tolist() == [1, 0]


def test_recorded_order_is_span_then_replacement_then_ratio():
    draft = make_draft([[True] * 3], [[0] * 3], [[[0.5, 0.5]] * 3])
    verdict = judge_block(draft, Q.flip(0).log()[None], Acceptance(), SAMPLED, given_uniforms([0.0, 0.0, 0.9, 0.0]))
    choice = verified_choice(draft, verdict, Acceptance())
    assert choice.how[0].tolist() == [How.ACCEPTED, How.ACCEPTED, How.RESAMPLED]
    assert choice.rank[0].tolist() == [0, 1, 2]
    assert int(choice.tokens[0, 2]) == 1  # q - p = (-0.25, 0.25)


def options(**flat):
    """The groups `self_speculative_losslessness` reads, resolved and lossless unless ``flat`` breaks them."""
    take = lambda group, **base: group(**{**base, **{k: v for k, v in flat.items() if k in group.__slots__}})  # noqa: E731
    return SimpleNamespace(
        sampling=take(Sampling),
        blocks=take(Blocks, block_length=8, denoising_steps=8),
        acceptance=take(Acceptance, acceptance="exact"),
        routing=take(Routing),
        cache=take(Cache, cache_ver=True),
    )


def test_losslessness():
    assert self_speculative_losslessness(options()) == Lossless(
        True, "every token is verified: same greedy text as block size one"
    )
    assert self_speculative_losslessness(options(temperature=0.5, acceptance="published"))
    assert "sampling distribution" in self_speculative_losslessness(options(temperature=0.5)).reason
    assert self_speculative_losslessness(options(denoising_steps=9)), (
        "a step is due one token, which verification decides"
    )
    both = self_speculative_losslessness(options(cache_ver=False, do_verify_policy="score_threshold"))
    assert not both
    assert both.reason.count(";") == 1, "every reason is told"
    own = self_speculative_losslessness(options(), {"the family edits": True, "and more": False})
    assert own == Lossless(False, "the family edits")


@pytest.mark.parametrize(
    "mode", [("published", SAMPLED), ("exact", SAMPLED), ("published", Sampling()), ("exact", Sampling())]
)
def test_verifier_logits_that_are_not_numbers(mode):
    """The verdict says so, which stops the decode; the random rule accepts nothing either."""
    acceptance, sampling = mode
    draft = make_draft([[True] * 3], [[0] * 3], [[[0.5, 0.5]] * 3], sampling)
    logits = torch.full((1, 3, 2), math.nan)
    verdict = judge_block(draft, logits, Acceptance(acceptance=acceptance), sampling, given_uniforms([0.0] * 4))
    assert verdict.finite.tolist() == [False]
    if (acceptance, sampling) != ("exact", Sampling()):
        assert not verdict.accepted.any()


def test_sample_and_match_by_hand():
    """The verifier draws 2, 0, 1; the drafts say 2, 1: one is accepted, and the verifier's own token follows it."""
    probs = torch.tensor([[[0.2, 0.2, 0.6], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]])
    uniforms = torch.tensor([[0.9, 0.1, 0.5]])
    drafted = torch.tensor([[2, 1]])
    accepted, tokens = sample_and_match(drafted, probs.log(), uniforms, Sampling(temperature=1.0))
    assert (accepted.tolist(), tokens.tolist()) == ([1], [[2, 0, 1]])
    accepted, tokens = sample_and_match(torch.tensor([[2, 0]]), probs.log(), None, Sampling())
    assert (accepted.tolist(), tokens.tolist()) == ([2], [[2, 0, 1]]), "greedy; all accepted, and one more"
    again, _ = sample_and_match(torch.tensor([[1, 0]]), probs.log(), None, Sampling())
    assert again.tolist() == [0], "what follows a mismatch does not count"
