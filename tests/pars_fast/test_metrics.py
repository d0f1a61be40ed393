import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pars_fast import metrics
from pars_fast.metrics import bootstrap_interval, kendall_tau, pair_accuracies, ranking_quality

Floats = NDArray[np.float64]
# few distinct scores, so that ties are common
SAMPLES = st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 60)), min_size=2, max_size=25).map(
    lambda pairs: np.array(pairs, dtype=np.float64).T
)


def sign(value: float) -> int:
    return int(np.sign(value))


@given(SAMPLES)
def test_kendall_tau_is_tau_b_by_counting(sample: Floats) -> None:
    scores, lengths = sample
    pairs = [
        (sign(scores[i] - scores[j]), sign(lengths[i] - lengths[j]))
        for i, j in combinations(range(len(scores)), 2)
    ]
    untied = math.prod(sum(pair[side] != 0 for pair in pairs) for side in (0, 1))
    expected = sum(a * b for a, b in pairs) / math.sqrt(untied) if untied else math.nan
    assert kendall_tau(scores, lengths) == pytest.approx(expected, nan_ok=True)


@given(SAMPLES)
def test_pair_accuracies_by_counting(sample: Floats) -> None:
    scores, lengths = sample
    rights, weights = [], []
    for i, j in combinations(range(len(scores)), 2):
        difference = lengths[i] - lengths[j]
        if 5 * abs(difference) >= max(lengths[i], lengths[j]):
            rights.append((1 + sign(scores[i] - scores[j]) * sign(difference)) / 2)
            weights.append(abs(difference))
    if rights:
        expected = (np.mean(rights), np.dot(rights, weights) / np.sum(weights))
        assert pair_accuracies(scores, lengths) == pytest.approx(expected)
    else:
        assert pair_accuracies(scores, lengths) == (None, None)


def test_pairs_of_many_prompts_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_PAIR_PROMPTS", 50)
    lengths = np.arange(1.0, 301)
    assert pair_accuracies(lengths, lengths) == (1.0, 1.0)
    noisy = np.random.default_rng(0).permutation(lengths)
    assert pair_accuracies(noisy, lengths) == pair_accuracies(noisy, lengths)


def test_impact_accuracy_weighs_a_pair_by_its_tokens() -> None:
    scores, lengths = np.array([1.0, 0.0, 2.0]), np.array([10.0, 20.0, 1000.0])
    pair_accuracy, impact_accuracy = pair_accuracies(scores, lengths)
    assert pair_accuracy == pytest.approx(2 / 3)
    assert impact_accuracy == pytest.approx(1970 / 1980)


def test_the_interval_is_seeded_and_holds_tau() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1, size=300)
    scores = np.log(lengths) + rng.normal(size=300)
    quality = ranking_quality(scores, lengths)
    low, high = quality.ci95
    assert low < quality.kendall_tau < high
    assert high - low < 0.15
    assert bootstrap_interval(scores, lengths) == quality.ci95


def test_perfect_and_reversed_orders() -> None:
    lengths = np.array([1.0, 2.0, 4.0, 8.0])
    best, worst = ranking_quality(lengths, lengths), ranking_quality(-lengths, lengths)
    assert (best.kendall_tau, best.pair_accuracy, best.impact_accuracy) == pytest.approx((1, 1, 1))
    assert (worst.kendall_tau, worst.pair_accuracy, worst.impact_accuracy) == pytest.approx((-1, 0, 0))
