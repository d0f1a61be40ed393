"""What three guards have in common: each waiting request has a time, and the earliest goes first.

The time is `arrival_s + offset(expected tokens)`, for a request without a score that of a typical one.
"""

import heapq
from collections.abc import Callable

from pars_fast.guards.base import Moment, WaitingRequest, Watch


class Deadlines(Watch):
    """The waiting request of the earliest time runs first: once that time has come, or `always`."""

    def __init__(self, offset: Callable[[float], float], *, always: bool = False) -> None:
        self._offset, self._always = offset, always
        self._times: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []  # of (time, seq); counts while it is seq's time

    def arrive(self, request: WaitingRequest, now: Moment) -> None:
        self._put(request, now)

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        self._put(request, now)

    def scored(self, request: WaitingRequest, now: Moment) -> None:
        self._put(request, now)

    def leave(self, seq: int) -> None:
        del self._times[seq]
        if len(self._heap) > 2 * len(self._times) + 64:
            self._heap = sorted((time, seq) for seq, time in self._times.items())

    def ahead_of(self, seq: int, now: Moment) -> int | None:
        while self._times.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        time, first = self._heap[0]
        return first if first != seq and (self._always or time <= now.time_s) else None

    def _put(self, request: WaitingRequest, now: Moment) -> None:
        expected = now.typical_tokens if request.expected_tokens is None else request.expected_tokens
        self._times[request.seq] = request.arrival_s + self._offset(expected)
        heapq.heappush(self._heap, (self._times[request.seq], request.seq))
