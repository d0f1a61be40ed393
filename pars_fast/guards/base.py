"""What a guard is: a bound on how far the order of scores may depart from the order of arrival.

A guard has two parts. `Guard` is its name and settings, frozen. `Watch` is what it keeps of the waiting
requests of one priority class; the queue tells it of every change and asks it who must go ahead. Time is
passed in (`Moment`), so that a simulator's clock serves as well as a server's.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol


class WaitingRequest(Protocol):
    """The part of a queue's entry that a guard may read; `budget` is the guard's own to write.

    `arrival_s` and `arrival_step` are on the clocks of `Moment`. `expected_tokens` is None without a score.
    """

    seq: int
    arrival_s: float
    arrival_step: int
    expected_tokens: float | None
    budget: float


@dataclass(slots=True)
class Moment:
    """When a guard is asked, in three clocks, and what a request without a score is taken for.

    Attributes:
        time_s: monotonic seconds at the start of the scheduling step.
        step: number of the scheduling step.
        typical_tokens: expected output tokens of a request without a score.
    """

    time_s: float = 0.0
    step: int = 0
    typical_tokens: float = 0.0


class Watch:
    """A guard at work on one priority class. The base class never interferes.

    A request arrives once, and then leaves (admitted or aborted) and rejoins (skipped or preempted) any
    number of times.
    """

    def arrive(self, request: WaitingRequest, tokens_ahead: float, now: Moment) -> None:
        """A new request waits; `tokens_ahead` is the expected work that waits before it."""

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        """A request that left waits again."""

    def leave(self, seq: int) -> None:
        """A request waits no longer."""

    def scored(self, request: WaitingRequest, now: Moment) -> None:
        """A waiting request got its `expected_tokens`."""

    def charge(self, seq: int, tokens: float) -> None:
        """`seq` was admitted at a cost of `tokens`; later corrections are added, and may be negative."""

    def ahead_of(self, seq: int, tokens: float, now: Moment) -> int | None:
        """The waiting request that must run before `seq` with its `tokens` of work, None if `seq` may run.

        `seq` waits. Asked anew of each answer, until the answer is None.
        """
        return None


class Guard(Protocol):
    """Settings of a guard, a frozen dataclass whose fields are numbers."""

    name: ClassVar[str]

    def watch(self) -> Watch:
        """A new watch over one priority class."""
