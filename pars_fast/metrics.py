"""How well scores order answer lengths.

Kendall's tau-b: Kendall 1945, as in scipy.stats.kendalltau. Pair accuracy: PARS (arXiv 2510.03243), over
the pairs that pass its relative-difference filter.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

MIN_RELATIVE_DIFFERENCE = 0.2
MAX_PAIR_PROMPTS = 4000  # all pairs of more prompts would not fit memory; a seeded sample stands for them
RESAMPLES = 200  # of the prompts, for an interval


@dataclass(frozen=True, slots=True)
class RankingQuality:
    """`kendall_tau` in [-1, 1] with its 95 % bootstrap interval; accuracies in [0, 1], ties count half."""

    n: int
    kendall_tau: float
    ci95: tuple[float, float]
    pair_accuracy: float | None
    impact_accuracy: float | None


def kendall_tau(scores: NDArray[np.floating], lengths: NDArray[np.floating]) -> float:
    """Tau-b of two (n,) arrays; NaN if either is constant."""
    return float(kendalltau(scores, lengths).statistic)


def bootstrap_interval(scores: NDArray[np.floating], lengths: NDArray[np.floating]) -> tuple[float, float]:
    """95 % percentile interval of tau-b over resamples of the prompts, the same ones each time."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(scores), size=(RESAMPLES, len(scores)))
    taus = [kendall_tau(scores[pick], lengths[pick]) for pick in picks]
    low, high = np.nanpercentile(taus, [2.5, 97.5])
    return float(low), float(high)


def pair_accuracies(
    scores: NDArray[np.floating], lengths: NDArray[np.floating]
) -> tuple[float | None, float | None]:
    """(pair accuracy, impact accuracy): the second weighs each pair by its difference in length.

    A pair counts when |La - Lb| / max(La, Lb) >= 0.2; equal scores count half. None if no pair counts.
    """
    if len(scores) > MAX_PAIR_PROMPTS:
        sample = np.random.default_rng(0).choice(len(scores), MAX_PAIR_PROMPTS, replace=False)
        scores, lengths = scores[sample], lengths[sample]
    first, second = np.triu_indices(len(scores), k=1)
    difference = lengths[first] - lengths[second]
    keep = np.abs(difference) >= MIN_RELATIVE_DIFFERENCE * np.maximum(lengths[first], lengths[second])
    difference = difference[keep]
    if not len(difference):
        return None, None
    right = (1 + np.sign(scores[first] - scores[second])[keep] * np.sign(difference)) / 2
    return float(right.mean()), float(np.average(right, weights=np.abs(difference)))


def ranking_quality(scores: NDArray[np.floating], lengths: NDArray[np.floating]) -> RankingQuality:
    """All measures of (n,) scores against (n,) lengths in tokens, neither of them constant."""
    pair_accuracy, impact_accuracy = pair_accuracies(scores, lengths)
    return RankingQuality(
        n=len(scores),
        kendall_tau=kendall_tau(scores, lengths),
        ci95=bootstrap_interval(scores, lengths),
        pair_accuracy=pair_accuracy,
        impact_accuracy=impact_accuracy,
    )
