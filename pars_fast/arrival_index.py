"""Arrival order in the plainest way: what the queue falls back to when the ranked order fails."""

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence

from pars_fast.policies import POLICIES, Policy
from pars_fast.priority_class import Entry


class ArrivalIndex:
    """Waiting requests by `(priority, lane, seq)`; the part of `HostIndex` that a queue needs."""

    def __init__(self, waiting: Iterable[Entry]) -> None:
        self._order = sorted(waiting, key=_place)
        self.planned: list[Entry] = []  # for ever: nothing is planned ahead
        self.room = 0
        self.ranking = False
        self.sharing = None
        self.needs_endings = False
        self.policy: Policy = POLICIES["fcfs"]()
        self._step_s = 0.0

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._order)

    def begin_step(self, time_s: float, *, plan_anew: bool = False) -> None:
        self._step_s = time_s

    def plan_ahead(self) -> None:
        pass

    def add(self, entry: Entry) -> None:
        entry.waiting = True
        insort(self._order, entry, key=_place)

    put_back = add

    def remove(self, entry: Entry) -> None:
        entry.waiting = False
        self._order.remove(entry)

    def head(self) -> Entry:
        """Raises: IndexError: if nothing waits."""
        return self._order[0]

    def pop(self) -> Entry:
        """Raises: IndexError: if nothing waits."""
        entry = self._order.pop(0)
        entry.waiting = False
        if entry.lane:
            entry.admitted_s = self._step_s
        return entry

    def set_expected_tokens(self, entry: Entry, expected_tokens: float) -> None:
        pass

    def set_device_order(self, seqs: Sequence[int]) -> None:
        pass

    def finish(self, entry: Entry, output_tokens: int) -> None:
        pass


def _place(entry: Entry) -> tuple[int, int, int]:
    return entry.priority, entry.lane, entry.seq
