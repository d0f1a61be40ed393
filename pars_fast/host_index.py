"""The waiting queue's order on the host: who runs next, in O(log n) an admission.

Order: `(priority, lane, key, seq)`, lower first (`docs/design.md`). Lane 0 holds preempted requests.
A request without a score has the running median key, so being unscored is no advantage; since all such
requests share one key, they need no place among the keys, only their own order of arrival.

Keys are kept in tuples of numbers, compared in C and not tracked by the garbage collector, and are cleaned
lazily: one counts only while its request waits in that lane with that key. What was found for `head` is kept
until something changes.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pars_fast.arrival_order import ArrivalOrder
from pars_fast.guards import Guard, Moment, Watch
from pars_fast.policies import Policy
from pars_fast.sorted_blocks import SortedBlocks

Lane = Literal[0, 1]
MAX_EXPECTED_TOKENS = 32768.0  # a charge beyond this would only say "very long" louder
DEVICE_ORDER_MIN_WAITING = 65536  # where a GPU's order should begin to pay; a guess, not measured
_MEDIAN_WINDOW = 511


@dataclass(slots=True, eq=False)
class Entry:
    """One waiting (or admitted, unfinished) request.

    `expected_tokens` and `key` are None until a score comes; `charged_tokens` is what its admission cost
    the requests it passed, None while it has not been admitted, and `charged_by` the watch that knows of it.
    Stamps are monotonic seconds; `budget` is the guard's. `waiting` is the queue's to write. `predictions`
    counts those that were made anew while it ran.
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
    charged_by: Watch | None = None
    predictions: int = 0
    waiting: bool = False


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

    Attributes:
        promotions: admissions that the guard decided.
        overtakes: admissions ahead of an older waiting request.
        size: number of waiting requests.
        peeked: what `head` found, until something changes.
    """

    def __init__(
        self,
        policy: Policy,
        guard: Guard | None = None,
        *,
        initial_expected_tokens: float = 128.0,
        device_order_min_waiting: int = DEVICE_ORDER_MIN_WAITING,
    ) -> None:
        self._ranking = True
        self.promotions = 0
        self.overtakes = 0
        self.peeked: Entry | None = None
        self._peeked_by_guard = False
        self._median = RunningMedian(initial_expected_tokens)
        self._now = Moment(typical_tokens=initial_expected_tokens)
        self.size = 0
        self._device_order: deque[int] = deque()
        self._device_order_min_waiting = device_order_min_waiting
        self.set_policy(policy, guard)

    def set_policy(self, policy: Policy, guard: Guard | None = None) -> None:
        """Order by another policy and guard, None for the policy's own.

        Raises: ValueError: if a request waits.
        """
        if self.size:
            raise ValueError("the policy can change only while nothing waits")
        self.policy = policy
        self.guard = guard or policy.default_guard
        self._classes: dict[int, _PriorityClass] = {}
        self._priorities: list[int] = []

    @property
    def ranking(self) -> bool:
        return self._ranking

    @ranking.setter
    def ranking(self, active: bool) -> None:
        self._ranking = active
        self.peeked = None

    def begin_step(self, time_s: float) -> None:
        """A scheduling step begins: the moment that the guard goes by until the next one."""
        self._now.time_s = time_s
        self._now.step += 1
        self.peeked = None
        if len(self._classes) > 1:
            self._drop_empty_classes()

    def __len__(self) -> int:
        return self.size

    def add(self, entry: Entry) -> None:
        """Put in a new request; its key comes from the policy."""
        if entry.key is None:  # else the caller's estimate gave it
            entry.key = self.policy.key_on_arrival(entry.payload)
            if self.policy.knows_lengths and entry.key is not None:
                self._expect(entry, entry.key)
        entry.arrival_step = self._now.step
        group = self._class_of(entry.priority)
        tokens_ahead = group.scored_tokens + group.num_unscored * self._median.value
        group.watch.arrive(entry, tokens_ahead, self._now)
        group.put(entry)
        self.size += 1
        self.peeked = None

    def put_back(self, entry: Entry) -> None:
        """Take back a request that was popped: skipped in this step, or preempted (`lane` 0)."""
        group = self._class_of(entry.priority)
        if entry.lane == 1:
            if entry.charged_tokens is not None:
                if entry.charged_by is group.watch:
                    group.watch.charge(entry.seq, -entry.charged_tokens)
                entry.charged_tokens = None
            group.watch.rejoin(entry, self._now)
        group.put(entry)
        self.size += 1
        self.peeked = None

    def remove(self, entry: Entry) -> None:
        """Take out an aborted request."""
        self._take(self._classes[entry.priority], entry)

    def set_expected_tokens(self, entry: Entry, expected_tokens: float) -> None:
        """Give a request its score, in expected output tokens (finite); waiting or not."""
        if not entry.waiting:
            self._expect(entry, expected_tokens)
            return
        group = self._classes[entry.priority]
        had_no_key = entry.key is None
        group.account(entry, -1)
        self._expect(entry, expected_tokens)
        group.account(entry, 1)
        if self.policy.uses_ranker:
            (group.fresh if entry.lane else group.preempted).rekey(entry, had_no_key)
        if entry.lane == 1:
            group.watch.scored(entry, self._now)
        self.peeked = None

    def set_device_order(self, seqs: Sequence[int]) -> None:
        """The newest order of the scored requests that a GPU computed, next first: a hint.

        Used while at least `device_order_min_waiting` requests of one priority wait, none of them preempted.
        Each entry is checked before use; when it is used up, the host's own heap decides.
        """
        by_length = type(self.policy).key is Policy.key  # as on the device
        self._device_order = deque(seqs if by_length else ())
        self.peeked = None

    def expected(self, entry: Entry) -> float:
        """Expected output tokens of a request, the running median if it has no score."""
        return self._median.value if entry.expected_tokens is None else entry.expected_tokens

    def key_now(self, entry: Entry) -> float:
        """The key as of now, of a request that may run: it may have fallen with the tokens that were made."""
        if self.policy.uses_ranker:
            return self.policy.key(self.expected(entry), entry.payload)
        key = self.policy.key_on_arrival(entry.payload)
        assert key is not None
        return key

    @property
    def step(self) -> int:
        """Number of the scheduling step."""
        return self._now.step

    @property
    def head_is_promoted(self) -> bool:
        """Whether the guard, and not its key, put the last `head` there."""
        return self._peeked_by_guard

    def head(self) -> Entry:
        """Who runs next. Raises: IndexError: if nothing waits."""
        entry = self.peeked
        if entry is None:
            if not self.size:
                raise IndexError("peek from an empty queue")
            entry = self.peeked = self._next(self._first_class())
        return entry

    def pop(self) -> Entry:
        """Admit who runs next and charge those it passes. Raises: IndexError: if nothing waits."""
        if not self.size:
            raise IndexError("pop from an empty queue")
        entry = self.peeked or self.head()
        group = self._classes[entry.priority]
        self.promotions += self._peeked_by_guard
        self._take(group, entry)
        if entry.charged_tokens is None:  # a preempted request was charged when it was first admitted
            entry.charged_tokens = tokens = self.expected(entry)
            entry.charged_by = group.watch
            group.watch.charge(entry.seq, tokens)
        oldest = group.fresh.arrivals.first()
        if oldest is not None and oldest < entry.seq:
            self.overtakes += 1
        return entry

    def finish(self, entry: Entry, output_tokens: int) -> None:
        """Correct the charge of an admitted request to the tokens it really made."""
        if entry.charged_tokens is None:
            return
        group = self._classes.get(entry.priority)
        if group is not None and group.watch is entry.charged_by:
            group.watch.charge(entry.seq, output_tokens - entry.charged_tokens)
            self.peeked = None  # the guard may now decide otherwise
        entry.charged_tokens = entry.charged_by = None

    def __iter__(self) -> Iterator[Entry]:
        """Waiting entries by `(priority, lane, key, seq)`; the guard may admit in another order."""
        median = self.policy.key(self._median.value)
        for priority in self._priorities:
            yield from sorted(
                self._classes[priority].entries(),
                key=lambda e: (e.lane, (median if e.key is None else e.key) if self._ranking else 0.0, e.seq),
            )

    def _expect(self, entry: Entry, tokens: float) -> None:
        entry.expected_tokens = tokens = min(max(tokens, 1.0), MAX_EXPECTED_TOKENS)
        self._median.add(tokens)
        self._now.typical_tokens = self._median.value
        if self.policy.uses_ranker:  # else the key is known from the start
            entry.key = self.policy.key(tokens, entry.payload)

    def _take(self, group: "_PriorityClass", entry: Entry) -> None:
        group.take(entry)
        if entry.lane == 1:
            group.watch.leave(entry.seq)
        self.size -= 1
        self.peeked = None

    def _class_of(self, priority: int) -> "_PriorityClass":
        group = self._classes.get(priority)
        if group is None:
            group = self._classes[priority] = _PriorityClass(self.guard.watch())
            insort(self._priorities, priority)
        return group

    def _first_class(self) -> "_PriorityClass":
        """The class that runs next; one waits."""
        for priority in self._priorities:
            if group := self._classes[priority]:
                return group
        raise AssertionError("nothing waits")

    def _drop_empty_classes(self) -> None:
        """Not within a step, where an empty class may get back what was popped, and needs its charges."""
        self._classes = {priority: group for priority, group in self._classes.items() if group}
        self._priorities = sorted(self._classes)

    def _hint(self, group: "_PriorityClass") -> Entry | None:
        """The scored request of `group` that the device put first, None if the host is to look itself."""
        waiting = group.fresh.arrivals.members
        if self.size < self._device_order_min_waiting or len(waiting) < self.size:
            return None
        while self._device_order:
            entry = waiting.get(self._device_order[0])
            if entry is not None and entry.key is not None:
                return entry
            self._device_order.popleft()  # admitted or aborted meanwhile
        return None

    def _next(self, group: "_PriorityClass") -> Entry:
        """Next entry of a class that is not empty."""
        self._peeked_by_guard = False
        lane = group.preempted if group.preempted.arrivals.members else group.fresh
        if not self._ranking:
            return lane.oldest()
        median = self._median.value
        if lane is group.preempted:
            return lane.shortest(self.policy.key(median))
        entry = lane.shortest(self.policy.key(median), self._hint(group) if self._device_order else None)
        ahead_of, waiting = group.watch.ahead_of, lane.arrivals.members
        while True:
            tokens = entry.expected_tokens
            first = ahead_of(entry.seq, median if tokens is None else tokens, self._now)
            if first is None:
                return entry
            entry = waiting[first]
            self._peeked_by_guard = True


class _PriorityClass:
    """Waiting requests of one priority: two lanes, the guard's watch over the second, the expected work.

    Attributes:
        scored_tokens: expected tokens of the waiting requests that have a score.
        num_unscored: number of the others.
    """

    __slots__ = ("fresh", "num_unscored", "preempted", "scored_tokens", "watch")

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.preempted, self.fresh = _Lane(), _Lane()
        self.scored_tokens = 0.0
        self.num_unscored = 0

    def __bool__(self) -> bool:
        return bool(self.fresh.arrivals.members or self.preempted.arrivals.members)

    def entries(self) -> list[Entry]:
        return [*self.preempted.arrivals.members.values(), *self.fresh.arrivals.members.values()]

    def put(self, entry: Entry) -> None:
        entry.waiting = True
        (self.fresh if entry.lane else self.preempted).put(entry)
        self.account(entry, 1)

    def take(self, entry: Entry) -> None:
        entry.waiting = False
        (self.fresh if entry.lane else self.preempted).take(entry)
        self.account(entry, -1)

    def account(self, entry: Entry, sign: Literal[1, -1]) -> None:
        if entry.expected_tokens is None:
            self.num_unscored += sign
        else:
            self.scored_tokens += sign * entry.expected_tokens


class _Lane:
    """Waiting requests by key, those without one by arrival; and all of them by arrival."""

    __slots__ = ("_keyed", "_unkeyed", "arrivals")

    def __init__(self) -> None:
        self.arrivals: ArrivalOrder[Entry] = ArrivalOrder()
        self._unkeyed: ArrivalOrder[Entry] = ArrivalOrder()
        self._keyed: SortedBlocks[tuple[float, int]] = SortedBlocks()  # of (key, seq)

    def put(self, entry: Entry) -> None:
        self.arrivals.add(entry.seq, entry)
        if entry.key is None:
            self._unkeyed.add(entry.seq, entry)
        else:
            self._push(entry.key, entry.seq)

    def rekey(self, entry: Entry, had_no_key: bool) -> None:
        """The key of a waiting request has changed."""
        if had_no_key:
            del self._unkeyed.members[entry.seq]
        assert entry.key is not None
        self._push(entry.key, entry.seq)

    def _push(self, key: float, seq: int) -> None:
        self._keyed.add((key, seq))
        if len(self._keyed) > 2 * len(self.arrivals.members) + 64:
            waiting = self.arrivals.members.values()
            self._keyed = SortedBlocks((e.key, e.seq) for e in waiting if e.key is not None)

    def take(self, entry: Entry) -> None:
        del self.arrivals.members[entry.seq]
        if entry.key is None:
            del self._unkeyed.members[entry.seq]

    def oldest(self) -> Entry:
        first = self.arrivals.first()
        assert first is not None
        return self.arrivals.members[first]

    def shortest(self, median_key: float, hint: Entry | None = None) -> Entry:
        """The entry of lowest (key, seq), `median_key` standing in for a missing key.

        `hint`, if given, is the keyed entry to take instead of looking for it.
        """
        keyed = hint or self._shortest_keyed()
        first = self._unkeyed.first() if self._unkeyed.members else None
        if first is None:
            assert keyed is not None
            return keyed
        if keyed is not None:
            assert keyed.key is not None
            if (keyed.key, keyed.seq) < (median_key, first):
                return keyed
        return self._unkeyed.members[first]

    def _shortest_keyed(self) -> Entry | None:
        waiting, blocks = self.arrivals.members, self._keyed.blocks
        while blocks:
            key, seq = blocks[0][0]
            entry = waiting.get(seq)
            if entry is not None and entry.key == key:
                return entry
            self._keyed.pop_first()
        return None
