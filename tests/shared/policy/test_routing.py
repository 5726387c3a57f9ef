from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.options import Bandit, Estimation, Routing, Sampling, Unmask
from shared.policy.acceptance import estimate, normalized_entropy
from shared.policy.draft import Draft
from shared.policy.routing import bin_of, confident, make_policy

ROWS, LENGTH, VOCAB = 3, 5, 4
POWER = {"token_acceptance_estimator": "soft_confidence_power", "ssd_confidence_power": 1.0}  # alpha = confidence
LEVELS = [0.0, 0.25, 0.5, 0.75, 1.0]  # exact in binary, so that scores meet thresholds exactly


def make_draft(masked, confidence, *, rows=None, logits=None, decoded=None) -> Draft:
    masked, confidence = torch.tensor(masked), torch.tensor(confidence)
    rows = torch.arange(len(masked)) if rows is None else torch.tensor(rows)
    zeros = torch.zeros(masked.shape, dtype=torch.long)
    logits = torch.zeros(*masked.shape, VOCAB) if logits is None else logits
    decoded = zeros[:, 0] if decoded is None else torch.tensor(decoded)
    return Draft(rows, zeros, masked, zeros, confidence, logits, torch.arange(len(masked)), decoded, Sampling())


def policy(name: str, *, rows: int = ROWS, bandit: dict | None = None, **routing):
    groups = Routing(do_verify_policy=name, **routing), Bandit(**(bandit or {}))
    return make_policy(*groups, Estimation(**POWER), Unmask(confidence_threshold=0.6), rows=rows, device="cpu")


@st.composite
def drafts(draw):
    """A draft of some of the rows, with a masked position in each (a finished row is not drafted)."""
    rows = draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True))
    cells = lambda values: [[draw(values) for _ in range(LENGTH)] for _ in rows]  # noqa: E731
    masked = cells(st.booleans())
    for row in masked:
        row[draw(st.integers(0, LENGTH - 1))] = True
    peaks = torch.tensor(cells(st.integers(0, 3)), dtype=torch.float32)
    logits = peaks[..., None] * torch.tensor([1.0, 0, 0, 0])
    decoded = [draw(st.integers(0, LENGTH - 1)) for _ in rows]
    return make_draft(masked, cells(st.sampled_from(LEVELS)), rows=rows, logits=logits, decoded=decoded)


def first_run(masked: list[bool]) -> list[int]:
    first = masked.index(True)
    run = [first]
    while run[-1] + 1 < len(masked) and masked[run[-1] + 1]:
        run.append(run[-1] + 1)
    return run


def plain_score(masked: list[bool], confidence: list[float], kind: str, price: float) -> float:
    run = first_run(masked)
    gain = sum(math.prod(confidence[i] for i in run[: k + 1]) for k in range(len(run)))
    high = sum(m and c > 0.6 for m, c in zip(masked, confidence, strict=True))
    return gain - price * (high if kind == "difference_dynamic" else 1)


@given(drafts())
def test_constant_policies(draft):
    for name, constant in (("always", True), ("never", False)):
        rule = policy(name)
        assert rule.constant is constant
        assert rule.decide(draft).tolist() == [constant] * len(draft.rows)
        rule.observe(draft, rule.decide(draft), draft.decoded)
        rule.reset([0])


@given(drafts(), st.integers(1, LENGTH + 1), st.booleans())
def test_mask_span_length(draft, shortest, legacy):
    rule = policy("mask_span_length", min_ssd_span_length=shortest, legacy_ssd_span_strategy=legacy)
    got = rule.decide(draft).tolist()
    for k, masked in enumerate(draft.masked.tolist()):
        high = int(confident(draft, Unmask(confidence_threshold=0.6))[k])
        few = high < min(shortest, sum(masked))
        assert got[k] == (len(first_run(masked)) >= shortest or (legacy and few))
    assert rule.constant is (True if shortest == 1 else None)
    assert shortest > 1 or all(got), "a policy that calls itself constant is"


@given(drafts(), st.sampled_from(["difference_static", "difference_dynamic"]), st.sampled_from([0.0, 0.5, 1.0]))
def test_score_threshold(draft, kind, threshold):
    rule = policy(
        "score_threshold", do_verify_score_type=kind, score_penalty_coef=0.5, do_verify_score_threshold=threshold
    )
    want = [
        plain_score(m, c, kind, 0.5) >= threshold
        for m, c in zip(draft.masked.tolist(), draft.confidence.tolist(), strict=True)
    ]
    assert rule.decide(draft).tolist() == want


def scored(*scores: float, rows=None) -> Draft:
    """Rows with a span of one token of confidence ``score``: the score itself, at no price."""
    masked = [[True, False, False, False, False]] * len(scores)
    return make_draft(masked, [[s, 0.0, 0.0, 0.0, 0.0] for s in scores], rows=rows)


def test_thresholds_at_equality():
    free = {"score_penalty_coef": 0.0}
    threshold = policy("score_threshold", do_verify_score_threshold=0.5, **free)
    assert threshold.decide(scored(0.25, 0.5, 0.75)).tolist() == [False, True, True], "equality verifies"
    switch = policy("score_hysteresis", hysteresis_threshold_on=0.5, hysteresis_threshold_off=0.25, **free)
    assert switch.decide(scored(0.25, 0.5, 0.75)).tolist() == [False, False, True], "on only above"
    assert switch.decide(scored(1.0, 1.0, 0.25)).tolist() == [True, True, True], "off only below"
    assert switch.decide(scored(0.0, 0.25, 0.0)).tolist() == [False, True, False]


@given(st.lists(drafts(), min_size=1, max_size=6), st.lists(st.integers(0, ROWS - 1), max_size=2))
def test_hysteresis_is_a_switch_per_row(steps, forgotten):
    rule = policy(
        "score_hysteresis",
        do_verify_score_type="difference_static",
        score_penalty_coef=0.5,
        hysteresis_threshold_on=0.5,
        hysteresis_threshold_off=0.0,
    )
    on = [False] * ROWS
    for draft in [*steps, None, *steps]:
        if draft is None:
            rule.reset(forgotten)
            on = [here and row not in forgotten for row, here in enumerate(on)]
            continue
        want = []
        for row, masked, confidence in zip(
            *(t.tolist() for t in (draft.rows, draft.masked, draft.confidence)), strict=True
        ):
            score = plain_score(masked, confidence, "difference_static", 0.5)
            on[row] = score >= 0.0 if on[row] else score > 0.5
            want.append(on[row])
        assert rule.decide(draft).tolist() == want


class PlainBandit:
    """One row's bandit: rewards per bucket and arm, in lists."""

    def __init__(self, options: Bandit):
        self.options, self.arms, self.time = options, {}, 0

    def bucket(self, draft: Draft, k: int) -> tuple[int, ...]:
        masked = draft.masked[k].tolist()
        run = first_run(masked)
        where = run if self.options.ucb_entropy_source == "span" else [i for i, m in enumerate(masked) if m]
        mean = float(normalized_entropy(draft.log_weights[k])[where].mean())
        part = lambda v, low, high, n: min(n - 1, int(n * (v - low) / (high - low)))  # noqa: E731
        return (
            part(len(run), 1, LENGTH, self.options.ucb_span_length_bins),
            part(int(draft.decoded[k]) / LENGTH, 0, 1, self.options.ucb_block_progress_bins),
            part(mean, 0, 1, self.options.ucb_entropy_bins),
        )

    def decide(self, draft: Draft, k: int) -> bool:
        self.time += 1
        self.at = self.arms.setdefault(self.bucket(draft, k), ([], []))
        skip, verify = (
            sum(a) / len(a) + self.options.ucb_beta * math.sqrt(math.log(self.time) / len(a)) if a else math.inf
            for a in self.at
        )
        return verify >= skip


@given(
    st.lists(drafts(), min_size=1, max_size=8),
    st.sampled_from(["span", "masked"]),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 4),
)
def test_bandit_against_lists(steps, source, bins, tokens):
    """Rows learn from their own steps alone, whatever else is in the batch, and forget on reset."""
    names = ("ucb_span_length_bins", "ucb_block_progress_bins", "ucb_entropy_bins")
    flat = {"ucb_entropy_source": source, "ucb_beta": 0.37, **dict(zip(names, bins, strict=True))}
    rule, plain = policy("contextual_bandit_ucb", bandit=flat), [PlainBandit(Bandit(**flat)) for _ in range(ROWS)]
    for number, draft in enumerate(steps * 2):
        if number == len(steps):
            rule.reset([1])
            plain[1] = PlainBandit(Bandit(**flat))
        got = rule.decide(draft)
        rows = draft.rows.tolist()
        assert got.tolist() == [plain[row].decide(draft, k) for k, row in enumerate(rows)]
        count = torch.tensor([tokens + row for row in rows])
        rule.observe(draft, got, count)
        for row, verified in zip(rows, got.tolist(), strict=True):
            plain[row].at[verified].append((tokens + row) / (2 if verified else 1))


def test_bandit_tries_verify_then_skip():
    rule, draft = policy("contextual_bandit_ucb", rows=1), scored(0.5)
    taken = []
    for _ in range(2):
        decision = rule.decide(draft)
        taken.append(bool(decision))
        rule.observe(draft, decision, torch.tensor([1]))
    assert taken == [True, False]


def test_bandit_forgets_the_rows_it_is_told_to():
    rule, draft = policy("contextual_bandit_ucb"), scored(0.5, 0.5, 0.5)
    for _ in range(3):
        rule.observe(draft, rule.decide(draft), torch.ones(3))
    rule.reset([1])
    assert rule.time.tolist() == [3, 0, 3]
    assert rule.tries.sum((1, 2)).tolist() == [3, 0, 3]
    assert rule.reward.sum((1, 2)).gt(0).tolist() == [True, False, True]


@pytest.mark.parametrize(("verified", "again"), [(2, True), (1, False), (3, True)])
def test_bandit_halves_the_reward_of_a_verified_step(verified, again):
    """Skipping earned 1 token a forward; verifying 2 forwards' worth: 2 tokens tie, and ties verify."""
    rule, draft = policy("contextual_bandit_ucb", rows=1), scored(0.5)
    for count in (verified, 1):
        rule.observe(draft, rule.decide(draft), torch.tensor([count]))
    assert rule.decide(draft).tolist() == [again]


def test_bandit_widens_with_time():
    # verify: mean 1 after 1 try; skip: mean 1.2 after 1 try; width sqrt(ln t / n) is the same for both, so skip is
    # preferred until its second try narrows it: then 1 + sqrt(ln 4) = 2.18 against 1.2 + sqrt(ln 4 / 2) = 2.03
    rule, draft = policy("contextual_bandit_ucb", rows=1), scored(0.5)
    rule.tries[0, 0], rule.tries[0, 1], rule.time[0] = 1, 1, 2
    rule.reward[0, 0], rule.reward[0, 1] = 1.2, 1.0
    assert rule.decide(draft).tolist() == [False]
    rule.tries[0, 0], rule.reward[0, 0] = 2, 2.4
    assert rule.decide(draft).tolist() == [True]


def test_bin_edges():
    edges = torch.tensor([-1.0, 0.0, 0.2499, 0.25, 0.5, 0.9999, 1.0, 2.0])
    assert bin_of(edges, 0, 1, 4).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert bin_of(edges, 0, 1, 1).tolist() == [0] * 8
    assert bin_of(edges, 1, 1, 4).tolist() == [0] * 8, "an empty range, as for a block of one token"


@given(st.floats(-2, 3), st.integers(1, 6))
def test_bins_are_in_range(value, bins):
    assert 0 <= int(bin_of(torch.tensor([value], dtype=torch.float64), 0, 1, bins)) < bins


@given(drafts())
def test_confident_is_strict_and_counts_masked_positions(draft):
    for threshold in LEVELS:
        got = confident(draft, Unmask(confidence_threshold=threshold)).tolist()
        pairs = zip(draft.masked.tolist(), draft.confidence.tolist(), strict=True)
        assert got == [sum(m and c > threshold for m, c in zip(*row, strict=True)) for row in pairs]


def test_score_uses_the_named_estimator():
    draft = make_draft([[True, True, False, False, False]], [[0.5] * 5])
    estimation = Estimation(token_acceptance_estimator="soft_renyi_2_entropy")
    options = Routing(
        do_verify_policy="score_threshold", do_verify_score_type="difference_static", score_penalty_coef=0
    )
    rule = make_policy(options, Bandit(), estimation, Unmask(), rows=1, device="cpu")
    alpha = estimate(draft.log_weights, draft.confidence, estimation)
    assert alpha[0, 0].item() == pytest.approx(0.25)  # four equal tokens
    assert rule.score(draft).item() == pytest.approx(0.25 + 0.25**2)


def test_a_step_with_nothing_masked_is_worth_nothing():
    """No price makes it worth a verify: a switch that such a step finds on goes off."""
    rule = policy(
        "score_hysteresis", score_penalty_coef=0.0, hysteresis_threshold_on=0.0, hysteresis_threshold_off=-9.0
    )
    full, done = [[True] * LENGTH], [[False] * LENGTH]
    assert rule.decide(make_draft(full, [[0.9] * LENGTH])).tolist() == [True]
    assert rule.decide(make_draft(done, [[0.9] * LENGTH])).tolist() == [False]
    assert not rule.on[0]


def test_the_bandit_does_not_try_a_step_with_nothing_masked():
    rule = policy("contextual_bandit_ucb")
    draft = make_draft([[False] * LENGTH], [[0.9] * LENGTH])
    rule.observe(draft, rule.decide(draft) & False, torch.zeros(1, dtype=torch.long))
    assert not rule.tries.any()
    assert not rule.time.any()
