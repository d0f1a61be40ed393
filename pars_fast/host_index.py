"""The waiting queue's order on the host: who runs next, in O(log n) a step.

Order: `(priority, lane, key, seq)`, lower first (`docs/design.md`). Lane 0 holds preempted requests.
A request without a score has the running median key, so being unscored is no advantage; since all such
requests share one key, they need no place among the keys, only their own heap in order of arrival.
Heaps are cleaned lazily: an item counts only while its stamp is its entry's.
"""

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pars_fast.guards import Guard, Moment, Watch
from pars_fast.policies import Policy

Lane = Literal[0, 1]
MAX_EXPECTED_TOKENS = 32768.0  # a charge beyond this would only say "very long" louder
DEVICE_ORDER_MIN_WAITING = 65536  # where a GPU's order should begin to pay; a guess, not measured
_MEDIAN_WINDOW = 511
_Heap = list[tuple[int, float, int, int, "Entry"]]  # (lane, key, seq, stamp, entry)


@dataclass(slots=True, eq=False)
class Entry:
    """One waiting (or admitted, unfinished) request.

    `expected_tokens` and `key` are None until a score comes; `charged_tokens` is what its admission cost
    the requests it passed, None while it has not been admitted. Stamps are monotonic seconds; `budget` is the
    guard's.
    """

    seq: int
    priority: int
    payload: Any
    lane: Lane = 1
    key: float | None = None
    expected_tokens: float | None = None
    arrival_s: float = 0.0
    arrival_step: int = 0
    admitted_s: float = 0.0
    budget: float = 0.0
    charged_tokens: float | None = None
    waiting: bool = False
    stamp: int = 0


class RunningMedian:
    """Median of the last values, each given in O(window)."""

    def __init__(self, initial: float, window: int = _MEDIAN_WINDOW) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._window = window
        self.value = initial

    def add(self, value: float) -> None:
        if len(self._recent) == self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(value)
        insort(self._sorted, value)
        self.value = self._sorted[len(self._sorted) // 2]


class HostIndex:
    """All waiting requests. `ranking` False gives arrival order at once, and keeps scores for later.

    Counters: `promotions`, admissions that the guard decided; `overtakes`, admissions ahead of an older
    waiting request.
    """

    def __init__(
        self,
        policy: Policy,
        guard: Guard | None = None,
        *,
        initial_expected_tokens: float = 128.0,
        device_order_min_waiting: int = DEVICE_ORDER_MIN_WAITING,
    ) -> None:
        self.ranking = True
        self.promotions = 0
        self.overtakes = 0
        self._median = RunningMedian(initial_expected_tokens)
        self._now = Moment(typical_tokens=initial_expected_tokens)
        self._size = 0
        self._device_order: deque[int] = deque()
        self._device_order_min_waiting = device_order_min_waiting
        self.set_policy(policy, guard)

    def set_policy(self, policy: Policy, guard: Guard | None = None) -> None:
        """Order by another policy and guard, None for the policy's own.

        Raises: ValueError: if a request waits.
        """
        if self._size:
            raise ValueError("the policy can change only while nothing waits")
        self.policy = policy
        self.guard = guard or policy.default_guard
        self._classes: dict[int, _PriorityClass] = {}
        self._priorities: list[int] = []

    def begin_step(self, time_s: float) -> None:
        """A scheduling step begins: the moment that the guard goes by until the next one."""
        self._now.time_s = time_s
        self._now.step += 1

    def __len__(self) -> int:
        return self._size

    def add(self, entry: Entry) -> None:
        """Put in a new request; its key comes from the policy."""
        if entry.key is None:  # else the caller's estimate gave it
            entry.key = self.policy.key_on_arrival(entry.payload)
            if self.policy.knows_lengths and entry.key is not None:
                self._expect(entry, entry.key)
        entry.arrival_step = self._now.step
        group = self._class_of(entry.priority)
        tokens_ahead = group.expected_tokens + group.unscored * self._median.value
        group.watch.arrive(entry, tokens_ahead, self._now)
        group.put(entry)
        self._size += 1

    def put_back(self, entry: Entry) -> None:
        """Take back a request that was popped: skipped in this step, or preempted (`lane` 0)."""
        group = self._class_of(entry.priority)
        if entry.lane == 1 and entry.charged_tokens is not None:
            group.watch.charge(entry.seq, -entry.charged_tokens)
            entry.charged_tokens = None
        group.watch.rejoin(entry, self._now)
        group.put(entry)
        self._size += 1

    def remove(self, entry: Entry) -> None:
        """Take out an aborted request."""
        group = self._classes[entry.priority]
        group.take(entry)
        group.watch.leave(entry.seq)
        self._size -= 1

    def set_expected_tokens(self, entry: Entry, expected_tokens: float) -> None:
        """Give a request its score, in expected output tokens (finite); waiting or not."""
        group = self._classes.get(entry.priority) if entry.waiting else None
        if group is not None:
            group.take(entry)
        expected_tokens = self._expect(entry, expected_tokens)
        if self.policy.uses_ranker:  # else the key is known from the start
            entry.key = self.policy.key(expected_tokens)
        if group is not None:
            group.put(entry)
            group.watch.scored(entry, self._now)

    def set_device_order(self, seqs: Sequence[int]) -> None:
        """The newest order of the scored requests that a GPU computed, next first: a hint.

        Used while at least `device_order_min_waiting` requests of one priority wait, none of them preempted.
        Each entry is checked before use; when it is used up, the host's own heap decides.
        """
        self._device_order = deque(seqs)

    def expected(self, entry: Entry) -> float:
        """Expected output tokens of a request, the running median if it has no score."""
        return self._median.value if entry.expected_tokens is None else entry.expected_tokens

    def head(self) -> Entry:
        """Who runs next. Raises: IndexError: if nothing waits."""
        for priority in self._priorities:
            if group := self._classes[priority]:
                return self._head_of(group)[0]
        raise IndexError("peek from an empty queue")

    def pop(self) -> Entry:
        """Admit who runs next and charge those it passes. Raises: IndexError: if nothing waits."""
        for priority in self._priorities:
            if group := self._classes[priority]:
                break
        else:
            raise IndexError("pop from an empty queue")
        entry, promoted = self._head_of(group)
        group.take(entry)
        group.watch.leave(entry.seq)
        self._size -= 1
        if entry.charged_tokens is None:  # a preempted request was charged when it was first admitted
            entry.charged_tokens = self.expected(entry)
            group.watch.charge(entry.seq, entry.charged_tokens)
        self.promotions += promoted
        self.overtakes += group.oldest_seq() < entry.seq
        return entry

    def finish(self, entry: Entry, output_tokens: int) -> None:
        """Correct the charge of an admitted request to the tokens it really made."""
        group = self._classes.get(entry.priority)
        if group is not None and entry.charged_tokens is not None:
            group.watch.charge(entry.seq, output_tokens - entry.charged_tokens)
            entry.charged_tokens = None

    def __iter__(self) -> Iterator[Entry]:
        """Waiting entries by `(priority, lane, key, seq)`; the guard may admit in another order."""
        median = self.policy.key(self._median.value)
        for priority in self._priorities:
            yield from sorted(
                self._classes[priority].entries(),
                key=lambda e: (e.lane, (median if e.key is None else e.key) if self.ranking else 0.0, e.seq),
            )

    def _expect(self, entry: Entry, tokens: float) -> float:
        entry.expected_tokens = tokens = min(max(tokens, 1.0), MAX_EXPECTED_TOKENS)
        self._median.add(tokens)
        self._now.typical_tokens = self._median.value
        return tokens

    def _class_of(self, priority: int) -> "_PriorityClass":
        group = self._classes.get(priority)
        if group is None:
            group = self._classes[priority] = _PriorityClass(self.guard.watch())
            insort(self._priorities, priority)
        return group

    def _hint(self, group: "_PriorityClass") -> Entry | None:
        """The scored request of `group` that the device put first, None if the host is to look itself."""
        if self._size < self._device_order_min_waiting or len(group.by_seq) < self._size or group.preempted:
            return None
        while self._device_order:
            entry = group.by_seq.get(self._device_order[0])
            if entry is not None and entry.key is not None:
                return entry
            self._device_order.popleft()  # admitted or aborted meanwhile
        return None

    def _head_of(self, group: "_PriorityClass") -> tuple[Entry, bool]:
        """(next entry of a class, whether the guard chose it)."""
        if not self.ranking:
            return group.first(group.arrivals), False
        entry = group.shortest(self.policy.key(self._median.value), self._hint(group))
        if entry.lane == 0:
            return entry, False
        promoted = False
        while (first := group.watch.ahead_of(entry.seq, self.expected(entry), self._now)) is not None:
            entry, promoted = group.by_seq[first], True
        return entry, promoted


class _PriorityClass:
    """Waiting requests of one priority: three lazy heaps, the guard's watch, and the expected work in sum."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.by_seq: dict[int, Entry] = {}
        self.expected_tokens = 0.0  # of the scored
        self.unscored = 0
        self.preempted = 0
        self.arrivals: _Heap = []
        self._keyed: _Heap = []
        self._unscored: _Heap = []

    def __bool__(self) -> bool:
        return bool(self.by_seq)

    def entries(self) -> list[Entry]:
        return list(self.by_seq.values())

    def put(self, entry: Entry) -> None:
        entry.waiting = True
        entry.stamp += 1
        self.by_seq[entry.seq] = entry
        heapq.heappush(self.arrivals, (entry.lane, 0.0, entry.seq, entry.stamp, entry))
        if entry.key is None:
            heapq.heappush(self._unscored, (entry.lane, 0.0, entry.seq, entry.stamp, entry))
        else:
            heapq.heappush(self._keyed, (entry.lane, entry.key, entry.seq, entry.stamp, entry))
        self._account(entry, 1)

    def take(self, entry: Entry) -> None:
        entry.waiting = False
        del self.by_seq[entry.seq]
        self._account(entry, -1)
        self._compact()

    def shortest(self, median_key: float, hint: Entry | None = None) -> Entry:
        """The entry of lowest (lane, key, seq), `median_key` standing in for a missing key.

        `hint`, if given, is the keyed entry to take instead of looking for it.
        """
        keyed = hint or self._top(self._keyed)
        unscored = self._top(self._unscored)
        if keyed is None or unscored is None:
            entry = keyed or unscored
            assert entry is not None
            return entry
        assert keyed.key is not None
        waits_longer = (unscored.lane, median_key, unscored.seq) < (keyed.lane, keyed.key, keyed.seq)
        return unscored if waits_longer else keyed

    def first(self, heap: _Heap) -> Entry:
        return self._clean(heap)[0][4]

    def _top(self, heap: _Heap) -> Entry | None:
        return self._clean(heap)[0][4] if self._clean(heap) else None

    def oldest_seq(self) -> int:
        """Lowest `seq` of lane 1; a large number if nobody waits there."""
        heap = self._clean(self.arrivals)
        return heap[0][2] if heap else 1 << 62

    def _account(self, entry: Entry, sign: Literal[1, -1]) -> None:
        self.preempted += sign * (entry.lane == 0)
        if entry.expected_tokens is None:
            self.unscored += sign
        else:
            self.expected_tokens += sign * entry.expected_tokens

    @staticmethod
    def _clean(heap: _Heap) -> _Heap:
        """Drop stale items from the top."""
        while heap and not (heap[0][4].waiting and heap[0][4].stamp == heap[0][3]):
            heapq.heappop(heap)
        return heap

    def _compact(self) -> None:
        """Rebuild a heap that is mostly stale; amortised O(1) an operation."""
        limit = 2 * len(self.by_seq) + 64
        for heap in (self.arrivals, self._keyed, self._unscored):
            if len(heap) > limit:
                heap[:] = [item for item in heap if item[4].waiting and item[4].stamp == item[3]]
                heapq.heapify(heap)
