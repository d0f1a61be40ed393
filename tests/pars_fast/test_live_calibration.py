"""Tau under censoring, arrival cohorts, and the online scale."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from pars_fast.live_calibration import (
    COHORT_SIZE,
    MAX_OPEN,
    ArrivalCohorts,
    Ending,
    Observation,
    TokenScale,
    bias,
    censored_tau,
    fit_token_scale,
    tau_of,
)


@dataclass
class Answer:
    num_output_tokens: int = 0


def observation(expected: float, tokens: int, ending: Ending = Ending.COMPLETE) -> Observation:
    seen = Observation(expected, Answer(tokens))
    seen.end(ending)
    return seen


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=40))
def test_without_censoring_it_is_scipys_tau_b(pairs: list[tuple[int, int]]) -> None:
    scores, lengths = zip(*pairs, strict=True)
    expected = kendalltau(scores, lengths).statistic
    interval = censored_tau(scores, lengths, [True] * len(pairs))
    assert interval.tau == pytest.approx(expected, nan_ok=True)
    if math.isnan(expected):
        assert (interval.low, interval.high) == (-1.0, 1.0)
    else:
        assert -1.0 <= interval.low <= interval.tau + 1e-12
        assert interval.tau - 1e-12 <= interval.high <= 1.0


@pytest.mark.parametrize(
    ("scores", "lengths", "complete", "tau"),
    [
        ([1, 2, 3], [10, 20, 20], [1, 0, 0], 2 / math.sqrt(2 * 3)),  # the two capped ones do not compare
        ([1, 2], [20, 20], [1, 0], 1.0),  # the capped one went on
        ([2, 1], [20, 10], [1, 0], math.nan),  # an abort at 10 may have become longer than 20
        ([1, 2], [5, 5], [0, 0], math.nan),
    ],
)
def test_pairs_count_when_their_order_is_known(
    scores: list[float], lengths: list[float], complete: list[int], tau: float
) -> None:
    assert censored_tau(scores, lengths, complete).tau == pytest.approx(tau, nan_ok=True)


@pytest.mark.parametrize("cap", [None, 120])
def test_the_interval_covers_the_truth(cap: int | None) -> None:
    """Of 200 samples of 128, about 95 % must hold the tau of the population; a cap hides its long end."""
    rng = np.random.default_rng(0)

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        log_length = rng.normal(4.5, 1.0, count)
        return log_length + rng.normal(0.0, 1.5, count), np.exp(log_length)

    whole = censored_tau(*sample(3000), [True] * 3000).tau
    covered = 0
    for _ in range(200):
        score, length = sample(128)
        complete = length < (cap or math.inf)
        interval = censored_tau(score, np.minimum(length, cap or math.inf), complete)
        if cap is not None:  # what a capped sample estimates is another figure: of the pairs that compare
            assert 0.0 < interval.tau < 1.0
        covered += interval.low <= whole <= interval.high
    assert covered >= (180 if cap is None else 100)


def test_a_cohort_is_consecutive_and_waits_for_its_long_answers() -> None:
    cohorts = ArrivalCohorts(size=20)
    answers = [Answer() for _ in range(60)]
    for seq, answer in enumerate(answers):
        cohorts.add(seq, Observation(float(seq), answer))
    for seq in range(20, 60):  # those that came later end first: a running figure would take them
        answers[seq].num_output_tokens = seq
        ready = cohorts.end(seq, Ending.COMPLETE)
        assert (ready is not None) == (seq in (38, 58))
    answers[7].num_output_tokens = 70
    for seq in range(20):
        if seq == 7:
            continue
        answers[seq].num_output_tokens = seq + 1
        ready = cohorts.end(seq, Ending.COMPLETE)
    assert ready is not None
    assert [o.expected_tokens for o in ready] == list(range(20))
    assert (ready[7].output_tokens, ready[7].ending) == (70, Ending.CUT)  # still under way
    answers[7].num_output_tokens = 99
    assert cohorts.end(7, Ending.COMPLETE) is None
    assert ready[7].output_tokens == 70


def test_endings_of_unscored_requests_are_passed_over() -> None:
    assert ArrivalCohorts().end(5, Ending.COMPLETE) is None


def test_what_is_followed_at_once_is_bounded() -> None:
    cohorts = ArrivalCohorts()
    for seq in range(2 * MAX_OPEN):
        cohorts.add(seq, Observation(1.0, Answer()))
    assert len(cohorts._of) == MAX_OPEN


@given(st.lists(st.tuples(st.floats(1, 1e4), st.integers(1, 10_000)), min_size=COHORT_SIZE, max_size=150))
def test_a_fitted_scale_makes_no_two_scores_equal(pairs: list[tuple[float, int]]) -> None:
    scale = fit_token_scale([observation(expected, tokens) for expected, tokens in pairs])
    assert scale is not None
    points = np.unique(np.geomspace(1, 2e4, 60))
    mapped = [scale(float(point)) for point in points]
    assert all(math.isfinite(value) and value > 0 for value in mapped)
    assert mapped == sorted(mapped)
    assert scale.each(points) == pytest.approx(mapped)
    knots = [y for x, y in zip(scale.expected, scale.real, strict=True)]
    assert mapped[-1] > mapped[0] or knots[0] == knots[-1]


def test_a_model_that_talks_five_times_as_much_is_learnt() -> None:
    seen = [observation(float(tokens), 5 * tokens) for tokens in range(10, 10 + COHORT_SIZE)]
    assert bias(TokenScale(), seen) == pytest.approx(5.0)
    scale = fit_token_scale(seen)
    assert scale is not None
    assert [scale(tokens) for tokens in (4.0, 30.0, 200.0)] == pytest.approx([20.0, 150.0, 1000.0], rel=0.05)
    assert bias(scale, seen) == pytest.approx(1.0, rel=0.01)


def test_what_is_known_of_applications_is_judged_too() -> None:
    """The ranker alone would have had the two the wrong way round, and expected half of what came."""
    seen = [
        Observation(expected, None, factor=factor, output_tokens=tokens, ending=Ending.COMPLETE)
        for expected, factor, tokens in ((10.0, 4.0, 40), (20.0, 1.0, 20))
    ]
    assert tau_of(seen).tau == 1.0
    assert bias(TokenScale(), seen) == 1.0


def test_too_few_or_cut_answers_teach_no_scale() -> None:
    assert fit_token_scale([observation(5.0, 9)] * (COHORT_SIZE - 1)) is None
    assert fit_token_scale([observation(5.0, 9, Ending.CUT)] * COHORT_SIZE) is None
    assert fit_token_scale([observation(5.0, 9, Ending.CAPPED)] * COHORT_SIZE) is not None
    assert bias(TokenScale(), []) == 1.0
    assert TokenScale().each([3.0]).tolist() == [3.0]
