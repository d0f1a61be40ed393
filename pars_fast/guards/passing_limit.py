"""A limit on how many requests may pass: counted against the longest queue since, whatever their lengths.

While request i waits, at most

    (1 + beta) * (most requests that waited before any arrival since i, i itself included) + floor

requests go ahead of it, those that were there before it and those that came later together. In order of
arrival the unluckiest of these arrivals has that queue ahead of it, so the longest wait of a rush is about
(1 + beta) times that of arrival order, if those who pass take no longer than others; they pass because they
are expected to take less. So the number of later arrivals that may still leave the queue before i is

    floor + (1 + beta) * longest queue since - requests before it at its arrival - later arrivals that left

Nobody passes a request for which this is below 1: the oldest such request runs instead. Against the
overtaking budget: it counts requests, not output tokens, because where prompts are long the output is the
smaller part of the work (`docs/simulator.md`), and because a count is exact whatever the scores; and its
limit grows while the queue does, because those who come later in a rush wait longer in any order. It reads no
clock.

A request that is aborted while it waits counts as having gone ahead of those before it.
"""

import heapq
import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Moment, WaitingRequest, Watch


@dataclass(frozen=True, slots=True)
class PassingLimit:
    """`beta`: passing tolerated per request of the longest queue, a ratio; `floor_requests`: in any case."""

    beta: float = 0.5
    floor_requests: float = 0.0
    name: ClassVar[str] = "passing_limit"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be finite and >= 0, got {self.beta}")
        if not self.floor_requests >= 0:
            raise ValueError(f"floor_requests must be >= 0, got {self.floor_requests}")

    def watch(self) -> "Passes":
        return Passes(self)


class Passes(Watch):
    """The limit at work on one priority class; `seq` is the order of arrival.

    Older and later requests that went ahead of i since its arrival, and the older ones that still wait, are
    `departures - departures at its arrival + place in the queue`: what is left of i's limit follows from its
    place. Whoever leaves takes at most 1 from what is left, so a request with r left is not looked at before
    r more have left; a limit that has grown meanwhile is looked at too early, which does no harm.
    """

    def __init__(self, settings: PassingLimit) -> None:
        self._settings = settings
        self._waiting: list[int] = []  # ascending
        self._departures_before: dict[int, int] = {}  # its arrival, by waiting seq
        self._departures = 0  # those that came back taken off
        self._looks_due = 0  # departures, never taken off, so that no look is late
        self._peak_seqs: list[int] = []  # arrivals since which no queue was as long, ascending
        self._peaks: list[int] = []  # requests that waited before them, descending
        self._looks: list[tuple[float, int]] = []  # heap of (`_looks_due` when to look, seq)
        self._at_limit: list[int] = []  # seqs found there, ascending

    def arrive(self, request: WaitingRequest, tokens_ahead: float, now: Moment) -> None:
        queue = len(self._waiting)
        while self._peaks and (self._peaks[-1] <= queue or not queue):
            self._peaks.pop()
            self._peak_seqs.pop()
        self._peaks.append(queue)
        self._peak_seqs.append(request.seq)
        request.budget = self._departures
        self._put(request)

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        self._departures -= 1
        self._put(request)

    def leave(self, seq: int) -> None:
        del self._waiting[bisect_left(self._waiting, seq)]
        del self._departures_before[seq]
        self._departures += 1
        self._looks_due += 1
        if len(self._looks) > 2 * len(self._waiting) + 64:
            latest = {seq: due for due, seq in sorted(self._looks) if seq in self._departures_before}
            self._looks = sorted((due, seq) for seq, due in latest.items())

    def remaining(self, seq: int) -> float:
        """How many later arrivals may still go ahead of the waiting request `seq`."""
        ahead = bisect_left(self._waiting, seq) + self._departures - self._departures_before[seq]
        peak = self._peaks[bisect_left(self._peak_seqs, seq)]
        return self._settings.floor_requests + (1 + self._settings.beta) * peak - ahead

    def ahead_of(self, seq: int, tokens: float, now: Moment) -> int | None:
        """The oldest waiting request that `seq` may not pass, or None."""
        self._look()
        while self._at_limit and self._at_limit[0] < seq:
            oldest = self._at_limit[0]
            if oldest in self._departures_before:
                if self.remaining(oldest) < 1:
                    return oldest
                self._look_later(oldest)
            del self._at_limit[0]
        return None

    def _put(self, request: WaitingRequest) -> None:
        insort(self._waiting, request.seq)
        self._departures_before[request.seq] = int(request.budget)
        self._look_later(request.seq)

    def _look(self) -> None:
        """Move requests that may not be passed once more from the heap to the list."""
        while self._looks and self._looks[0][0] < self._looks_due + 1:
            _, seq = heapq.heappop(self._looks)
            if seq not in self._departures_before:
                continue
            if self.remaining(seq) >= 1:
                self._look_later(seq)
            elif seq not in self._at_limit[(place := bisect_left(self._at_limit, seq)) : place + 1]:
                self._at_limit.insert(place, seq)  # else it left from there and came back

    def _look_later(self, seq: int) -> None:
        heapq.heappush(self._looks, (self._looks_due + self.remaining(seq), seq))
