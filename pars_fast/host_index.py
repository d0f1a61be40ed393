"""The waiting queue's order on the host: who runs next, in O(log n) an admission.

Order: `(priority, lane, key, seq)`, lower first (`docs/design.md`). Lane 0 holds preempted requests.
A request without a score has the running median key, so being unscored is no advantage.

The work is done by compiled code, in `WaitingTree`, and here little is left: changes are noted as they come,
and when a step asks for the first request, all of them are done and the next few requests planned in two
calls. Popping takes from that plan. What a step leaves of it goes back before anything else changes.

An engine has time while its model runs: there `plan_ahead` does the same for the coming step, which then only
takes from a list. What comes meanwhile is noted and waits for the next plan.
"""

import functools
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from pars_fast.guards import Guard, Moment, PassingLimit
from pars_fast.guards.base import TOKENS
from pars_fast.policies import POLICIES, Policy, SharingPolicy, prompt_work
from pars_fast.policies.base import QueuedRequest
from pars_fast.priority_class import MAX_PLANNED, NO_HINT, Entry, Plan, PriorityClass
from pars_fast.waiting_tree import (
    ARRIVE,
    CHARGE,
    LEAVE,
    MIN_CAPACITY,
    OVERTAKES,
    PROMOTED,
    RETURN,
    SCORE,
    new_hint,
    slack_of,
    take,
)

MAX_EXPECTED_TOKENS = 32768.0  # a charge beyond this would only say "very long" louder
# The host's own order is the faster one up to a million requests (`bench_queue.py`), and the slot table holds
# no more than so many.
DEVICE_ORDER_MIN_WAITING = 1 << 18
MIN_PLANNED_AHEAD = 8  # where the last steps admitted fewer
_MEDIAN_WINDOW = 511


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

    `cached_tokens` is for whatever policy orders; see `Policy`.

    Attributes:
        planned: who runs next, the next one last; empty until somebody asks. Whoever takes the last one off
            this list and makes it wait no longer admits it, as `pop` does.
        room: how many admissions a step can make at most.
        sharing: the policy, if it is one that has to be told what is served.
        needs_endings: whether the order of the next step depends on who has ended by then.
    """

    def __init__(
        self,
        policy: Policy,
        guard: Guard | None = None,
        *,
        initial_expected_tokens: float = 128.0,
        device_order_min_waiting: int = DEVICE_ORDER_MIN_WAITING,
        cached_tokens: Callable[[QueuedRequest], int] | None = None,
    ) -> None:
        self._cached_tokens = cached_tokens
        self._ranking = True
        self._promotions = 0  # in the steps before this one
        self._overtakes = 0
        self._unplanned = 0
        self.planned: list[Entry] = []
        self.room = MAX_PLANNED
        self._popped = 0  # and not put back, in the last step that had any
        self._flags: dict[int, int] = {}  # by seq, of those planned in this step that have not been put back
        self._ahead = False  # `planned` was made before its step
        self._holds = False  # and that has not begun
        self._median = RunningMedian(initial_expected_tokens)
        self._now = Moment(typical_tokens=initial_expected_tokens)
        self._hint = NO_HINT
        self._device_order_min_waiting = device_order_min_waiting
        self.set_policy(policy, guard)

    def set_policy(self, policy: Policy, guard: Guard | None = None) -> None:
        """Order by another policy and guard, None for the policy's own.

        Raises: ValueError: if a request waits.
        """
        if len(self):
            raise ValueError("the policy can change only while nothing waits")
        self.policy = policy
        if self._cached_tokens is not None:
            policy.cached_tokens = self._cached_tokens
        self.sharing = policy if isinstance(policy, SharingPolicy) else None
        self.guard = guard or policy.default_guard
        self.needs_endings = self.sharing is not None or self.guard.limit().kind == TOKENS
        # Not where the order depends on what happens until somebody is admitted.
        self._can_plan_ahead = not (self.needs_endings or policy.preempts or self.guard.watch())
        self._classes: dict[int, PriorityClass] = {}
        self._priorities: list[int] = []

    @property
    def ranking(self) -> bool:
        return self._ranking

    @ranking.setter
    def ranking(self, active: bool) -> None:
        self._settle()
        self._ranking = active

    @property
    def overtakes(self) -> int:
        """Admissions ahead of an older waiting request; never falls once the step is over."""
        return self._overtakes + self._admitted(OVERTAKES)

    @property
    def promotions(self) -> int:
        """Admissions that the guard decided; likewise."""
        return self._promotions + self._admitted(PROMOTED)

    def begin_step(self, time_s: float, *, plan_anew: bool = False) -> None:
        """A scheduling step begins: the moment that the guard goes by until the next one.

        `plan_anew`: not as was planned ahead, but with all that has come since.
        """
        if self._holds and not plan_anew:
            self._holds = False
        else:
            self._end_step()
        self._now.time_s = time_s
        self._now.step += 1
        for group in self._classes.values():
            group.begin_step()
        if len(self._classes) > 1:
            self._drop_empty_classes()

    def plan_ahead(self) -> None:
        """The step is over: find out now who runs next in the coming one.

        An aborted request leaves the plan. A higher priority, a request that comes back, and more news than
        are noted at a time undo it; what else comes waits for the next plan.
        """
        if not self._is_as_made_ahead():
            self._end_step()
            group = self._first_class()
            if not self._can_plan_ahead or group is None or group.preempted:
                return
            most = max(self._popped + self._popped // 4, MIN_PLANNED_AHEAD)  # some may be aborted
            self._take_plan(self._ranked_plan(group, min(most, MAX_PLANNED)))
            self._ahead = True
        self._holds = True

    def __len__(self) -> int:
        """Number of waiting requests, planned ones among them."""
        return self._unplanned + len(self.planned)

    def add(self, entry: Entry) -> None:
        """Put in a new request; its key comes from the policy."""
        if self.planned and not (self._holds and entry.priority >= self.planned[0].priority):
            self._settle()
        key = self.policy.key_on_arrival(entry.payload)
        if entry.key is None:  # else the caller's estimate gave it
            entry.key = key
            if self.policy.knows_lengths and key is not None:
                self._expect(entry, key)
        entry.arrival_step = self._now.step
        entry.waiting = True
        self._unplanned += 1
        group = self._class_of(entry.priority)
        if not group and not self.planned:
            group.begin_anew()
        met = self._median.value
        if not group.counts_tokens:
            planned = len(self.planned) if self.planned and self.planned[0].priority == entry.priority else 0
            met = float(len(group.waiting) + planned)
        group.waiting[entry.seq] = entry
        self._note(group, ARRIVE, entry, met)
        if group.watch is not None:
            group.watch.arrive(entry, self._now)

    def put_back(self, entry: Entry) -> None:
        """Take back a request that was popped: skipped in this step, or preempted (`lane` 0)."""
        self._settle()
        entry.waiting = True
        self._unplanned += 1
        group = self._class_of(entry.priority)
        if entry.lane == 0:
            group.preempted[entry.seq] = entry
            return
        self._flags.pop(entry.seq, None)  # not admitted in this step after all
        cost = group.cost(entry) if entry.charged_to is group else 0.0
        entry.charged_to = None
        group.waiting[entry.seq] = entry
        self._note(group, RETURN, entry, cost)
        if group.watch is not None:
            group.watch.rejoin(entry, self._now)

    def remove(self, entry: Entry) -> None:
        """Take out an aborted request."""
        if not self._holds:
            self._settle()
        entry.waiting = False
        if entry in self.planned:
            self._drop_planned(entry)
            return
        self._unplanned -= 1
        group = self._classes[entry.priority]
        if entry.lane == 0:
            del group.preempted[entry.seq]
            return
        del group.waiting[entry.seq]
        self._note(group, LEAVE, entry)
        if group.watch is not None:
            group.watch.leave(entry.seq)

    def set_expected_tokens(self, entry: Entry, expected_tokens: float) -> None:
        """Give a request its score, in expected output tokens (finite); waiting or not."""
        if not self._holds:
            self._settle()
        self._expect(entry, expected_tokens)
        if entry.waiting and entry.lane == 1:
            group = self._classes[entry.priority]
            self._note(group, SCORE, entry)
            if group.watch is not None:
                group.watch.scored(entry, self._now)

    def set_device_order(self, seqs: Sequence[int]) -> None:
        """The newest order of the scored requests that a GPU computed, next first: a hint.

        Used while at least `device_order_min_waiting` requests of one priority wait, none of them preempted.
        Each entry is checked before use; when it is used up, the host's own order decides.
        """
        if len(self) < self._device_order_min_waiting:
            self._hint = NO_HINT
            return
        self._settle()
        known = prompt_work(type(self.policy)) is not None
        self._hint = np.array(seqs, np.int64) if known else NO_HINT
        for group in self._classes.values():
            new_hint(group.tree)

    def expected(self, entry: Entry) -> float:
        """Expected output tokens of a request, the running median if it has no score."""
        return self._median.value if entry.expected_tokens is None else entry.expected_tokens

    def slack(self, entry: Entry) -> float:
        """What may still go ahead of a waiting request of lane 1, in what the guard counts."""
        self._settle()
        group = self._classes[entry.priority]
        group.do_what_was_noted()
        return slack_of(*group.tree, entry.seq)

    @property
    def step(self) -> int:
        """Number of the scheduling step."""
        return self._now.step

    def key_now(self, entry: Entry) -> float:
        """The key as of now, of a request that runs: it may have fallen with the tokens that were made."""
        if self.policy.uses_ranker:
            return self.policy.key(self.expected(entry), entry.payload)
        key = self.policy.key_on_arrival(entry.payload)
        assert key is not None
        return key

    def set_key_now(self, entry: Entry) -> None:
        """Before a request that ran is put back, of a policy that preempts; without a score it has no key."""
        if entry.key is not None:
            entry.key = self.key_now(entry)

    def look_ahead(self) -> Generator[tuple[Entry, bool], None, None]:
        """Who would run next, one after another, and whether the guard put it there.

        To be closed before anything else is done: then all wait as before.
        """
        taken: list[Entry] = []
        try:
            while len(self):
                entry = self.head()
                yield entry, bool(self._flags[entry.seq] & PROMOTED)
                taken.append(self.pop())
        finally:
            for entry in taken:
                entry.waiting = True  # of all, before anything can fail
            for entry in taken:
                self.put_back(entry)
            self._settle()

    def head(self) -> Entry:
        """Who runs next. Raises: IndexError: if nothing waits."""
        if not self.planned:
            self._plan()
        return self.planned[-1]

    def pop(self) -> Entry:
        """Admit who runs next and charge those it passes. Raises: IndexError: if nothing waits."""
        if not self.planned:
            self._plan()
        if self.sharing is not None:
            self.sharing.admitted(self.planned[-1].payload)
        entry = self.planned.pop()
        entry.waiting = False
        if entry.lane:  # of a preempted one the moment was noted when it was first admitted
            entry.admitted_s = self._now.time_s
        return entry

    def finish(self, entry: Entry, output_tokens: int) -> None:
        """An admitted or aborted request has ended: its charge is corrected to the tokens it really made."""
        if self.sharing is not None:
            self.sharing.ended(entry.payload)
        group = entry.charged_to
        if group is not None and group.counts_tokens and self._classes.get(entry.priority) is group:
            self._settle()
            self._note(group, CHARGE, entry, output_tokens - entry.charged_tokens)
        entry.charged_to = None

    def __iter__(self) -> Iterator[Entry]:
        """Waiting entries by `(priority, lane, key, seq)`; the guard may admit in another order."""
        self._settle()
        median = self.policy.key(self._median.value)
        for priority in self._priorities:
            group = self._classes[priority]
            yield from sorted(
                [*group.preempted.values(), *group.waiting.values()],
                key=lambda e: (e.lane, (median if e.key is None else e.key) if self._ranking else 0.0, e.seq),
            )

    def _expect(self, entry: Entry, tokens: float) -> None:
        entry.expected_tokens = tokens = min(max(tokens, 1.0), MAX_EXPECTED_TOKENS)
        self._median.add(tokens)
        self._now.typical_tokens = self._median.value
        if self.policy.uses_ranker:  # else the key is known from the start
            entry.key = self.policy.key(tokens, entry.payload)

    def _class_of(self, priority: int) -> PriorityClass:
        group = self._classes.get(priority)
        if group is None:
            group = self._classes[priority] = PriorityClass(self.guard, self._flags)
            insort(self._priorities, priority)
        return group

    def _drop_empty_classes(self) -> None:
        """Not within a step, where an empty class may get back what was popped, and needs its charges."""
        planned = self.planned[0].priority if self.planned else None
        self._classes = {
            priority: group for priority, group in self._classes.items() if group or priority == planned
        }
        self._priorities = sorted(self._classes)

    def _note(self, group: PriorityClass, operation: int, entry: Entry, value: float = 0.0) -> None:
        group.note(operation, entry, value)
        if group.has_noted_enough:
            self._settle()
            group.do_what_was_noted()

    def _first_class(self) -> PriorityClass | None:
        """The one whose requests run next, None if nobody waits."""
        for priority in self._priorities:
            if group := self._classes[priority]:
                return group
        return None

    def _plan(self) -> None:
        """Find out who runs next, and admit them as if popped. Raises: IndexError: if nothing waits."""
        group = self._first_class()
        if group is None:
            raise IndexError("this is an empty queue")
        # Long prompts may fill a step before its seats are taken: plan as if it were like the last one. Who
        # asks for more than there are seats has skipped some, and may skip many more.
        done = len(self._flags)
        seats = self.room - done if self.room > done else MAX_PLANNED
        most = max(1, min(seats, 2 * max(done, self._popped), MAX_PLANNED))
        typical = self._median.value
        if group.preempted:
            made = group.plan_preempted(self.policy.key(typical), self._ranking)
        elif group.untouched and len(group.waiting) <= most:
            made = group.plan_all(typical)
        elif self.sharing is not None and self._ranking:
            made = group.plan_shared(self.sharing, self.policy.key(typical), typical)
        elif group.watch is not None and self._ranking:
            made = group.plan_watched(self.policy.key(typical), self._now)
        else:
            made = self._ranked_plan(group, most)
        self._take_plan(made)

    def _ranked_plan(self, group: PriorityClass, most: int) -> Plan:
        """By key and limit."""
        hint, typical = self._hint, self._median.value
        if len(hint) and not self._device_order_min_waiting <= self._unplanned == len(group.waiting):
            hint = NO_HINT
        return group.plan_next(most, self.policy.key(typical), typical, self._ranking, hint)

    def _take_plan(self, made: Plan) -> None:
        self._unplanned -= len(made.entries)
        self.planned += reversed(made.entries)
        self._flags.update(zip([entry.seq for entry in made.entries], made.flags, strict=True))
        group, watch, charged = made.group, made.group.watch, made.group.counts_tokens
        for entry in made.entries:
            if entry.lane == 0:  # it was charged, and left the watch, when it was first admitted
                continue
            entry.charged_to = group
            if charged:
                entry.charged_tokens = self.expected(entry)
            if watch is not None:
                watch.leave(entry.seq)

    def _is_as_made_ahead(self) -> bool:
        """Whether what is planned was made ahead, is still all of it, and nothing is new."""
        return (
            self._ahead
            and len(self.planned) == len(self._flags)
            and not self._classes[self.planned[0].priority].has_noted
        )

    def _admitted(self, flag: int) -> int:
        """How many of those popped in this step, and not put back, have this flag."""
        planned = {entry.seq for entry in self.planned}
        return sum(bool(flags & flag) for seq, flags in self._flags.items() if seq not in planned)

    def _end_step(self) -> None:
        """Whoever was popped in it is gone, the others wait."""
        self._settle()
        if self._flags:
            self._popped = len(self._flags)
            self._overtakes, self._promotions = self.overtakes, self.promotions
            self._flags.clear()

    def _settle(self) -> None:
        """Put back what is planned and was not popped."""
        self._ahead = self._holds = False
        if not self.planned:
            return
        left = self.planned[::-1]
        for entry in left:
            del self._flags[entry.seq]
            if entry.lane:
                entry.charged_to = None
        self._classes[left[0].priority].put_back_planned(left, self._median.value, self._now)
        self.planned.clear()
        self._unplanned += len(left)

    def _drop_planned(self, entry: Entry) -> None:
        """A request that was planned ahead was aborted: to those behind it as if it had been popped."""
        self.planned.remove(entry)
        del self._flags[entry.seq]
        entry.charged_to = None
        if not self.planned:
            self._ahead = self._holds = False


@functools.cache
def warm_up() -> None:
    """Have all compiled code compiled, or read from disk: up to half a minute, so before anything waits."""
    index = HostIndex(POLICIES["pars"](), PassingLimit())
    entries = [Entry(seq, 0, None) for seq in range(2 * MIN_CAPACITY)]
    for entry in entries:
        index.set_expected_tokens(entry, 1.0)
        index.add(entry)
    for step in range(3):
        index.begin_step(float(step))
        popped = index.pop()
        index.head()
        index.put_back(popped)  # what is planned goes back, too
    index.slack(entries[0])
    index.remove(entries[0])
    take(*index._classes[0].tree, entries[1].seq)
