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

So that a request is served even if the queue grows for ever, the longest queue counts up to 16 times the one
that the request met, itself taken for 256 at least (`docs/wait_bound.md`).

A request that is aborted while it waits counts as having gone ahead of those before it.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Moment, WaitingRequest
from pars_fast.guards.charges import ChargedWatch

MAX_GROWTH = 16
GROWTH_FROM = 256  # requests


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


class Passes(ChargedWatch):
    """The limits of one priority class: whoever leaves the queue is a charge of 1.

    The part of a limit that grows, the longest queue since, is not in the budget but read when it is needed.
    """

    def __init__(self, settings: PassingLimit) -> None:
        super().__init__()
        self._settings = settings
        self._peak_seqs: list[int] = []  # arrivals since which no queue was as long, ascending
        self._peaks: list[int] = []  # requests that waited before them, descending

    def arrive(self, request: WaitingRequest, tokens_ahead: float, now: Moment) -> None:
        queue = len(self)
        while self._peaks and (self._peaks[-1] <= queue or not queue):
            self._peaks.pop()
            self._peak_seqs.pop()
        self._peaks.append(queue)
        self._peak_seqs.append(request.seq)
        budget = self._settings.floor_requests - queue
        self._give(request, budget, budget + (1 + self._settings.beta) * queue)

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        if not self._peak_seqs or request.seq > self._peak_seqs[-1]:  # its class is watched anew
            self.arrive(request, 0.0, now)
            return
        self._charge(request.seq, -1.0)
        super().rejoin(request, now)

    def leave(self, seq: int) -> None:
        super().leave(seq)
        self._charge(seq, 1.0)

    def remaining(self, seq: int) -> float:
        """How many later arrivals may still go ahead of the waiting request `seq`."""
        met = self._settings.floor_requests - self._waiting.members[seq]
        longest = min(self._peaks[bisect_left(self._peak_seqs, seq)], MAX_GROWTH * max(met, GROWTH_FROM))
        return super().remaining(seq) + (1 + self._settings.beta) * longest

    def ahead_of(self, seq: int, tokens: float, now: Moment) -> int | None:
        """The oldest waiting request that `seq` may not pass, or None."""
        return self._overdrawn_by(seq, 1.0, 1.0)
