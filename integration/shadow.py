"""`PARS_MODE=shadow`: what the ranking would have gained, logged while the order stays that of arrival."""

import functools
import logging
from collections import deque
from collections.abc import Callable

from pars_fast.estimate import FinishedRequest, mean_latencies
from pars_fast.guards import Guard
from pars_fast.integration.background import Background
from pars_fast.priority_class import Entry

logger = logging.getLogger("vllm.pars_fast")

REPORT_EVERY_S = 30.0
WINDOW = 2000
MIN_REQUESTS = 20


class ShadowReport:
    """Keeps the last finished requests that had a score, and logs an estimate now and then.

    The estimate takes milliseconds, so a background thread makes it, not the scheduling step. `clock` is the
    one that stamps the entries.
    """

    def __init__(
        self, seats: int, guard: Guard, background: Background, clock: Callable[[], float]
    ) -> None:
        import scipy.stats  # while the engine starts: seconds of Python, later they would delay the steps

        self._kendalltau = scipy.stats.kendalltau
        self._seats, self._guard = seats, guard
        self._background = background
        self._finished: deque[FinishedRequest] = deque(maxlen=WINDOW)
        self._reported_at = clock()

    def add(self, entry: Entry, output_tokens: int, finished_s: float) -> None:
        if entry.expected_tokens is None or output_tokens < 1:
            return
        service_s = finished_s - entry.admitted_s
        self._finished.append(FinishedRequest(
            entry.arrival_s, service_s, entry.expected_tokens, output_tokens, entry.payload.num_prompt_tokens
        ))
        if finished_s - self._reported_at > REPORT_EVERY_S and len(self._finished) >= MIN_REQUESTS:
            self._reported_at = finished_s
            requests = sorted(self._finished, key=lambda request: request.arrival_s)
            self._background.submit(functools.partial(self._report, requests))

    def _report(self, requests: list[FinishedRequest]) -> None:
        logger.info("pars-fast shadow: %s", self.estimate(requests))

    def estimate(self, requests: list[FinishedRequest]) -> str:
        """One line: tau of scores and lengths, and the estimated change of mean latencies."""
        expected, made = zip(*((r.expected_tokens, r.output_tokens) for r in requests), strict=True)
        tau = self._kendalltau(expected, made).statistic
        fcfs = mean_latencies(requests, "fcfs", self._guard, self._seats)
        ranked = mean_latencies(requests, "pars_fast", self._guard, self._seats)
        per_token, end_to_end = (100 * (r / f - 1) for r, f in zip(ranked, fcfs, strict=True))
        return (
            f"Kendall tau-b {tau:.2f} over {len(requests)} scored requests; ranking would change mean "
            f"latency per token by {per_token:+.0f} %, end-to-end by {end_to_end:+.0f} %"
        )
