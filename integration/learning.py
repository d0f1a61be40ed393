"""What served requests teach: noted on the scheduling thread, taken in by the background thread."""

import functools
import time
from collections import deque

from pars_fast.integration.background import Background
from pars_fast.integration.calibration import LiveCalibration, ending_of
from pars_fast.integration.metrics import Histogram
from pars_fast.integration.recorder import Recorder
from pars_fast.integration.shadow import ShadowReport
from pars_fast.live_calibration import Ending
from pars_fast.priority_class import Entry

HAND_OVER_S = 1.0
HAND_OVER_EVENTS = 256
# The interpreter is left to the scheduling thread after so many events, for so long: to let go of it without
# sleeping is not enough, the thread that waits for it wakes too late to get it.
_PAUSE_EVERY = 8
_PAUSE_S = 5e-5


class Learning:
    """Scores and endings in the order of their coming; endings are the entries alone, after the time.

    To note one costs the scheduling thread an append. They are handed over in lots, so that the background
    thread wakes once a second or every 256 events, and a failure there is said once and leaves serving alone.
    """

    def __init__(
        self,
        calibration: LiveCalibration,
        queue_wait: Histogram,
        shadow: ShadowReport | None,
        recorder: Recorder | None,
        background: Background,
    ) -> None:
        self._calibration, self._queue_wait = calibration, queue_wait
        self._shadow, self._recorder = shadow, recorder
        self._background = background
        self._events: deque[float | Entry | tuple[Entry, float]] = deque()
        self._handed_over_at = 0.0

    def scored(self, entry: Entry, expected_tokens: float) -> None:
        """A request got a score: the tokens that the ranker itself expects."""
        self._events.append((entry, expected_tokens))

    def ended(self, entries: list[Entry], now_s: float) -> None:
        """Requests have ended, whichever way."""
        self._events.append(now_s)
        self._events += entries

    def hand_over(self, now_s: float) -> None:
        """Have them taken in, if they are many or old enough; never blocks."""
        if len(self._events) >= HAND_OVER_EVENTS or (
            self._events and now_s - self._handed_over_at >= HAND_OVER_S
        ):
            self._handed_over_at = now_s
            self.flush()

    def flush(self) -> None:
        """Have them taken in; never blocks."""
        events, self._events = self._events, deque()
        if events:
            self._background.submit(functools.partial(self._take_in, events))

    def _take_in(self, events: deque[float | Entry | tuple[Entry, float]]) -> None:
        """Each event goes as it is taken in: a request ends with it, and all at once take milliseconds."""
        ended_s = 0.0
        while events:
            if len(events) % _PAUSE_EVERY == 0:
                time.sleep(_PAUSE_S)
            event = events.popleft()
            if isinstance(event, float):
                ended_s = event
            elif isinstance(event, Entry):
                self._end(event, ended_s)
            else:
                self._calibration.scored(*event)

    def _end(self, entry: Entry, ended_s: float) -> None:
        request, ending = entry.payload, ending_of(entry.payload)
        self._calibration.finished(entry, ending)
        if output_tokens := request.num_output_tokens:
            self._queue_wait.observe(entry.admitted_s - entry.arrival_s)
        if ending is Ending.CUT:
            return
        if self._shadow is not None:
            self._shadow.add(entry, output_tokens, ended_s)
        if self._recorder is not None:
            self._recorder.add(request.prompt_token_ids, output_tokens, ending)
