"""`PARS_MODE=shadow`: what the ranking would have gained, logged while the order stays that of arrival."""

import logging
import threading
import time
from collections import deque

from pars_fast.estimate import FinishedRequest, mean_latencies
from pars_fast.guards import Guard
from pars_fast.host_index import Entry

logger = logging.getLogger("vllm.pars_fast")

REPORT_EVERY_S = 30.0
WINDOW = 2000
MIN_REQUESTS = 20


class ShadowReport:
    """Keeps the last finished requests that had a score, and logs an estimate now and then.

    The estimate takes milliseconds, so a short-lived thread makes it, not the scheduling step.
    """

    def __init__(self, seats: int, guard: Guard) -> None:
        self._seats, self._guard = seats, guard
        self._finished: deque[FinishedRequest] = deque(maxlen=WINDOW)
        self._reported_at = time.monotonic()

    def add(self, entry: Entry, output_tokens: int) -> None:
        if entry.expected_tokens is None or output_tokens < 1:
            return
        now = time.monotonic()
        self._finished.append(
            FinishedRequest(entry.arrival_s, now - entry.admitted_s, entry.expected_tokens, output_tokens)
        )
        if now - self._reported_at > REPORT_EVERY_S and len(self._finished) >= MIN_REQUESTS:
            self._reported_at = now
            requests = sorted(self._finished, key=lambda request: request.arrival_s)
            threading.Thread(target=self._report, args=(requests,), daemon=True).start()

    def _report(self, requests: list[FinishedRequest]) -> None:
        logger.info("pars-fast shadow: %s", self.estimate(requests))

    def estimate(self, requests: list[FinishedRequest]) -> str:
        """One line: tau of scores and lengths, and the estimated change of mean latencies."""
        from scipy.stats import kendalltau

        tau = kendalltau([r.expected_tokens for r in requests], [r.output_tokens for r in requests]).statistic
        fcfs = mean_latencies(requests, "fcfs", self._guard, self._seats)
        ranked = mean_latencies(requests, "pars_fast", self._guard, self._seats)
        per_token, end_to_end = (100 * (r / f - 1) for r, f in zip(ranked, fcfs, strict=True))
        return (
            f"Kendall tau-b {tau:.2f} over {len(requests)} scored requests; ranking would change mean "
            f"latency per token by {per_token:+.0f} %, end-to-end by {end_to_end:+.0f} %"
        )
