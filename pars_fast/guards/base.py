"""What a guard is: a bound on how far the order of scores may depart from the order of arrival.

A guard is its name and settings, frozen. It bounds in one of two ways. Either it counts who goes ahead of
whom: then it is a `Limit`, and the queue counts. Or it has a `Watch`, which the queue tells of every change
in one priority class, and asks who must go ahead. Time is passed in (`Moment`), so that a simulator's clock
serves as well as a server's.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

NO_LIMIT, REQUESTS, TOKENS = 0.0, 1.0, 2.0  # kinds of a limit: what it counts


class Limit(NamedTuple):
    """How much may go ahead of a request: `kind` says of what.

    REQUESTS: `factor * longest queue since its arrival + floor`, older requests included; the longest queue
    counts up to `max_growth` times the one it met, that taken for `growth_from` at least.
    TOKENS: later arrivals with `factor * expected tokens ahead at arrival + floor` expected tokens in all.
    """

    kind: float = NO_LIMIT
    factor: float = 0.0
    floor: float = 0.0
    max_growth: float = 0.0
    growth_from: float = 0.0


class WaitingRequest(Protocol):
    """The part of a queue's entry that a guard may read.

    `arrival_s` and `arrival_step` are on the clocks of `Moment`. `expected_tokens` is None without a score.
    """

    seq: int
    arrival_s: float
    arrival_step: int
    expected_tokens: float | None


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


class Watch(Protocol):
    """A guard at work on one priority class.

    A request arrives once, and then leaves (admitted or aborted) and rejoins (skipped) any number of times.
    """

    def arrive(self, request: WaitingRequest, now: Moment) -> None:
        """A new request waits."""

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        """A request that left waits again."""

    def leave(self, seq: int) -> None:
        """A request waits no longer."""

    def scored(self, request: WaitingRequest, now: Moment) -> None:
        """A waiting request got its `expected_tokens`."""

    def ahead_of(self, seq: int, now: Moment) -> int | None:
        """The waiting request that must run before `seq`, None if `seq` may run.

        `seq` waits. Asked anew of each answer, until the answer is None.
        """


class Guard:
    """Settings of a guard; each is a frozen dataclass whose fields are numbers."""

    name: ClassVar[str]

    def limit(self) -> Limit:
        """What it counts, if it does."""
        return Limit()

    def watch(self) -> Watch | None:
        """A new watch over one priority class, if that is what it needs."""
        return None
