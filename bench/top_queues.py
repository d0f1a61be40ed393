"""Who gives the 16 requests of a step: queues that take keyed arrivals and give the smallest keys first.

All but `stock` (arrival order, the floor) keep the same order, (key, seq). `pars_fast` also keeps every
promise of the guard, and can abort; the others could not without a search.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import pytest

from pars_fast.guards import Guard
from pars_fast.host_index import HostIndex
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry


class TopQueue(Protocol):
    """Requests are known by `seq`, the number of their arrival."""

    def add(self, keys: Sequence[float]) -> None:
        """Requests arrive, in this order."""

    def take(self, count: int) -> list[int]:
        """The seqs of those that run next, which leave."""


class Deque:
    def __init__(self) -> None:
        self._queue: deque[int] = deque()
        self._arrived = 0

    def add(self, keys: Sequence[float]) -> None:
        self._queue.extend(range(self._arrived, self._arrived + len(keys)))
        self._arrived += len(keys)

    def take(self, count: int) -> list[int]:
        return [self._queue.popleft() for _ in range(count)]


class Heap:
    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._arrived = 0

    def add(self, keys: Sequence[float]) -> None:
        for seq, key in enumerate(keys, self._arrived):
            heapq.heappush(self._heap, (key, seq))
        self._arrived += len(keys)

    def take(self, count: int) -> list[int]:
        return [heapq.heappop(self._heap)[1] for _ in range(count)]


class Sorted:
    """Sorted anew at each step, as a scheduler that re-ranks its whole queue does (LTR, arXiv 2408.15792)."""

    def __init__(self) -> None:
        self._queue: list[tuple[float, int]] = []
        self._arrived = 0

    def add(self, keys: Sequence[float]) -> None:
        self._queue.extend((key, seq) for seq, key in enumerate(keys, self._arrived))
        self._arrived += len(keys)

    def take(self, count: int) -> list[int]:
        queue = sorted(self._queue)
        self._queue = queue[count:]
        return [seq for _, seq in queue[:count]]


class SortedContainer:
    def __init__(self) -> None:
        module = pytest.importorskip("sortedcontainers", reason="pip install 'pars-fast[bench]'")
        self._queue = module.SortedList()
        self._arrived = 0

    def add(self, keys: Sequence[float]) -> None:
        self._queue.update((key, seq) for seq, key in enumerate(keys, self._arrived))
        self._arrived += len(keys)

    def take(self, count: int) -> list[int]:
        return [self._queue.pop(0)[1] for _ in range(count)]


class Argpartition:
    """Keys in an array; who leaves makes room for who comes."""

    def __init__(self, capacity: int) -> None:
        self._keys = np.full(capacity, np.inf)
        self._seqs = np.full(capacity, np.iinfo(np.int64).max)
        self._free = list(range(capacity))
        self._arrived = 0

    def add(self, keys: Sequence[float]) -> None:
        slots = [self._free.pop() for _ in keys]
        self._keys[slots] = keys
        self._seqs[slots] = range(self._arrived, self._arrived + len(keys))
        self._arrived += len(keys)

    def take(self, count: int) -> list[int]:
        best = np.argpartition(self._keys, count - 1)[:count]
        best = best[np.lexsort((self._seqs[best], self._keys[best]))]
        self._keys[best] = np.inf
        self._free.extend(best.tolist())
        taken: list[int] = self._seqs[best].tolist()
        return taken


class Ours:
    """By expected tokens, under the guard that `pars_fast` has by default; nothing is planned ahead."""

    def __init__(self, guard: Guard | None = None) -> None:
        self._index = HostIndex(POLICIES["pars"](), guard or POLICIES["pars_fast"].default_guard)
        self._arrived = 0
        self._steps = 0

    def add(self, keys: Sequence[float]) -> None:
        for seq, key in enumerate(keys, self._arrived):
            entry = Entry(seq, 0, None)
            self._index.set_expected_tokens(entry, key)
            self._index.add(entry)
        self._arrived += len(keys)

    def take(self, count: int) -> list[int]:
        self._steps += 1
        self._index.room = count
        self._index.begin_step(float(self._steps))
        return [self._index.pop().seq for _ in range(count)]


QUEUES: dict[str, Callable[[int], TopQueue]] = {  # by the capacity asked for
    "stock": lambda capacity: Deque(),
    "heapq": lambda capacity: Heap(),
    "sorted": lambda capacity: Sorted(),
    "sortedcontainers": lambda capacity: SortedContainer(),
    "numpy_argpartition": Argpartition,
    "pars_fast": lambda capacity: Ours(),
}
