"""Isotonic map from a score to expected output tokens.

A ranker's score has no unit; queue keys, the guard and a caller's own estimates need tokens. The map is
fitted by isotonic regression (Barlow et al. 1972; scipy) and kept as knots with linear interpolation
between them, so that it is strictly increasing over the scores that it was fitted on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pars_fast.errors import CheckpointError

MAX_KNOTS = 64


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Expected output tokens at increasing scores: linear between the knots, constant beyond all of them.

    Raises: CheckpointError: if the knots are not finite and increasing, or of different number.
    """

    scores: tuple[float, ...]
    tokens: tuple[float, ...]

    def __post_init__(self) -> None:
        scores, tokens = (np.asarray(knots, dtype=np.float64) for knots in (self.scores, self.tokens))
        sound = (
            len(scores) == len(tokens) > 0
            and np.isfinite([scores, tokens]).all()
            and (np.diff(scores) >= 0).all()
            and (np.diff(tokens) >= 0).all()
            and tokens[0] >= 0
        )
        if not sound:
            raise CheckpointError("the score-to-token map must be two equally long, finite, increasing lists")

    def __call__(self, score: ArrayLike) -> NDArray[np.float64]:
        """Scores of any shape -> expected tokens, float64, same shape; NaN for a score that is not finite."""
        score = np.asarray(score, dtype=np.float64)
        return np.where(np.isfinite(score), np.interp(score, self.scores, self.tokens), np.nan)


def fit_token_map(scores: ArrayLike, tokens: ArrayLike) -> TokenMap:
    """Fit the map on (n,) pairs of score and real output tokens, n >= 1; equal scores count as one.

    An isotonic fit is flat beyond its ends, and where scores do not order the few tokens that there are it is
    flat all over: requests would be equal that a ranker tells apart. So the map goes on for as far as scores
    were seen to spread, or for 1: below to half of its least tokens, above by as much as it rises.
    """
    knots, values = isotonic_knots(scores, tokens, MAX_KNOTS - 2)
    spread = float(np.ptp(scores)) or 1.0
    rise = values[-1] - values[0] or values[-1]
    return TokenMap(
        (knots[0] - spread, *knots, knots[-1] + spread), (values[0] / 2, *values, values[-1] + rise)
    )


def isotonic_knots(
    scores: ArrayLike, tokens: ArrayLike, most: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """An isotonic fit of (n,) tokens to (n,) scores, n >= 1.

    Returns: the mean score of each block and its tokens; of more than `most` blocks so many, evenly chosen.
    """
    from scipy.optimize import isotonic_regression

    levels, level, counts = np.unique(
        np.asarray(scores, dtype=np.float64), return_inverse=True, return_counts=True
    )
    means = np.bincount(level, weights=np.asarray(tokens, dtype=np.float64)) / counts
    fit = isotonic_regression(means, weights=counts)
    starts = fit.blocks[:-1]
    centres = np.add.reduceat(levels * counts, starts) / np.add.reduceat(counts, starts)
    values = fit.x[starts]
    keep = np.unique(np.linspace(0, len(starts) - 1, most).round().astype(int))
    return tuple(centres[keep].tolist()), tuple(values[keep].round(6).tolist())
