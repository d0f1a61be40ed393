"""The overtaking budget: a bound on how much work may go ahead of a request, whatever the scores.

When request i arrives it gets `budget_i = floor + beta * (expected tokens waiting ahead of it)`. Every
request that arrived later and is admitted before i is charged to i. Nobody passes a request whose budget
would go below zero, so at most (1 + beta) times the work of arrival order plus a constant is ever ahead
of a request (`docs/wait_bound.md`). It counts tokens, reads no clock, and is kept on the host.

A charge at `seq` concerns every waiting request with a smaller `seq`, so what request i has been charged
is the sum of the charges beyond `seq_i`: charges are kept by `seq`, written in O(1) and summed in parts.
Few sums are needed. A request with r tokens left cannot be overdrawn before r more tokens have been charged
in all: it is looked at again when that total comes near. Those that came near are kept in order of arrival,
each with the same bound, and summed anew only if the bound does not suffice.
"""

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.arrival_order import ArrivalOrder
from pars_fast.guards.base import Moment, WaitingRequest, Watch
from pars_fast.sorted_blocks import SortedBlocks

_BLOCK = 64
_FAR = 8.0  # a near request with so many times the tokens asked for is far again


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
    """Budgets of the waiting requests of one priority class; `seq` is their order of arrival.

    `_spent_at` of a near request, and the number beside a far one, is a total of charges before which its
    budget is not used up: exact when it was written, and since then a lower bound.
    """

    def __init__(self, settings: OvertakingBudget) -> None:
        self._settings = settings
        self._waiting: ArrivalOrder[float] = ArrivalOrder()  # budgets
        self._charges = SuffixSums()
        self._total = 0.0  # of what was charged to anybody; never decreases
        self._far: SortedBlocks[tuple[float, int]] = SortedBlocks()  # counts while seq waits and is not near
        self._near: list[int] = []  # ascending
        self._spent_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._waiting.members)

    def arrive(self, request: WaitingRequest, tokens_ahead: float, now: Moment) -> None:
        """Give a new request its budget, in tokens.

        Must not be called between an admission and its undoing: this is where charges are forgotten that no
        waiting request can see any more.
        """
        seq = request.seq
        if not self._waiting.members:
            self._charges.forget_before(seq)
        if len(self._far) > 2 * len(self._waiting.members) + 64:
            self._compact()
        request.budget = budget = self._settings.floor_tokens + self._settings.beta * tokens_ahead
        self._waiting.add(seq, budget)
        self._far.add((self._total + budget, seq))  # nothing is charged to the newest yet

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        """Take back a request that left and was not admitted after all, with the budget it had."""
        self._waiting.add(request.seq, request.budget)
        self._far.add((self._total, request.seq))

    def leave(self, seq: int) -> None:
        """What the request was charged no longer matters."""
        del self._waiting.members[seq]
        if self._spent_at.pop(seq, None) is not None:
            del self._near[bisect_left(self._near, seq)]

    def charge(self, seq: int, tokens: float) -> None:
        """Charge `tokens` for the request `seq` to all waiting ones before it; negative to give back."""
        self._charges.add(seq, tokens)
        if tokens > 0:
            oldest = self._waiting.first()
            if oldest is not None and oldest < seq:
                self._total += tokens

    def remaining(self, seq: int) -> float:
        """Tokens that later arrivals may still take ahead of the waiting request `seq`."""
        return self._waiting.members[seq] - self._charges.beyond(seq)

    def ahead_of(self, seq: int, tokens: float, now: Moment) -> int | None:
        """The oldest waiting request that `seq` may not pass with `tokens` of work, or None."""
        if seq == self._waiting.first():
            return None
        total, spent_at, far = self._total, self._spent_at, False
        blocks = self._far.blocks
        if blocks and blocks[0][0][0] - total < tokens:
            self._look(tokens)
        for near in self._near:
            if near >= seq:
                break
            least = spent_at[near] - total
            if least < tokens:
                remaining = self.remaining(near)
                spent_at[near] = total + remaining
                if remaining < tokens:
                    return near
            elif least > _FAR * max(tokens, now.typical_tokens):
                far = True
        if far:
            self._send_far(_FAR * max(tokens, now.typical_tokens))
        return None

    def _look(self, tokens: float) -> None:
        """Find out which of the far requests have come near: that cannot pay `tokens`."""
        far, blocks, total = self._far, self._far.blocks, self._total
        while blocks and blocks[0][0][0] - total < tokens:
            _, seq = far.pop_first()
            if seq not in self._waiting.members or seq in self._spent_at:
                continue
            remaining = self.remaining(seq)
            if remaining < tokens:
                self._spent_at[seq] = total + remaining
                insort(self._near, seq)
            else:
                far.add((total + remaining, seq))

    def _send_far(self, tokens: float) -> None:
        """Near requests whose budget was given back, more than `tokens` of it, are far again."""
        for seq in [seq for seq in self._near if self._spent_at[seq] - self._total > tokens]:
            self._far.add((self._spent_at.pop(seq), seq))
        self._near = sorted(self._spent_at)

    def _compact(self) -> None:
        """Drop far items that do not count, and charges that nobody waiting can see."""
        earliest: dict[int, float] = {}  # a later one may be from before the request left and came back
        for total, seq in (item for block in self._far.blocks for item in block):
            if seq in self._waiting.members and seq not in self._spent_at:
                earliest.setdefault(seq, total)
        self._far = SortedBlocks((total, seq) for seq, total in earliest.items())
        if (oldest := self._waiting.first()) is not None:
            self._charges.forget_before(oldest)


class SuffixSums:
    """Values at growing positions, and the sum beyond one: values, sums of 64 and sums of 64 * 64."""

    def __init__(self) -> None:
        self._start = 0  # position of the first value, a multiple of 64 * 64
        self._values: list[float] = []
        self._sums: list[float] = []
        self._sums_of_sums: list[float] = []

    def add(self, position: int, value: float) -> None:
        place = position - self._start
        if place < 0:
            return  # forgotten: nothing waits before it
        while place >= len(self._values):
            self._values += [0.0] * (_BLOCK * _BLOCK)
            self._sums += [0.0] * _BLOCK
            self._sums_of_sums.append(0.0)
        self._values[place] += value
        self._sums[place // _BLOCK] += value
        self._sums_of_sums[place // (_BLOCK * _BLOCK)] += value

    def beyond(self, position: int) -> float:
        """Sum of the values at positions greater than `position`, as far as they are still kept."""
        place = max(0, position + 1 - self._start)
        block = -(-place // _BLOCK)
        block_of_blocks = -(-block // _BLOCK)
        return (
            sum(self._values[place : block * _BLOCK])
            + sum(self._sums[block : block_of_blocks * _BLOCK])
            + sum(self._sums_of_sums[block_of_blocks:])
        )

    def forget_before(self, position: int) -> None:
        """Drop values before `position`, in whole blocks of 64 * 64."""
        blocks = (position - self._start) // (_BLOCK * _BLOCK)
        if blocks > 0:
            del self._values[: blocks * _BLOCK * _BLOCK]
            del self._sums[: blocks * _BLOCK]
            del self._sums_of_sums[:blocks]
            self._start += blocks * _BLOCK * _BLOCK
