"""What finished requests say about the ranker: does it order them, and how many tokens is a score worth?

Requests that finish first are the short ones, so a running figure over finished requests flatters or damns a
ranker by chance. `ArrivalCohorts` therefore gathers requests in the order they were scored,
which does not depend on their length, and gives out a cohort when nearly all of it has ended.

A request that stopped at `max_tokens` or was aborted is censored: its answer would have been longer than
what was made. Tau counts the pairs whose order is known all the same (Brown, Hollander and Korwar 1974, in
"Reliability and Biometry": tau-b with unknown pairs as ties).
"""

import enum
import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pars_fast.calibration import MAX_KNOTS, isotonic_knots

COHORT_SIZE = 64
ENDED_SHARE = 0.95  # of a cohort, before it is used; the rest count as censored where they are
MAX_OPEN = 4096  # requests of unfinished cohorts; beyond it no new one is followed until some end


class Ending(enum.IntEnum):
    """How an answer ended. `CAPPED` is real work cut off at `max_tokens`; `CUT` says how long it was at
    least, an abort or one still under way."""

    COMPLETE = 0
    CAPPED = 1
    CUT = 2


class Answer(Protocol):
    """What a served request can say of its answer (vLLM's `Request` does)."""

    @property
    def num_output_tokens(self) -> int: ...


@dataclass(slots=True, eq=False)
class Observation:
    """One scored request: the tokens that the ranker expected, what they are multiplied by for its
    `application`, and what came of it."""

    expected_tokens: float
    answer: Answer | None
    application: Hashable = None
    factor: float = 1.0
    output_tokens: int = 0
    ending: Ending = Ending.CUT

    @property
    def ordered_by(self) -> float:
        """The tokens that are expected of it in the end."""
        return self.expected_tokens * self.factor

    def end(self, ending: Ending) -> None:
        if self.answer is not None:
            self.output_tokens = self.answer.num_output_tokens
        self.ending = ending
        self.answer = None  # a request holds its prompt


@dataclass(slots=True, eq=False)
class _Cohort:
    members: dict[int, Observation] = field(default_factory=dict)
    ended: int = 0


class ArrivalCohorts:
    """Consecutive scored requests, given out when `ENDED_SHARE` of them have ended. All calls are O(1)."""

    def __init__(self, size: int = COHORT_SIZE) -> None:
        self._size = size
        self._filling = _Cohort()
        self._of: dict[int, _Cohort] = {}  # by seq

    def add(self, seq: int, scored: Observation) -> None:
        """A request was scored."""
        if len(self._of) >= MAX_OPEN:
            return
        if len(self._filling.members) == self._size:
            self._filling = _Cohort()
        self._filling.members[seq] = scored
        self._of[seq] = self._filling

    def end(self, seq: int, ending: Ending) -> list[Observation] | None:
        """A request ended, scored or not; gives the cohort that is ready with it, if one is."""
        cohort = self._of.pop(seq, None)
        if cohort is None:
            return None
        cohort.members[seq].end(ending)
        cohort.ended += 1
        if len(cohort.members) < self._size or cohort.ended < ENDED_SHARE * self._size:
            return None
        for late in [seq for seq in cohort.members if self._of.pop(seq, None) is not None]:
            cohort.members[late].end(Ending.CUT)
        return list(cohort.members.values())


@dataclass(frozen=True, slots=True)
class TauInterval:
    """Kendall's tau-b over `n` requests with its 95 % interval; NaN and [-1, 1] where nothing can be said."""

    tau: float
    low: float
    high: float
    n: int


def censored_tau(scores: ArrayLike, lengths: ArrayLike, complete: ArrayLike) -> TauInterval:
    """Tau-b of (n,) scores with (n,) lengths, of which those not `complete` (n,) are lower bounds.

    The interval is 1.96 standard errors of the infinitesimal jackknife (Jaeckel 1972). O(n^2) memory.
    """
    score, length = np.asarray(scores, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    known = np.asarray(complete, dtype=bool)
    # Row longer than column: the column's length must be known, and a censored row made it and went on.
    longer = known[None, :] & (
        (length[:, None] > length[None, :]) | ((length[:, None] == length[None, :]) & ~known[:, None])
    )
    truth = longer.astype(np.float64) - longer.T
    guess = np.sign(score[:, None] - score[None, :])
    agreement = (truth * guess).sum(axis=1)
    pairs_truth, pairs_guess = np.abs(truth).sum(axis=1), np.abs(guess).sum(axis=1)
    scale = math.sqrt(pairs_truth.sum() * pairs_guess.sum())
    if scale == 0.0:
        return TauInterval(math.nan, -1.0, 1.0, len(score))
    tau = float(agreement.sum() / scale)
    influence = 2 * agreement / scale - tau * (
        pairs_truth / pairs_truth.sum() + pairs_guess / pairs_guess.sum()
    )
    error = 1.96 * math.sqrt(float((influence**2).sum()))
    return TauInterval(tau, max(tau - error, -1.0), min(tau + error, 1.0), len(score))


def tau_of(observations: Sequence[Observation]) -> TauInterval:
    """`censored_tau` of what was expected and what came."""
    return censored_tau(
        [o.ordered_by for o in observations],
        [o.output_tokens for o in observations],
        [o.ending is Ending.COMPLETE for o in observations],
    )


@dataclass(frozen=True, slots=True)
class TokenScale:
    """From the tokens that a ranker expects to those that the served model makes; strictly increasing.

    Linear between the knots of an isotonic fit and proportional beyond them, so that it never makes two
    scores equal; without knots it changes nothing.
    """

    expected: tuple[float, ...] = ()
    real: tuple[float, ...] = ()

    def __call__(self, expected_tokens: float) -> float:
        """Tokens > 0 to tokens."""
        xs, ys = self.expected, self.real
        if not xs:
            return expected_tokens
        right = bisect_right(xs, expected_tokens)
        if right in (0, len(xs)):
            edge = 0 if right == 0 else -1
            return ys[edge] * expected_tokens / xs[edge]
        left = right - 1
        share = (expected_tokens - xs[left]) / (xs[right] - xs[left])
        return ys[left] + share * (ys[right] - ys[left])

    def each(self, expected_tokens: ArrayLike) -> NDArray[np.float64]:
        """The same for (n,) tokens at once."""
        tokens = np.asarray(expected_tokens, dtype=np.float64)
        xs, ys = self.expected, self.real
        if not xs:
            return tokens
        inside = np.interp(tokens, xs, ys)
        below, above = tokens < xs[0], tokens > xs[-1]
        return np.where(below, ys[0] * tokens / xs[0], np.where(above, ys[-1] * tokens / xs[-1], inside))


def fit_token_scale(observations: Sequence[Observation]) -> TokenScale | None:
    """The map that these requests show; None if they are fewer than a cohort.

    Capped answers count as long as they were: they are the work that was served. Cut ones are left out.
    """
    served = [o for o in observations if o.ending is not Ending.CUT and o.output_tokens > 0]
    if len(served) < COHORT_SIZE:
        return None
    ordered_by, tokens = [o.ordered_by for o in served], [o.output_tokens for o in served]
    return TokenScale(*isotonic_knots(ordered_by, tokens, MAX_KNOTS))


def bias(scale: TokenScale, observations: Sequence[Observation]) -> float:
    """Tokens served over tokens that `scale` expected, in sum; 1 if it is right, or nothing is known."""
    served = [o for o in observations if o.ending is not Ending.CUT and o.output_tokens > 0]
    expected = float(scale.each([o.ordered_by for o in served]).sum())
    return sum(o.output_tokens for o in served) / expected if expected else 1.0
