"""Ranking is switched off while the ranker does not order what is served, and its scale is kept right.

All of it but `in_tokens`, `wants` and what they read runs in the background thread, to which `Learning` hands
scores and endings. `docs/operations.md` says what is concluded from them.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Hashable, Mapping

# Used by the fit: imported by the background thread, half a second of Python would delay the steps meanwhile.
import scipy.optimize  # noqa: F401
from vllm.v1.request import Request, RequestStatus

from pars_fast.application_factors import fit_application_factors
from pars_fast.integration.metrics import CounterFile
from pars_fast.live_calibration import (
    COHORT_SIZE,
    ArrivalCohorts,
    Ending,
    Observation,
    TauInterval,
    TokenScale,
    bias,
    fit_token_scale,
    tau_of,
)
from pars_fast.priority_class import Entry

logger = logging.getLogger("vllm.pars_fast")

WINDOW_COHORTS = 4  # for tau: newest cohorts, 256 requests give an interval of about +- 0.08
SCALE_WINDOW = 512  # for the scale: newest requests
MAX_BIAS = 1.25  # a scale further off is fitted anew; more often, and waiting scores would not compare
SHADOW_SHARE = 8  # one request in so many is scored while ranking is off


def ending_of(request: Request) -> Ending:
    """How a request of vLLM's ended. With `ignore_eos` it was to make `max_tokens`: if it did, its length is
    whole, and if the model's context ended first, it is not."""
    if request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
        params = request.sampling_params
        made_all = request.num_output_tokens >= request.max_tokens
        return Ending.COMPLETE if params is not None and params.ignore_eos and made_all else Ending.CAPPED
    if request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_REPETITION):
        return Ending.COMPLETE
    return Ending.CUT


def in_shadow_share(seq: int) -> bool:
    """Whether a request is scored while ranking is off: one in `SHADOW_SHARE`, by a hash of its number.

    By the number itself, of clients that take turns it would be the same one each time.
    """
    digest = hashlib.blake2b(seq.to_bytes(8, "little"), digest_size=2).digest()
    return int.from_bytes(digest, "little") % SHADOW_SHARE == 0


class LiveCalibration:
    """Watches scored requests of one engine.

    Attributes:
        ranking: whether the scores order answers well enough. Goes off when the upper end of tau's 95 %
            interval is below `min_tau`, on when its lower end is above it.
    """

    def __init__(
        self,
        counters: CounterFile,
        *,
        min_tau: float,
        enabled: bool = True,
        cohort_size: int = COHORT_SIZE,
    ) -> None:
        self.ranking = True
        self._enabled = enabled
        self._counters, self._min_tau = counters.values, min_tau
        self._cohorts = ArrivalCohorts(cohort_size)
        self._recent: deque[list[Observation]] = deque(maxlen=WINDOW_COHORTS)
        self._served: deque[Observation] = deque(maxlen=SCALE_WINDOW)
        self._scale = TokenScale()
        self._factors: Mapping[Hashable, float] = {}  # by application; replaced, never changed

    def wants(self, entry: Entry) -> bool:
        """Whether a waiting request is to be scored."""
        return self.ranking or in_shadow_share(entry.seq)

    @property
    def scaled(self) -> bool:
        """Whether `in_tokens` changes anything."""
        return bool(self._scale.expected or self._factors)

    @property
    def reorders(self) -> bool:
        """Whether `in_tokens` changes the order, too."""
        return bool(self._factors)

    def in_tokens(self, entry: Entry, expected_tokens: float) -> float:
        """What the ranker expects of a request, in tokens of the served model and for its application; on the
        scheduling thread."""
        return self._scale(max(expected_tokens, 1.0) * self._factors.get(entry.application, 1.0))

    def scored(self, entry: Entry, expected_tokens: float) -> None:
        """Take in a score, as the ranker gave it; in the background thread, as all that follows."""
        if not self._enabled:
            return
        request = entry.payload
        scored = Observation(max(expected_tokens, 1.0), request, entry.application)
        self._cohorts.add(entry.seq, scored)
        if request.is_finished():  # before its score came: left out, it would be missed among the short
            self.finished(entry, ending_of(request))

    def finished(self, entry: Entry, ending: Ending) -> None:
        """Take in the end of a request, scored or not."""
        cohort = self._cohorts.end(entry.seq, ending)
        if cohort is not None:
            self.learn(cohort)

    def learn(self, cohort: list[Observation]) -> None:
        """Take in a cohort that has ended.

        It is judged with what cohorts before it say of its applications, though when it was scored that may
        not have been known: so it says what ranking from now on is worth, and is no judge in its own cause.
        """
        for observation in cohort:
            observation.factor = self._factors.get(observation.application, 1.0)
        self._recent.append(cohort)
        self._served.extend(cohort)
        window = [observation for cohort in self._recent for observation in cohort]
        tau = tau_of(window)
        self._counters |= {
            "pars_kendall_tau": tau.tau, "pars_kendall_tau_low": tau.low, "pars_kendall_tau_high": tau.high
        }
        if self.ranking and tau.high < self._min_tau:
            self._switch(False, tau)
        elif not self.ranking and tau.low > self._min_tau:
            self._switch(True, tau)
        self._factors = fit_application_factors(self._served)
        self._counters["pars_applications"] = len(self._factors)
        if not 1 / MAX_BIAS < bias(self._scale, self._served) < MAX_BIAS:
            self._scale = fit_token_scale(self._served) or self._scale

    def _switch(self, ranking: bool, tau: TauInterval) -> None:
        self.ranking = ranking
        self._recent.clear()  # what decided once does not decide again
        figures = (tau.tau, tau.low, tau.high, tau.n)
        if ranking:
            logger.info("pars-fast: scores order the answers again (Kendall tau-b %.2f, 95 %% interval "
                        "%.2f to %.2f, %d requests); the queue is ranked", *figures)
        else:
            self._counters["pars_fallback_calibration"] += 1
            logger.warning("pars-fast: scores do not order the answers (Kendall tau-b %.2f, 95 %% interval "
                           "%.2f to %.2f, %d requests); the queue is in arrival order until they do",
                           *figures)
