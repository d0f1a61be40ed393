"""Budgets that are used up by charges: what the guards share that count who has gone ahead of whom.

A charge at `seq` concerns every waiting request with a smaller `seq`, so what request i has been charged
is the sum of the charges beyond `seq_i`: charges are kept by `seq`, written in O(1) and summed in parts.
Few sums are needed. A request with r left of its budget cannot be overdrawn before r more have been charged
in all: it is looked at again when that total comes near. Those that came near are kept in order of arrival,
each with the same bound, and summed anew only if the bound does not suffice.
"""

from bisect import bisect_left, insort

from pars_fast.arrival_order import ArrivalOrder
from pars_fast.guards.base import Moment, WaitingRequest, Watch
from pars_fast.sorted_blocks import SortedBlocks

_BLOCK = 64
_FAR = 8.0  # a near request with so many times a usual charge left is far again


class ChargedWatch(Watch):
    """Budgets of the waiting requests of one priority class; `seq` is their order of arrival.

    A budget may grow while its request waits, and must not shrink but by charges.

    `_spent_at` of a near request, and the number beside a far one, is a total of charges before which its
    budget is not used up: exact when it was written, and since then a lower bound.
    """

    def __init__(self) -> None:
        self._waiting: ArrivalOrder[float] = ArrivalOrder()  # budgets
        self._charges = SuffixSums()
        self._total = 0.0  # of what was charged to anybody; never decreases
        self._far: SortedBlocks[tuple[float, int]] = SortedBlocks()  # counts while seq waits and is not near
        self._near: list[int] = []  # ascending
        self._spent_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._waiting.members)

    def rejoin(self, request: WaitingRequest, now: Moment) -> None:
        """Take back a request that left and was not admitted after all, with the budget it had."""
        self._waiting.add(request.seq, request.budget)
        self._add_far(self._total, request.seq)

    def leave(self, seq: int) -> None:
        """What the request was charged no longer matters."""
        del self._waiting.members[seq]
        if self._spent_at.pop(seq, None) is not None:
            del self._near[bisect_left(self._near, seq)]

    def remaining(self, seq: int) -> float:
        """What is left of the budget of the waiting request `seq`."""
        return self._waiting.members[seq] - self._charges.beyond(seq)

    def _give(self, request: WaitingRequest, budget: float, left: float) -> None:
        """A new request gets its budget, of which `left` is left.

        Must not be called between an admission and its undoing: this is where charges are forgotten that no
        waiting request can see any more.
        """
        seq = request.seq
        oldest = self._waiting.first()
        self._charges.forget_before(seq if oldest is None else oldest)
        request.budget = budget
        self._waiting.add(seq, budget)
        self._add_far(self._total + left, seq)

    def _charge(self, seq: int, amount: float) -> None:
        """Charge `amount` for the request `seq` to all waiting ones before it; negative to give back."""
        self._charges.add(seq, amount)
        if amount > 0:
            oldest = self._waiting.first()
            if oldest is not None and oldest < seq:
                self._total += amount

    def _overdrawn_by(self, seq: int, amount: float, usual: float) -> int | None:
        """The oldest request before `seq` with less than `amount` left, None if there is none.

        `usual` is a charge of common size.
        """
        if seq == self._waiting.first():
            return None
        total, spent_at, far = self._total, self._spent_at, False
        blocks = self._far.blocks
        if blocks and blocks[0][0][0] - total < amount:
            self._look(amount)
        for near in self._near:
            if near >= seq:
                break
            least = spent_at[near] - total
            if least < amount:
                remaining = self.remaining(near)
                spent_at[near] = total + remaining
                if remaining < amount:
                    return near
            elif least > _FAR * usual:
                far = True
        if far:
            self._send_far(_FAR * usual)
        return None

    def _look(self, amount: float) -> None:
        """Find out which of the far requests have come near: that have less than `amount` left."""
        far, blocks, total = self._far, self._far.blocks, self._total
        while blocks and blocks[0][0][0] - total < amount:
            _, seq = far.pop_first()
            if seq not in self._waiting.members or seq in self._spent_at:
                continue
            remaining = self.remaining(seq)
            if remaining < amount:
                self._spent_at[seq] = total + remaining
                insort(self._near, seq)
            else:
                far.add((total + remaining, seq))

    def _send_far(self, amount: float) -> None:
        """Near requests with more than `amount` left, since charges were given back, are far again."""
        for seq in [seq for seq in self._near if self._spent_at[seq] - self._total > amount]:
            self._far.add((self._spent_at.pop(seq), seq))
        self._near = sorted(self._spent_at)

    def _add_far(self, spent_at: float, seq: int) -> None:
        self._far.add((spent_at, seq))
        if len(self._far) > 2 * len(self._waiting.members) + 64:
            earliest: dict[int, float] = {}  # a later one may be from before the request left and came back
            for total, other in (item for block in self._far.blocks for item in block):
                if other in self._waiting.members and other not in self._spent_at:
                    earliest.setdefault(other, total)
            self._far = SortedBlocks((total, other) for other, total in earliest.items())


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
