"""Requests of one priority that wait, and plans of who runs next among them.

The order itself is kept by compiled code, in `WaitingTree`. Changes are noted here as they come, and all of
them done when a plan is asked for, in two calls.
"""

from array import array
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pars_fast.guards import Guard, Moment
from pars_fast.guards.base import TOKENS
from pars_fast.policies import SharingPolicy
from pars_fast.waiting_tree import (
    ARRIVE,
    CHARGE,
    EMPTY,
    LOG_FIELDS,
    PROMOTED,
    RETURN,
    SCORE,
    TAKE,
    apply,
    make_tree,
    plan,
    regrown,
    take,
    undo,
)

Lane = Literal[0, 1]
MAX_PLANNED = 64  # requests planned at a time
NO_HINT = np.zeros(0, np.int64)
_MAX_NOTED = 256  # operations noted before they are done, whoever runs next
_UNKNOWN = float("nan")


@dataclass(slots=True, eq=False)
class Entry:
    """One waiting (or admitted, unfinished) request.

    `expected_tokens` and `key` are None until a score comes. `charged_to` is the class that knows of its
    admission, None while it has not been admitted, and `charged_tokens` what that cost the requests it
    passed, if the guard counts tokens. Stamps are monotonic seconds. `waiting` is the queue's to write.
    `predictions` counts those that were made anew while it ran, `application` stands for what its prompt
    begins with like others (`PromptWindow`).
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
    charged_tokens: float = 0.0
    charged_to: "PriorityClass | None" = None
    predictions: int = 0
    application: Hashable = None
    waiting: bool = False


@dataclass(slots=True)
class Plan:
    """Entries that run next, in this order, and their flags."""

    group: "PriorityClass"
    entries: list[Entry]
    flags: list[int]


class PriorityClass:
    """Waiting requests of one priority. `planned` has the seqs of all that were planned in the present step.

    Attributes:
        waiting: those of lane 1 that are not planned, by seq, with what has been noted of them and not yet
            been done in `tree`.
        preempted: those of lane 0, by seq. They are few: each had a seat.
        untouched: whether all that happened since nobody waited is that requests without a key arrived, and
            all of them were planned, so that their order is that of arrival and the tree need not be asked.
        watch: of a guard that is no limit; who is planned has left it.
    """

    def __init__(self, guard: Guard, planned: Collection[int]) -> None:
        self._planned = planned
        self.waiting: dict[int, Entry] = {}
        self.preempted: dict[int, Entry] = {}
        self.watch = guard.watch()
        self.untouched = self.watch is None
        self._limit = guard.limit()
        self.counts_tokens = self._limit.kind == TOKENS
        self.tree = make_tree(self._limit)
        self._noted = array("d")
        self._past = 0  # length of what was noted of those who had been planned while untouched
        self._seqs, self._flags = np.zeros(MAX_PLANNED, np.int64), np.zeros(MAX_PLANNED, np.int64)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.preempted)

    def cost(self, entry: Entry) -> float:
        """What admitting `entry` took from those it passed."""
        return entry.charged_tokens if self.counts_tokens else 1.0

    def note(self, operation: int, entry: Entry, value: float = 0.0) -> None:
        """An operation to be done before the next plan; `value` is its last or only one."""
        key, tokens = entry.key, entry.expected_tokens
        if operation != ARRIVE or key is not None:
            self.untouched = False
        if operation == CHARGE:
            self._noted.extend((operation, entry.seq, value, 0.0, 0.0))
        else:
            self._noted.extend((
                operation,
                entry.seq,
                _UNKNOWN if key is None else key,
                _UNKNOWN if tokens is None else tokens,
                value,
            ))

    @property
    def has_noted(self) -> bool:
        return bool(self._noted)

    @property
    def has_noted_enough(self) -> bool:
        """Whether to do it before anybody asks who runs next."""
        return len(self._noted) >= _MAX_NOTED * LOG_FIELDS

    def do_what_was_noted(self) -> None:
        if not self._noted:
            return
        self.untouched = False
        log = np.frombuffer(self._noted)
        self._noted, self._past = array("d"), 0
        while True:
            log = log[LOG_FIELDS * apply(*self.tree, log) :]
            if not len(log):
                return
            returning = int(log[1]) if log[0] == RETURN else EMPTY
            self.tree = regrown(self.tree, self._limit, self._out(log), returning)

    def _out(self, log: NDArray[np.float64]) -> NDArray[np.int64]:
        """Seqs, ascending, of who may come back: to have been passed meanwhile must not be forgotten."""
        operations = log.reshape(-1, LOG_FIELDS)
        returning = operations[operations[:, 0] == RETURN, 1]
        return np.union1d(returning, np.array([*self._planned], np.float64)).astype(np.int64)

    def begin_step(self) -> None:
        """Whoever was popped before does not come back."""
        if self.untouched and self._past:
            del self._noted[: self._past]
            self._past = 0

    def begin_anew(self) -> None:
        """Nobody waits."""
        if not self.untouched:
            self.do_what_was_noted()
            self.untouched = self.watch is None

    def plan_all(self, typical_tokens: float) -> Plan:
        """All that wait, by arrival; the class is untouched.

        The tree is told of them only if they do not all leave: what a later one met is then still known.
        """
        entries = list(self.waiting.values())
        self.waiting.clear()
        cost = typical_tokens if self.counts_tokens else 1.0
        for entry in entries:
            self._noted.extend((TAKE, entry.seq, cost, 0.0, 0.0))
        self._past = len(self._noted)
        return Plan(self, entries, [0] * len(entries))

    def plan_next(
        self, most: int, typical_key: float, typical_tokens: float, ranking: bool, hint: NDArray[np.int64]
    ) -> Plan:
        """The next `most` at most; one of lane 1 waits."""
        self.do_what_was_noted()
        seqs, flags = self._seqs[:most], self._flags[:most]
        count = plan(*self.tree, ranking, typical_key, typical_tokens, hint, seqs, flags)
        pop = self.waiting.pop
        return Plan(self, [pop(seq) for seq in seqs[:count].tolist()], flags[:count].tolist())

    def plan_watched(self, typical_key: float, now: Moment) -> Plan:
        """The next one, as the watch has it; one of lane 1 waits."""
        assert self.watch is not None
        made = self.plan_next(1, typical_key, now.typical_tokens, True, NO_HINT)
        shortest = made.entries[0]
        first = shortest.seq
        while (ahead := self.watch.ahead_of(first, now)) is not None:
            first = ahead
        if first != shortest.seq:
            undo(*self.tree, now.typical_tokens, self._seqs[:1])
            self.waiting[shortest.seq] = shortest
            made.entries[0] = self.waiting.pop(first)
            made.flags[0] = PROMOTED | take(*self.tree, first)
        return made

    def plan_shared(self, policy: SharingPolicy, typical_key: float, typical_tokens: float) -> Plan:
        """The next one by keys as they are now; they only rise: it is enough to look at who is first."""
        while True:
            made = self.plan_next(1, typical_key, typical_tokens, True, NO_HINT)
            entry = made.entries[0]
            assert entry.key is not None
            key = policy.key_now(entry.payload, entry.key)
            if key <= entry.key:
                return made
            undo(*self.tree, typical_tokens, self._seqs[:1])
            self.waiting[entry.seq] = entry
            entry.key = key
            self.note(SCORE, entry)

    def plan_preempted(self, typical_key: float, ranking: bool) -> Plan:
        """The next one; one of lane 0 waits."""

        def order(entry: Entry) -> tuple[float, int]:
            return (typical_key if entry.key is None else entry.key) if ranking else 0.0, entry.seq

        return Plan(self, [self.preempted.pop(min(self.preempted.values(), key=order).seq)], [0])

    def put_back_planned(self, entries: list[Entry], typical_tokens: float, now: Moment) -> None:
        """The last ones of a plan are not to be admitted in this step.

        What has been noted is newer than the plan, but for one of all that wait.
        """
        if entries[0].lane == 0:
            self.preempted.update((entry.seq, entry) for entry in entries)
            return
        self.waiting.update((entry.seq, entry) for entry in entries)
        if self.untouched:
            self.do_what_was_noted()
        undo(*self.tree, typical_tokens, np.array([entry.seq for entry in entries]))
        if self.watch is not None:
            for entry in entries:
                self.watch.rejoin(entry, now)
