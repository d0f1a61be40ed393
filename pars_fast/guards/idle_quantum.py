"""A count of idle steps, after which a request goes first for a quantum of steps: the guard of LTR.

Source: LTR (arXiv 2408.15792) and its scheduler: a request that did not run in `idle_steps` iterations is
promoted, the promoted are served by score, and a promotion ends when the request has run for a quantum.
Chosen here, since in vLLM a request that runs is not in the queue: the quantum is counted in waiting steps,
and under a policy that preempts in running ones as well (`integration/preemption.py`).
A request promoted for `quantum_steps` steps and not admitted counts its idle steps anew; a long quantum
keeps it promoted until it is admitted, as LTR does.
"""

import heapq
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Guard, Moment, WaitingRequest, Watch


@dataclass(frozen=True, slots=True)
class IdleQuantum(Guard):
    """After `idle_steps` scheduling steps in the queue a request goes first for `quantum_steps`, in turn."""

    idle_steps: int = 200
    quantum_steps: int = 10
    name: ClassVar[str] = "idle_quantum"

    def __post_init__(self) -> None:
        for field in ("idle_steps", "quantum_steps"):
            value = getattr(self, field)
            if value < 1 or value != int(value):
                raise ValueError(f"{field} must be a whole number >= 1, got {value}")

    def promoted(self, steps_waited: int) -> bool:
        """Whether a request goes first after so many steps in the queue."""
        return steps_waited % (self.idle_steps + self.quantum_steps) >= self.idle_steps

    def watch(self) -> Watch:
        return _Promotions(self)


class _Promotions(Watch):
    """The promoted in a heap by expected tokens, the others in one by the step of their promotion.

    A promotion that has ended is noticed when the request comes to the top.
    """

    def __init__(self, settings: IdleQuantum) -> None:
        self._settings = settings
        self._waiting: dict[int, WaitingRequest] = {}
        self._begins: list[tuple[int, int]] = []  # heap of (step, seq)
        self._rank: dict[int, float] = {}  # of the promoted
        self._promoted: list[tuple[float, int]] = []  # heap of (rank, seq); counts while it is seq's rank

    def arrive(self, request: WaitingRequest, now: Moment) -> None:
        self.rejoin(request, now)

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        self._waiting[request.seq] = request
        self._begin_later(request, now)

    def leave(self, seq: int) -> None:
        del self._waiting[seq]
        self._rank.pop(seq, None)
        if len(self._begins) + len(self._promoted) > 4 * len(self._waiting) + 64:
            self._compact()

    def scored(self, request: WaitingRequest, now: Moment) -> None:
        if request.seq in self._rank:
            self._promote(request, now)

    def ahead_of(self, seq: int, now: Moment) -> int | None:
        while self._begins and self._begins[0][0] <= now.step:
            request = self._waiting.get(heapq.heappop(self._begins)[1])
            if request is not None and request.seq not in self._rank:
                self._promote(request, now)
        while self._promoted:
            rank, first = self._promoted[0]
            if self._rank.get(first) == rank:
                request = self._waiting[first]
                if self._settings.promoted(now.step - request.arrival_step):
                    return first if first != seq else None
                del self._rank[first]
                self._begin_later(request, now)
            heapq.heappop(self._promoted)
        return None

    def _begin_later(self, request: WaitingRequest, now: Moment) -> None:
        """At the promotion of the current period, which may have begun already."""
        period = self._settings.idle_steps + self._settings.quantum_steps
        periods = (now.step - request.arrival_step) // period
        begin = request.arrival_step + periods * period + self._settings.idle_steps
        heapq.heappush(self._begins, (begin, request.seq))

    def _promote(self, request: WaitingRequest, now: Moment) -> None:
        expected = now.typical_tokens if request.expected_tokens is None else request.expected_tokens
        self._rank[request.seq] = expected
        heapq.heappush(self._promoted, (expected, request.seq))

    def _compact(self) -> None:
        self._begins = sorted({item for item in self._begins if item[1] in self._waiting})
        self._promoted = sorted((rank, seq) for seq, rank in self._rank.items())
