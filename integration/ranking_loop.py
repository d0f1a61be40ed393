"""What a scheduling step does about ranking: take finished scores, hand over new prompts, watch the ranker.

All of it runs on the scheduling thread, between vLLM's own steps, and none of it waits. Whatever goes
wrong, the queue keeps every request and falls back to arrival order.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence

from pars_fast.host_index import Entry
from pars_fast.integration.calibration import LiveCalibration
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.queue import RankedRequestQueue
from pars_fast.integration.runtime import READY, RankerRuntime

logger = logging.getLogger("vllm.pars_fast")

MAX_PROMPT_IDS = 512  # ids handed over; a prompt of 100k tokens costs no more than its head
MAX_RESTART_DELAY_S = 60.0


class RankingLoop:
    """Feeds a ranker from a queue and the queue from the ranker.

    Load gate: nothing is submitted while `after_step` is told that nothing is left waiting, so below
    saturation no prompt is scored. A ranker that fails, or is silent for `stale_after_s` with work in hand,
    is started anew with growing delays; meanwhile the order is that of arrival. So it is while `calibration`
    finds that scores do not order the answers, and a share of the requests is scored for it.
    """

    def __init__(
        self,
        queue: RankedRequestQueue,
        runtime: RankerRuntime,
        counters: CounterFile,
        calibration: LiveCalibration,
        *,
        stale_after_s: float,
        shadow: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._runtime, self._counters, self._clock = queue, runtime, counters.values, clock
        self._calibration = calibration
        self._score_latency = counters.histograms["pars_score_latency_seconds"]
        self._stale_after_s, self._shadow = stale_after_s, shadow
        self._in_flight: dict[int, tuple[Entry, float]] = {}  # with the moment of the hand-over
        self._ready = False
        self._heard_at = 0.0
        self._failures = 0
        self._restart_at: float | None = None
        self._order()
        runtime.start()

    def before_step(self) -> None:
        """Take what has been scored; notice a ranker that ended or hangs."""
        self._listen()
        self._order()

    def _listen(self) -> None:
        if self._restart_at is not None:
            if self._clock() >= self._restart_at:
                self._restart_at = None
                self._runtime.start()
            return
        if self._ready and not self._in_flight:
            return
        scored = self._runtime.poll()
        if scored:
            self._heard_at = self._clock()
            self._take(scored)
            if (order := self._runtime.order()) is not None:
                self._queue.set_device_order(order)
        elif reason := self._runtime.failure():
            self._fail(reason)
        elif self._in_flight and self._clock() - self._heard_at > self._stale_after_s:
            self._fail(f"the ranker was silent for {self._stale_after_s:g} s")

    def after_step(self, *, left_waiting: bool) -> None:
        """Hand prompts over, if the finished step left requests waiting."""
        if self._queue.finished:
            self._runtime.forget(self._queue.finished)
            self._queue.finished = []
        arrivals = self._queue.arrivals
        while arrivals and not arrivals[0].waiting:  # admitted already: needs no score
            arrivals.popleft()
        room = self._runtime.max_in_flight - len(self._in_flight)
        if not left_waiting or not self._ready or room <= 0 or not arrivals:
            return
        batch: list[Entry] = []
        while arrivals and len(batch) < room:
            # Newest first: when the ranker cannot keep up, the oldest are admitted before their score comes.
            entry = arrivals.pop()
            if not entry.waiting or entry.key is not None or not self._calibration.wants(entry):
                continue
            if entry.payload.prompt_token_ids:
                batch.append(entry)
            else:  # embeddings only: no ids, no text
                self._counters["pars_fallback_prompt"] += 1
        if not batch:
            return
        if self._runtime.submit([(e.seq, e.payload.prompt_token_ids[:MAX_PROMPT_IDS]) for e in batch]):
            now = self._clock()
            if not self._in_flight:
                self._heard_at = now
            self._in_flight |= {entry.seq: (entry, now) for entry in batch}
            self._counters["pars_submitted"] += len(batch)
        else:
            arrivals.extend(reversed(batch))
            if reason := self._runtime.failure():  # it ended while it had nothing to do
                self._fail(reason)

    def predict_again(self, entries: Sequence[Entry]) -> None:
        """Have running requests scored anew, from prompt and answer so far."""
        if not entries or not self._ready:
            return
        prompts = [
            (e.seq, [*e.payload.prompt_token_ids[:MAX_PROMPT_IDS], *e.payload.output_token_ids])
            for e in entries
            if e.payload.prompt_token_ids and e.seq not in self._in_flight
        ]
        if self._runtime.submit(prompts):
            now = self._clock()
            if not self._in_flight:
                self._heard_at = now
            handed_over = {seq for seq, _ in prompts}
            self._in_flight |= {e.seq: (e, now) for e in entries if e.seq in handed_over}

    def close(self) -> None:
        self._runtime.close()

    def _take(self, scored: list[tuple[int, float]]) -> None:
        for seq, expected_tokens in scored:
            if (seq, expected_tokens) == READY:
                self._ready = True
                continue
            entry, handed_over_at = self._in_flight.pop(seq, (None, 0.0))
            if entry is None:
                continue
            if self._queue.entries.get(entry.payload.request_id) is not entry:  # finished meanwhile
                self._queue.finished.append(seq)
            if math.isfinite(expected_tokens):
                if entry.expected_tokens is None:  # the calibration learns from first predictions
                    expected_tokens = self._calibration.scored(entry, expected_tokens)
                self._queue.set_expected_tokens(entry, expected_tokens)
                self._counters["pars_scored"] += 1
                self._score_latency.observe(self._heard_at - handed_over_at)
            else:
                self._counters["pars_fallback_prompt"] += 1
        if self._failures and scored[-1] != READY:  # one that starts but dies of its first batch is not back
            logger.info("pars-fast: the ranker is back")
            self._failures = 0

    def _fail(self, reason: str) -> None:
        delay = min(MAX_RESTART_DELAY_S, 2.0**self._failures)
        if not self._failures:
            logger.warning("pars-fast: %s; the queue is in arrival order until it is back", reason)
        self._failures += 1
        self._counters["pars_fallback_ranker"] += 1
        self._order()
        self._queue.arrivals.extend(entry for entry, _ in self._in_flight.values())
        self._in_flight.clear()
        self._ready = False
        self._restart_at = self._clock() + delay

    def _order(self) -> None:
        """Ranked while the ranker answers and what it answers is of use."""
        ranked = not self._shadow and not self._failures and self._calibration.ranking
        if ranked != self._queue.index.ranking:
            self._queue.set_ranking(ranked)
