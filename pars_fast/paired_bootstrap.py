"""Ranking measures of several predictors under the same resamples of the prompts.

Every measure of `pars_fast.metrics` is a ratio of sums over pairs of prompts. A resample draws prompt i
w_i times, so each sum is the quadratic form w' A w of one matrix of pairs: all resamples of all measures
are a few matrix products, and since predictors share the resamples, their differences are paired.
Source: Efron & Tibshirani 1993, chapters 6 and 16.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pars_fast.metrics import MAX_PAIR_PROMPTS, MIN_RELATIVE_DIFFERENCE

MEASURES = ("kendall_tau", "pair_accuracy", "impact_accuracy")
Floats = NDArray[np.float64]


def resample_weights(n: int, resamples: int, seed: int) -> NDArray[np.float32]:
    """(1 + resamples, n): how often each prompt is drawn; row 0 is the sample itself, once each."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.vstack([np.ones((1, n)), drawn]).astype(np.float32)


def resampled_quality(scores: Floats, lengths: Floats, weights: NDArray[np.float32]) -> Floats:
    """Measures of one predictor on one model's lengths.

    Args:
        scores: (n,), finite.
        lengths: (n,) tokens; NaN where the model has no answer.
        weights: (R, n) of `resample_weights`.
    Returns: (3, R) in the order of `MEASURES`; NaN where no two lengths differ enough.
        Scores that are all equal give no order: a tau of 0, accuracies of 0.5.
    """
    present = ~np.isnan(lengths)
    if present.sum() > MAX_PAIR_PROMPTS:
        present[np.flatnonzero(present)[MAX_PAIR_PROMPTS:]] = False
    s, t, w = scores[present], lengths[present], weights[:, present]
    difference = (t[:, None] - t[None, :]).astype(np.float32)
    longer = np.sign(difference)
    higher = np.sign(s[:, None] - s[None, :]).astype(np.float32)
    informative = np.abs(difference) >= MIN_RELATIVE_DIFFERENCE * np.maximum(t[:, None], t[None, :])
    informative &= difference != 0
    impact = np.abs(difference) * informative
    agreement = higher * longer

    def total(pairs: NDArray[np.float32]) -> Floats:
        return np.einsum("ri,ri->r", w @ pairs, w, dtype=np.float64)

    with np.errstate(invalid="ignore", divide="ignore"):
        untied = np.sqrt(total(np.abs(higher)) * total(np.abs(longer)))
        tau = np.where(total(np.abs(higher)) > 0, total(agreement) / untied, 0.0)
        kept = informative.astype(np.float32)
        accuracy = (1 + total(agreement * kept) / total(kept)) / 2
        impact_accuracy = (1 + total(agreement * impact) / total(impact)) / 2
    return np.stack([tau, accuracy, impact_accuracy])


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference of two predictors, its 95 % interval, and the two-sided bootstrap p value."""

    mean: float
    ci95: tuple[float, float]
    p_value: float


def paired_difference(ours: Floats, theirs: Floats) -> Difference:
    """(R,) each under the same resamples, the sample itself first.

    A resample that leaves either undefined (NaN) says nothing of the difference and is left out.
    """
    resampled = (ours - theirs)[1:]
    resampled = resampled[~np.isnan(resampled)]
    above = (1 + (resampled >= 0).sum()) / (1 + len(resampled))
    below = (1 + (resampled <= 0).sum()) / (1 + len(resampled))
    return Difference(
        float(ours[0] - theirs[0]), interval(ours - theirs), float(min(1, 2 * min(above, below)))
    )


def interval(resampled: Floats) -> tuple[float, float]:
    """95 % percentile interval of (R,), the sample itself first."""
    low, high = np.nanpercentile(resampled[1:], [2.5, 97.5])
    return float(low), float(high)
