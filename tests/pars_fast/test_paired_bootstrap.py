import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pars_fast.metrics import kendall_tau, pair_accuracies
from pars_fast.paired_bootstrap import interval, paired_difference, resample_weights, resampled_quality

SAMPLES = st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 60)), min_size=2, max_size=25).map(
    lambda pairs: np.array(pairs, dtype=np.float64).T
)


def tau_or_no_order(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Equal scores order nothing: 0, so that means over files stay defined."""
    return kendall_tau(scores, lengths) if len(set(scores)) > 1 else 0.0


@given(SAMPLES)
def test_the_sample_itself_has_the_plain_measures(sample: np.ndarray) -> None:
    scores, lengths = sample
    measures = resampled_quality(scores, lengths, resample_weights(len(scores), 3, 0))[:, 0]
    expected = [tau_or_no_order(scores, lengths), *pair_accuracies(scores, lengths)]
    assert measures.tolist() == pytest.approx(
        [np.nan if value is None else value for value in expected], nan_ok=True, abs=1e-6
    )


@given(SAMPLES, st.integers(0, 5))
def test_a_resample_has_the_measures_of_the_prompts_drawn(sample: np.ndarray, seed: int) -> None:
    scores, lengths = sample
    weights = resample_weights(len(scores), 4, seed)
    measures = resampled_quality(scores, lengths, weights)
    for column, drawn in enumerate(weights.astype(int)):
        pick = np.repeat(np.arange(len(scores)), drawn)
        tau = tau_or_no_order(scores[pick], lengths[pick])
        assert measures[0, column] == pytest.approx(tau, nan_ok=True, abs=1e-6)
        accuracy = pair_accuracies(scores[pick], lengths[pick])[0]
        assert measures[1, column] == pytest.approx(np.nan if accuracy is None else accuracy, nan_ok=True)


def test_missing_answers_are_left_out() -> None:
    rng = np.random.default_rng(0)
    scores, lengths = rng.normal(size=40), rng.lognormal(4, 1, size=40)
    gone = lengths.copy()
    gone[::3] = np.nan
    there = ~np.isnan(gone)
    measures = resampled_quality(scores, gone, resample_weights(40, 2, 0))
    assert measures[0, 0] == pytest.approx(kendall_tau(scores[there], lengths[there]))


def test_weights_draw_as_many_prompts_as_there_are() -> None:
    weights = resample_weights(30, 50, 0)
    assert weights.shape == (51, 30)
    assert (weights.sum(axis=1) == 30).all()
    assert (weights[0] == 1).all()
    assert (resample_weights(30, 50, 0) == weights).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_resamples_that_say_nothing_do_not_make_a_difference_clear() -> None:
    """Half of them undefined, as where few lengths differ: the p value is that of the other half."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 401))
    gaps = ours.copy()
    gaps[1::2] = np.nan
    kept = ~np.isnan(gaps)
    with_gaps, without = paired_difference(gaps, theirs), paired_difference(ours[kept], theirs[kept])
    assert with_gaps == without
    assert with_gaps.p_value > 0.5
    ours[1:] = np.nan
    assert paired_difference(ours, theirs).p_value == 1


def test_a_clear_difference_is_found_and_none_is_not() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4, 1, size=200)
    good, as_good, bad = (np.log(lengths) + rng.normal(scale=s, size=200) for s in (0.7, 0.7, 5))
    weights = resample_weights(200, 300, 1)
    taus = [resampled_quality(scores, lengths, weights)[0] for scores in (good, as_good, bad)]
    clear, none = paired_difference(taus[0], taus[2]), paired_difference(taus[0], taus[1])
    assert clear.mean == pytest.approx(taus[0][0] - taus[2][0])
    assert clear.ci95[0] > 0
    assert clear.p_value < 0.01
    assert none.ci95[0] < 0 < none.ci95[1]
    assert none.p_value > 0.05
    assert paired_difference(taus[0], taus[0]).p_value == 1
    low, high = interval(taus[0])
    assert low < taus[0][0] < high
