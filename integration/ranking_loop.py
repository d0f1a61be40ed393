"""What a scheduling step does about ranking: take finished scores, hand over new prompts, watch the ranker.

All of it runs on the scheduling thread, between vLLM's own steps, and none of it waits. Whatever goes
wrong, the queue keeps every request and falls back to arrival order.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from pars_fast.integration.calibration import LiveCalibration
from pars_fast.integration.learning import Learning
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.prompt_window import PromptWindow
from pars_fast.integration.queue import RankedRequestQueue
from pars_fast.integration.runtime import READY, Prompt, RankerRuntime, Scored
from pars_fast.policies import prompt_work
from pars_fast.priority_class import Entry

logger = logging.getLogger("vllm.pars_fast")

MAX_RESTART_DELAY_S = 60.0
# To load a ranker, compilation and an idle-priority process on a busy machine included. Nothing suffers while
# it loads, and one that is ended while it still makes progress begins again: so rather too long.
START_DEADLINE_S = 300.0


class RankingLoop:
    """Feeds a ranker from a queue and the queue from the ranker.

    Load gate: nothing is submitted while `after_step` is told that nothing is left waiting, so below
    saturation no prompt is scored. A ranker that fails, is not ready `START_DEADLINE_S` after its start, or
    is silent for `stale_after_s` with work in hand, is started anew with growing delays; meanwhile the order
    is that of arrival. So it is while `calibration` finds that scores do not order the answers, and a share
    of the requests is scored for it; the others are as soon as it finds that they do again.
    """

    def __init__(
        self,
        queue: RankedRequestQueue,
        runtime: RankerRuntime,
        counters: CounterFile,
        calibration: LiveCalibration,
        learning: Learning,
        *,
        stale_after_s: float,
        shadow: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._runtime, self._counters, self._clock = queue, runtime, counters.values, clock
        self._calibration, self._learning = calibration, learning
        self._score_latency = counters.histograms["pars_score_latency_seconds"]
        self._stale_after_s, self._shadow = stale_after_s, shadow
        self._in_flight: dict[int, tuple[Entry, float]] = {}  # with the moment of the hand-over
        self._known: set[int] = set()  # seqs that the ranker has scored and not been told to forget
        self._window = PromptWindow()
        self._passed_over: deque[Entry] = deque()  # not wanted while ranking is off
        self._ready = False
        self._heard_at = 0.0
        self._failures = 0
        self._restart_at: float | None = None
        self._order()
        self._start()

    def before_step(self) -> None:
        """Take what has been scored; notice a ranker that ended or hangs. Not needed after a short step."""
        self._listen()
        self._order()

    def _listen(self) -> None:
        if self._restart_at is not None:
            if self._clock() >= self._restart_at:
                self._restart_at = None
                self._start()
            return
        if self._ready and not self._in_flight:
            return
        scored = self._runtime.poll()
        if scored:
            self._heard_at = self._clock()
            self._take(scored)
            if (order := self._runtime.order()) is not None:
                self._queue.set_device_order(order if self._device_order_holds() else [])
        elif reason := self._runtime.failure():
            self._fail(reason)
        elif self._in_flight and self._clock() - self._heard_at > self._stale_after_s:
            self._fail(f"the ranker was silent for {self._stale_after_s:g} s")
        elif not self._ready and self._clock() - self._started_at > START_DEADLINE_S:
            self._fail(f"the ranker was not ready {START_DEADLINE_S:g} s after its start")

    def after_step(self, *, left_waiting: bool) -> None:
        """The same, and hand prompts over, if the finished step left requests waiting."""
        self.before_step()
        if self._queue.finished:
            self._forget_finished()
        self._queue.arrivals = arrivals = self._still_waiting(self._queue.arrivals)
        if self._passed_over:
            self._passed_over = self._still_waiting(self._passed_over)
            if self._calibration.ranking:
                arrivals.extendleft(sorted(self._passed_over, key=lambda entry: entry.seq, reverse=True))
                self._passed_over.clear()
        room = self._runtime.max_in_flight - len(self._in_flight)
        if not left_waiting or not self._ready or room <= 0 or not arrivals:
            return
        batch: list[Entry] = []
        while arrivals and len(batch) < room:
            # Newest first: when the ranker cannot keep up, the oldest are admitted before their score comes.
            entry = arrivals.pop()
            if not entry.waiting or entry.key is not None:
                continue
            if not self._calibration.wants(entry):
                self._passed_over.append(entry)
            elif entry.payload.prompt_token_ids:
                batch.append(entry)
            else:  # embeddings only: no ids, no text
                self._counters["pars_fallback_prompt"] += 1
        if not batch:
            return
        if not self._hand_over([(entry, self._prompt(entry)) for entry in batch]):
            arrivals.extend(reversed(batch))
            if reason := self._runtime.failure():  # it ended while it had nothing to do
                self._fail(reason)

    def predict_again(self, entries: Sequence[Entry]) -> None:
        """Have running requests scored anew, from prompt and answer so far."""
        if not entries or not self._ready:
            return
        asked = [
            (entry, self._prompt(entry, entry.payload.output_token_ids))
            for entry in entries
            if entry.payload.prompt_token_ids and entry.seq not in self._in_flight
        ]
        if asked:
            self._hand_over(asked)

    def close(self) -> None:
        self._runtime.close()

    def _start(self) -> None:
        self._started_at = self._clock()
        try:
            started = self._runtime.start()
        except (OSError, RuntimeError) as error:
            self._fail(f"the ranker cannot be started: {error}")
            return
        if started is not self._runtime:
            logger.warning("pars-fast: the ranker goes on without its GPU's kernels, on the CPU")
            self._runtime = started

    def _hand_over(self, asked: list[tuple[Entry, Prompt]]) -> bool:
        """False if the ranker takes none now."""
        if not self._runtime.submit([prompt for _, prompt in asked]):
            return False
        now = self._clock()
        if not self._in_flight:
            self._heard_at = now
        self._in_flight |= {entry.seq: (entry, now) for entry, _ in asked}
        self._counters["pars_submitted"] += len(asked)
        return True

    def _forget_finished(self) -> None:
        """Only what the ranker knows: a caller's own estimates would pile up in one that scores nothing."""
        known = [seq for seq in self._queue.finished if seq in self._known]
        self._known.difference_update(known)
        self._queue.finished = []
        if known:
            self._runtime.forget(known)

    def _still_waiting(self, entries: deque[Entry]) -> deque[Entry]:
        """The same, without those that were admitted or aborted once these may be more than half of all.

        So there are never more than twice as many as wait, at a cost of O(1) for each that has left.
        """
        if len(entries) <= 2 * len(self._queue):
            return entries
        return deque(entry for entry in entries if entry.waiting)

    def _take(self, scored: list[Scored]) -> None:
        for answer in scored:
            if answer == READY:
                self._ready = True
                continue
            seq, expected_tokens, system_prompt = answer
            entry, handed_over_at = self._in_flight.pop(seq, (None, 0.0))
            if entry is None:
                continue
            if system_prompt:  # says better than the beginning of the ids whose it is
                entry.application = system_prompt
            if math.isfinite(expected_tokens):
                self._known.add(seq)
                if self._queue.entries.get(entry.payload.request_id) is not entry:  # finished meanwhile
                    self._queue.finished.append(seq)
                if entry.expected_tokens is None:  # what is learnt is of first predictions
                    self._learning.scored(entry, expected_tokens)
                self._queue.set_expected_tokens(entry, self._calibration.in_tokens(entry, expected_tokens))
                self._counters["pars_scored"] += 1
                self._score_latency.observe(self._heard_at - handed_over_at)
            else:
                self._counters["pars_fallback_prompt"] += 1
        if self._failures and scored[-1] != READY:  # one that starts but dies of its first batch is not back
            logger.info("pars-fast: the ranker is back")
            self._failures = 0

    def _fail(self, reason: str) -> None:
        delay = min(MAX_RESTART_DELAY_S, 2.0 ** min(self._failures, 10))  # 2.0**1024 overflows
        if not self._failures:
            logger.warning("pars-fast: %s; the queue is in arrival order until it is back", reason)
        self._failures += 1
        self._counters["pars_fallback_ranker"] += 1
        self._order()
        self._queue.arrivals.extend(entry for entry, _ in self._in_flight.values())
        self._in_flight.clear()
        self._known.clear()
        self._ready = False
        self._restart_at = self._clock() + delay

    def _device_order_holds(self) -> bool:
        """Its keys are of tokens as the ranker has them: on another scale only an order by the answer alone
        stays the same, and none where applications differ."""
        if self._calibration.reorders:
            return False
        return not self._calibration.scaled or prompt_work(type(self._queue.index.policy)) == 0

    def _order(self) -> None:
        """Ranked while the ranker answers and what it answers is of use."""
        ranking = not self._shadow and not self._failures and self._calibration.ranking
        if ranking != self._queue.index.ranking:
            self._queue.set_ranking(ranking)

    def _prompt(self, entry: Entry, made: Sequence[int] = ()) -> Prompt:
        """What the ranker gets of a request, with the answer so far of one that runs."""
        request = entry.payload
        seen = self._window.cut(request.prompt_token_ids)
        entry.application = seen.application
        num_tokens = request.num_prompt_tokens
        if self._runtime.weighs_prompts:
            num_tokens = self._queue.index.policy.uncached_tokens(request)
        return Prompt(entry.seq, [*seen.ids, *made], num_tokens, seen.shared)
