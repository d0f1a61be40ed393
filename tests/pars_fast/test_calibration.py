import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pars_fast.calibration import MAX_KNOTS, TokenMap, fit_token_map
from pars_fast.errors import CheckpointError

PAIRS = st.lists(st.tuples(st.floats(-20, 20, width=32), st.integers(1, 8192)), min_size=1, max_size=300)


@given(PAIRS)
def test_the_map_is_monotone_and_near_the_lengths_seen(pairs: list[tuple[float, int]]) -> None:
    scores, tokens = zip(*pairs, strict=True)
    token_map = fit_token_map(scores, tokens)
    expected = token_map(np.linspace(-25, 25, 201))
    assert (np.diff(expected) >= 0).all()
    seen = token_map(scores)
    assert min(tokens) / 2 - 1e-3 <= seen.min() <= seen.max() <= 2 * max(tokens) + 1e-3
    assert len(token_map.scores) <= MAX_KNOTS


@given(PAIRS)
def test_no_two_scores_seen_become_equal(pairs: list[tuple[float, int]]) -> None:
    """Whatever the fit made of them: few answers say little of an order, and nothing against it."""
    scores, tokens = zip(*pairs, strict=True)
    apart = np.unique(np.round(scores, 1))
    assert (np.diff(fit_token_map(scores, tokens)(apart)) > 0).all()


@given(PAIRS)
def test_the_order_of_the_pairs_does_not_matter(pairs: list[tuple[float, int]]) -> None:
    scores, tokens = zip(*pairs, strict=True)
    there, back = fit_token_map(scores, tokens), fit_token_map(scores[::-1], tokens[::-1])
    np.testing.assert_allclose(there.scores, back.scores)
    np.testing.assert_allclose(there.tokens, back.tokens, atol=2e-6)  # kept to 6 decimals


def test_a_clean_relation_is_found_again() -> None:
    scores = np.random.default_rng(0).uniform(2, 7, size=2000)
    token_map = fit_token_map(scores, np.exp(scores).round())
    checked = np.linspace(2.1, 6.9, 50)
    np.testing.assert_allclose(token_map(checked), np.exp(checked), rtol=0.02, atol=1)


@pytest.mark.parametrize(
    ("scores", "tokens", "mean"),
    [
        ([3.0], [7], 7),
        ([1.0, 1.0, 1.0], [1, 2, 9], 4),
        ([0.0, 1.0], [9, 3], 6),
        ([0.0, 1.0], [5, 5], 5),
    ],
    ids=["one pair", "all scores equal", "reversed order", "all lengths equal"],
)
def test_a_degenerate_fit_is_the_mean_and_rises_through_it(
    scores: list[float], tokens: list[int], mean: float
) -> None:
    middle = float(np.mean(scores))
    token_map = fit_token_map(scores, tokens)
    assert token_map([middle - 1, middle, middle + 1]).tolist() == [mean / 2, mean, 2 * mean]
    assert token_map([middle - 100, middle + 100]).tolist() == [mean / 2, 2 * mean]


def test_beyond_its_ends_the_map_goes_on() -> None:
    token_map = fit_token_map([1.0, 3.0], [10, 30])
    assert token_map([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).tolist() == [5, 7.5, 10, 20, 30, 40, 50]


def test_scores_that_are_close_together_stay_apart() -> None:
    token_map = fit_token_map(np.arange(10) * 1e-7, np.arange(1, 11))
    assert token_map([0.0, 9e-7]).tolist() == [1, 10]


@pytest.mark.parametrize(
    ("scores", "tokens"),
    [
        ((), ()),
        ((1.0, 2.0), (1.0,)),
        ((2.0, 1.0), (1.0, 2.0)),
        ((1.0, 2.0), (2.0, 1.0)),
        ((1.0, float("nan")), (1.0, 2.0)),
        ((1.0, 2.0), (1.0, float("inf"))),
        ((1.0, 2.0), (-1.0, 2.0)),
    ],
    ids=["empty", "lengths differ", "scores fall", "tokens fall", "nan", "infinite", "negative"],
)
def test_unsound_knots_are_refused(scores: tuple[float, ...], tokens: tuple[float, ...]) -> None:
    with pytest.raises(CheckpointError, match="two equally long, finite, increasing lists"):
        TokenMap(scores, tokens)


def test_a_score_that_is_not_finite_means_nothing() -> None:
    """Interpolation alone would take an infinite score for the first or the last knot."""
    tokens = TokenMap((0.0, 1.0), (10.0, 20.0))(np.array([np.nan, np.inf, -np.inf, 0.5]))
    assert np.isnan(tokens).tolist() == [True, True, True, False]
