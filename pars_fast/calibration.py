"""Isotonic map from a score to expected output tokens.

A ranker's score has no unit; queue keys, the guard and a caller's own estimates need tokens. The map is
fitted by isotonic regression (Barlow et al. 1972; scipy) and kept as knots with linear interpolation
between them, so that it stays strictly increasing between the plateaus of the fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pars_fast.errors import CheckpointError

MAX_KNOTS = 64


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Expected output tokens at increasing scores; constant beyond the first and last knot.

    Raises: CheckpointError: if the knots are not finite and increasing, or of different number.
    """

    scores: tuple[float, ...]
    tokens: tuple[float, ...]

    def __post_init__(self) -> None:
        knots = np.array([self.scores, self.tokens]) if len(self.scores) == len(self.tokens) else np.empty((0, 0))
        if not knots.size or not np.isfinite(knots).all() or (np.diff(knots) < 0).any() or knots[1, 0] < 0:
            raise CheckpointError("the score-to-token map must be two equally long, finite, increasing lists")

    def __call__(self, score: ArrayLike) -> NDArray[np.float64]:
        """Scores of any shape -> expected tokens, float64, same shape."""
        return np.interp(score, self.scores, self.tokens)


def fit_token_map(scores: Sequence[float] | NDArray[np.floating], tokens: Sequence[float] | NDArray[np.floating]) -> TokenMap:
    """Fit the map on pairs of (score, real output tokens), at least two of them."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(scores, kind="stable")
    sorted_scores = np.asarray(scores, dtype=np.float64)[order]
    fit = isotonic_regression(np.asarray(tokens, dtype=np.float64)[order])
    starts = fit.blocks[:-1]
    centres = np.add.reduceat(sorted_scores, starts) / np.diff(fit.blocks)
    values = fit.x[starts]
    keep = np.unique(np.linspace(0, len(starts) - 1, MAX_KNOTS).round().astype(int))
    return TokenMap(tuple(centres[keep].round(5).tolist()), tuple(values[keep].round(3).tolist()))
