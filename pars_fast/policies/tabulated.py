"""Policies that order by more of the predicted distribution than its mean, tabulated once."""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pars_fast.policies.base import QueuedRequest
from pars_fast.policies.ranked import Ranked

if TYPE_CHECKING:
    from pars_fast.distribution import LengthDistribution

Floats = NDArray[np.float64]
LONGEST = 32768.0  # tokens: the log-t distribution has no mean of its own, its tail is cut here
TYPICAL_SIGMA, TYPICAL_DOF = 0.5, 3.5  # of log length, where no distribution was fitted
_SAMPLES = 400  # quantiles that stand for a distribution
_GRID = 256  # expected lengths, equally spaced in the logarithm


class Tabulated(Ranked):
    """Key: a function of the distribution of the answer's length, and so of the expected length alone.

    Args:
        lengths: log length = mu + sigma * t(dof), by the log of the expected tokens
            (`LengthDistribution.by_tokens`). None takes one spread for all: then the order is that of the
            expected length, unless the key says otherwise.
    """

    def __init__(self, lengths: "LengthDistribution | None" = None) -> None:
        from scipy.special import stdtrit  # slow to import, and every vLLM process reads this module

        self.log_tokens = np.linspace(0.0, math.log(LONGEST), _GRID)
        if lengths is None:
            mu, sigma, dof = self.log_tokens, np.full(_GRID, TYPICAL_SIGMA), TYPICAL_DOF
        else:
            mu, sigma = lengths(self.log_tokens)
            dof = lengths.dof
            mu += self.log_tokens - np.clip(self.log_tokens, lengths.scores[0], lengths.scores[-1])
        probability = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
        samples = np.exp(mu[:, None] + sigma[:, None] * stdtrit(dof, probability))
        self.tabulate(np.clip(samples, 1.0, LONGEST))

    @abstractmethod
    def tabulate(self, samples: Floats) -> None:
        """Keep what the key needs; row i of `samples`: equally likely lengths at grid point i, ascending."""

    def look_up(self, table: Floats, expected_tokens: float) -> float:
        """A (grid,) table at an expected length, linear in its logarithm."""
        return float(np.interp(math.log(expected_tokens), self.log_tokens, table))


class Index(Tabulated):
    """A key that the distribution alone decides."""

    def tabulate(self, samples: Floats) -> None:
        self._index = self.index(samples)

    @abstractmethod
    def index(self, samples: Floats) -> Floats:
        """(grid, samples) -> (grid,), lower first."""

    def key(self, expected_tokens: float, request: QueuedRequest | None = None) -> float:
        return self.look_up(self._index, expected_tokens)
