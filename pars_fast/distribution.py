"""From a score to the distribution of an answer's length, heavy-tailed: log length = mu + sigma * t(dof).

A Student t on the log of the length is TIE's model (arXiv 2604.00499, which fixes 3.5 degrees of freedom);
here mu and sigma are functions of the score alone, fitted on held-out answers, so that any ranker can have
them without another head. sigma holds all that the score does not know: how answers to one prompt differ,
and how the models differ that the lengths come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from pars_fast.calibration import TokenMap
from pars_fast.data import CONSENSUS, LengthFile, Split
from pars_fast.errors import CheckpointError, DataError
from pars_fast.text import normalised

Floats = NDArray[np.float64]
LEVELS = (0.5, 0.8, 0.95)
BINS = 12
DEGREES_OF_FREEDOM = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0, 50.0)
MIN_SIGMA = 0.02  # one token in fifty: no answer is known better


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """Knots of mu and sigma at increasing scores, linear between them and constant beyond.

    `mu` is the centre of the natural log of output tokens, `sigma` its scale; `dof` the degrees of freedom.

    Raises: CheckpointError: if the knots are of different number, not finite, or sigma is not positive.
    """

    scores: tuple[float, ...]
    mu: tuple[float, ...]
    sigma: tuple[float, ...]
    dof: float

    def __post_init__(self) -> None:
        sound = (
            len(self.scores) == len(self.mu) == len(self.sigma) > 0
            and np.isfinite([*self.scores, *self.mu, *self.sigma, self.dof]).all()
            and (np.diff(self.scores) >= 0).all()
            and (np.diff(self.mu) >= 0).all()
            and min(*self.sigma, self.dof) > 0
        )
        if not sound:
            raise CheckpointError(
                "the length distribution must be three equally long lists, scores and mu increasing, "
                "sigma and dof positive"
            )

    def __call__(self, scores: ArrayLike) -> tuple[Floats, Floats]:
        """Scores of any shape -> (mu, sigma), float64, same shape."""
        given = np.asarray(scores, dtype=np.float64)
        return np.interp(given, self.scores, self.mu), np.interp(given, self.scores, self.sigma)

    def by_tokens(self, token_map: TokenMap) -> "LengthDistribution":
        """The same, with the log of expected tokens in place of the score that gives them."""
        tokens = np.log(np.maximum(token_map(self.scores), 1.0))
        return LengthDistribution(tuple(tokens.tolist()), self.mu, self.sigma, self.dof)

    def quantile(self, scores: ArrayLike, probability: float) -> Floats:
        """Output tokens that an answer stays under with this probability."""
        mu, sigma = self(scores)
        return np.exp(mu + sigma * stdtrit(self.dof, probability))

    def coverage(self, scores: Floats, log_lengths: Floats, weights: Floats, level: float) -> float:
        """Share of the weight of (n,) answers that lie in their central interval of this level."""
        mu, sigma = self(scores)
        inside = np.abs(log_lengths - mu) <= sigma * stdtrit(self.dof, (1 + level) / 2)
        return float(np.average(inside, weights=weights))


def fit_length_distribution(scores: Floats, log_lengths: Floats, weights: Floats) -> LengthDistribution:
    """Fit on (n,) answers, n >= 1, weights positive.

    mu is isotonic in the score, sigma the maximum likelihood scale in bins of equal weight, and dof the one
    of a few with the largest likelihood. Source: Lange, Little & Taylor 1989 (EM for the t distribution).
    """
    from scipy.optimize import isotonic_regression  # a ranker that scores never fits: seconds to import

    order = np.argsort(scores, kind="stable")
    s, y, w = scores[order], log_lengths[order], weights[order]
    position = (np.cumsum(w) - w / 2) / w.sum()
    _, bins = np.unique((position * BINS).astype(int), return_inverse=True)
    count = bins.max() + 1
    total = np.bincount(bins, w, count).astype(np.float64)
    centres = np.bincount(bins, w * s, count) / total
    mu = isotonic_regression(np.bincount(bins, w * y, count) / total, weights=total).x
    residual = y - np.interp(s, centres, mu)
    fits = [_scales(residual, w, bins, total, dof) for dof in DEGREES_OF_FREEDOM]
    best = int(np.argmax([likelihood for _, likelihood in fits]))
    sigma = fits[best][0]
    return LengthDistribution(
        tuple(centres.round(5).tolist()),
        tuple(mu.round(5).tolist()),
        tuple(sigma.round(5).tolist()),
        DEGREES_OF_FREEDOM[best],
    )


def _scales(
    residual: Floats, weights: Floats, bins: NDArray[np.int64], total: Floats, dof: float
) -> tuple[Floats, float]:
    """The most likely scale in each bin, and the weighted log likelihood."""
    from scipy.stats import t

    sigma = np.maximum(np.sqrt(np.bincount(bins, weights * residual**2) / total), MIN_SIGMA)
    for _ in range(50):
        trust = (dof + 1) / (dof + (residual / sigma[bins]) ** 2)
        sigma = np.maximum(np.sqrt(np.bincount(bins, weights * trust * residual**2) / total), MIN_SIGMA)
    likelihood = t.logpdf(residual / sigma[bins], dof) - np.log(sigma[bins])
    return sigma, float(weights @ likelihood)


@dataclass(frozen=True, slots=True)
class Answers:
    """Recorded answers of one split, one entry an answer: its prompt, and the weight that makes every file,
    every prompt of a file and every model of a prompt count the same. `log_length` and `weight` are (n,)."""

    prompts: list[str]
    prompt_index: NDArray[np.int64]
    log_length: Floats
    weight: Floats


def recorded_answers(
    files: Sequence[LengthFile],
    split: Split,
    *,
    model: str = CONSENSUS,
    forbidden: frozenset[str] = frozenset(),
) -> Answers:
    """The answers of `model`, or of every model for `consensus`; none to prompts in `forbidden`.

    Raises: DataError: if there is none, or a file has no column `model`.
    """
    prompts: list[str] = []
    entries: list[tuple[int, float, float]] = []
    for file in files:
        if model != CONSENSUS:
            file.require_model(model)
        rows = [
            (row.prompt, lengths)
            for row in file.select(split).rows
            if normalised(row.prompt) not in forbidden
            and (lengths := [n for name, n in row.output_tokens.items() if model in (name, CONSENSUS)])
        ]
        for prompt, lengths in rows:
            weight = 1 / (len(rows) * len(lengths))
            entries += [(len(prompts), float(np.log(length)), weight) for length in lengths]
            prompts.append(prompt)
    if not entries:
        raise DataError(f"no {split} answers of {model!r} in {', '.join(str(file.path) for file in files)}")
    index, logs, weights = (np.array(column) for column in zip(*entries, strict=True))
    return Answers(prompts, index, logs, weights)
