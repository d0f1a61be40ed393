"""The overtaking budget: a bound on how much work may go ahead of a request, whatever the scores.

When request i arrives it gets `budget_i = floor + beta * (expected tokens waiting ahead of it)`. Every
request that arrived later and is admitted before i is charged to i. Nobody passes a request whose budget
would go below zero, so at most (1 + beta) times the work of arrival order plus a constant is ever ahead
of a request. It counts tokens, reads no clock, and is kept on the host.

A charge at `seq` concerns every waiting request with a smaller `seq`, so what request i has been charged
is the sum of the charges beyond `seq_i`: charges are kept by `seq` in blocks, written in O(1) and summed
in O(sqrt n). Few sums are needed: a request with r tokens left cannot be overdrawn before r more tokens
have been charged in all, so each request waits in a heap for the total at which it must be looked at
again.
"""

import heapq
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Moment, WaitingRequest, Watch

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class OvertakingBudget:
    """`beta`: extra work tolerated per token ahead at arrival, a ratio; `floor_tokens`: a fixed allowance."""

    beta: float = 0.5
    floor_tokens: float = 2000.0
    name: ClassVar[str] = "overtaking_budget"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be finite and >= 0, got {self.beta}")
        if not self.floor_tokens >= 0:
            raise ValueError(f"floor_tokens must be >= 0, got {self.floor_tokens}")

    def watch(self) -> "Budgets":
        return Budgets(self)


class Budgets(Watch):
    """Budgets of the waiting requests of one priority class; `seq` is their order of arrival."""

    def __init__(self, settings: OvertakingBudget) -> None:
        self._settings = settings
        self._budget: dict[int, float] = {}
        self._charges = _SuffixSums()
        self._total = 0.0  # never decreases, so that the looks below are never late
        self._looks: list[tuple[float, int]] = []  # heap of (total at which seq may be overdrawn, seq)
        self._tight: list[int] = []  # seqs found short of budget, ascending

    def __len__(self) -> int:
        return len(self._budget)

    def arrive(self, request: WaitingRequest, tokens_ahead: float, now: Moment) -> None:
        """Give a new request its budget, in tokens.

        Must not be called between an admission and its undoing: this is where charges are forgotten that no
        waiting request can see any more.
        """
        seq = request.seq
        if len(self._looks) > 2 * len(self._budget) + 64:
            self._compact(seq)
        request.budget = budget = self._settings.floor_tokens + self._settings.beta * tokens_ahead
        self._budget[seq] = budget
        heapq.heappush(self._looks, (self._total + budget, seq))  # nothing is charged to the newest yet

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        """Take back a request that left and was not admitted after all, with the budget it had."""
        self._budget[request.seq] = request.budget
        heapq.heappush(self._looks, (self._total, request.seq))

    def leave(self, seq: int) -> None:
        """What the request was charged no longer matters."""
        del self._budget[seq]

    def charge(self, seq: int, tokens: float) -> None:
        """Charge `tokens` for the request `seq` to all waiting ones before it; negative to give back."""
        self._charges.add(seq, tokens)
        self._total += max(0.0, tokens)

    def remaining(self, seq: int) -> float:
        """Tokens that later arrivals may still take ahead of the waiting request `seq`."""
        return self._budget[seq] - self._charges.beyond(seq)

    def ahead_of(self, seq: int, tokens: float, now: Moment) -> int | None:
        """The oldest waiting request that `seq` may not pass with `tokens` of work, or None."""
        self._look(tokens)
        while self._tight and self._tight[0] < seq:
            oldest = self._tight[0]
            if oldest in self._budget:
                remaining = self.remaining(oldest)
                if remaining < tokens:
                    return oldest
                heapq.heappush(self._looks, (self._total + remaining, oldest))
            del self._tight[0]
        return None

    def _look(self, tokens: float) -> None:
        """Move requests that cannot pay `tokens` from the heap to the tight list."""
        while self._looks and self._looks[0][0] < self._total + tokens:
            _, seq = heapq.heappop(self._looks)
            if seq not in self._budget:
                continue
            remaining = self.remaining(seq)
            if remaining < tokens:
                place = bisect_left(self._tight, seq)
                if self._tight[place : place + 1] != [seq]:  # it may have left and come back
                    self._tight.insert(place, seq)
            else:
                heapq.heappush(self._looks, (self._total + remaining, seq))

    def _compact(self, next_seq: int) -> None:
        latest = {seq: total for total, seq in sorted(self._looks) if seq in self._budget}
        self._looks = sorted((total, seq) for seq, total in latest.items())
        self._charges.forget_before(min(self._budget, default=next_seq))


class _SuffixSums:
    """Values at growing positions; the sum beyond a position, in O(sqrt n)."""

    def __init__(self) -> None:
        self._first_block = 0
        self._blocks: list[list[float]] = []
        self._sums: list[float] = []

    def add(self, position: int, value: float) -> None:
        index = position // _BLOCK - self._first_block
        if index < 0:
            return  # forgotten: nothing waits before it
        while index >= len(self._blocks):
            self._blocks.append([0.0] * _BLOCK)
            self._sums.append(0.0)
        self._blocks[index][position % _BLOCK] += value
        self._sums[index] += value

    def beyond(self, position: int) -> float:
        """Sum of the values at positions greater than `position`, as far as they are still kept."""
        index = position // _BLOCK - self._first_block
        if index < 0:
            return sum(self._sums)
        if index >= len(self._blocks):
            return 0.0
        return sum(self._sums[index + 1 :]) + sum(self._blocks[index][position % _BLOCK + 1 :])

    def forget_before(self, position: int) -> None:
        """Drop blocks that end before `position`."""
        dropped = max(0, position // _BLOCK - self._first_block)
        del self._blocks[:dropped], self._sums[:dropped]
        self._first_block += dropped
