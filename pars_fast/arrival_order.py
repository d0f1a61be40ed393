"""A set that knows its oldest member: requests by `seq`, their order of arrival."""

import heapq
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class ArrivalOrder(Generic[T]):
    """Members by `seq`, each with a value; all operations are O(1), but for a member that comes back.

    What arrives is the newest and goes to the end of a deque; what comes back goes to a small heap. Members
    that have left are dropped when they come to the front. Of `members` others may read all
    and delete what has left; only `add` puts in.
    """

    __slots__ = ("_arrived", "_returned", "members")

    def __init__(self) -> None:
        self.members: dict[int, T] = {}
        self._arrived: deque[int] = deque()
        self._returned: list[int] = []

    def add(self, seq: int, value: T) -> None:
        members, arrived = self.members, self._arrived
        members[seq] = value
        if not arrived or seq > arrived[-1]:
            arrived.append(seq)
        else:
            heapq.heappush(self._returned, seq)
        if len(arrived) + len(self._returned) > 2 * len(members) + 64:
            self._arrived = deque(sorted(members))
            self._returned = []

    def first(self) -> int | None:
        """`seq` of the oldest member, None if there is none."""
        members, arrived = self.members, self._arrived
        while arrived and arrived[0] not in members:
            arrived.popleft()
        if self._returned:
            return self._first_with_returned()
        return arrived[0] if arrived else None

    def _first_with_returned(self) -> int | None:
        arrived, returned = self._arrived, self._returned
        while returned and returned[0] not in self.members:
            heapq.heappop(returned)
        if arrived and returned:
            return min(arrived[0], returned[0])
        return arrived[0] if arrived else returned[0] if returned else None
