"""The limit on passing against its definition, and the promise it makes."""

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.guards import PassingLimit
from pars_fast.guards.passing_limit import GROWTH_FROM, MAX_GROWTH
from pars_fast.host_index import HostIndex
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry
from pars_fast.waiting_tree import MIN_CAPACITY, regrown

SEEDS = st.integers(0, 2**32 - 1)


class Request:
    """What the oracle reads."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens


class ReferencePasses:
    """The definition, counted anew for every question."""

    def __init__(self, guard: PassingLimit) -> None:
        self.guard = guard
        self.waiting: set[int] = set()
        self.met: dict[int, int] = {}  # how many waited before each arrival
        self.left: set[int] = set()

    def arrive(self, seq: int) -> None:
        self.met[seq] = len(self.waiting)
        self.waiting.add(seq)

    def leave(self, seq: int) -> None:
        self.waiting.remove(seq)
        self.left.add(seq)

    def rejoin(self, seq: int) -> None:
        self.left.remove(seq)
        self.waiting.add(seq)

    def remaining(self, seq: int) -> float:
        longest = max(queue for other, queue in self.met.items() if other >= seq)
        passed = sum(other > seq for other in self.left)
        return self.guard.floor_requests + (1 + self.guard.beta) * longest - self.met[seq] - passed

    def blocked_by(self, seq: int) -> int | None:
        return min((o for o in self.waiting if o < seq and self.remaining(o) < 1), default=None)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, beta=st.sampled_from([0.0, 0.3, 0.5, 2.0]), floor=st.sampled_from([0.0, 0.7, 3.0]))
def test_limit_equals_its_definition(seed: int, beta: float, floor: float) -> None:
    """Random arrivals, admissions, skips and aborts; `seq` has gaps, as it has with other priorities."""
    rng = random.Random(seed)
    guard = PassingLimit(beta, floor)
    index, reference = HostIndex(POLICIES["oracle"](), guard), ReferencePasses(guard)
    entries: dict[int, Entry] = {}
    seq = 0
    for step in range(200):
        busy = step % 50 < 25  # the queue grows, and then is emptied
        for _ in range(rng.choice([0, 1, 4]) if busy else rng.choice([0, 0, 1])):
            seq += rng.randint(1, 3)
            entries[seq] = Entry(seq, 0, Request(rng.randint(1, 9)))
            index.add(entries[seq])
            reference.arrive(seq)
        if reference.waiting and rng.random() < 0.2:
            aborted = rng.choice(sorted(reference.waiting))
            index.remove(entries[aborted])
            reference.leave(aborted)
        index.begin_step(float(step))
        index.room = rng.choice([1, 2, 5])
        skipped = []
        for _ in range(rng.randrange(4)):
            if not reference.waiting:
                break
            shortest = min(reference.waiting, key=lambda seq: (entries[seq].payload.max_tokens, seq))
            blocked_by = reference.blocked_by(shortest)
            chosen = index.pop().seq
            assert chosen == (shortest if blocked_by is None else blocked_by)
            reference.leave(chosen)
            if rng.random() < 0.3:
                skipped.append(chosen)
        for chosen in skipped:
            index.put_back(entries[chosen])
            reference.rejoin(chosen)
        for waiting in reference.waiting:
            assert index.slack(entries[waiting]) == math.floor(reference.remaining(waiting) + 1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, beta=st.sampled_from([0.0, 0.3, 2.0]), floor=st.sampled_from([0, 5]))
def test_nobody_has_more_requests_ahead_than_the_limit(seed: int, beta: float, floor: int) -> None:
    """The promise, whatever the scores: counted at every admission for all that wait."""
    rng = random.Random(seed)
    index = HostIndex(POLICIES["pars"](), PassingLimit(beta, floor))
    waiting: dict[int, Entry] = {}
    admitted_since: dict[int, int] = {}
    longest_since: dict[int, int] = {}
    arrived = 0
    while arrived < 300 or waiting:
        for _ in range(rng.choice([0, 0, 1, 6]) if arrived < 300 else 0):
            longest_since[arrived] = 0
            for seq in (*waiting, arrived):
                longest_since[seq] = max(longest_since[seq], len(waiting))
            waiting[arrived] = Entry(arrived, 0, None)
            admitted_since[arrived] = 0
            index.add(waiting[arrived])
            arrived += 1
        unscored = [entry for entry in waiting.values() if entry.expected_tokens is None]
        for entry in rng.sample(unscored, min(rng.choice([0, 2]), len(unscored))):
            index.set_expected_tokens(entry, rng.lognormvariate(4, 1.5))
        index.begin_step(0.0)
        for _ in range(min(len(waiting), rng.choice([0, 1, 2, 6]))):
            entry = index.pop()
            del waiting[entry.seq]
            for seq in waiting:
                admitted_since[seq] += 1
            assert admitted_since[entry.seq] <= floor + (1 + beta) * longest_since[entry.seq]


@pytest.mark.parametrize(("floor", "overtakers"), [(0, 0), (0.9, 0), (3, 3)])
def test_the_floor_says_how_many_pass_a_lone_request(floor: float, overtakers: int) -> None:
    index = HostIndex(POLICIES["pars"](), PassingLimit(0.0, floor))
    long = Entry(0, 0, None)
    index.add(long)
    index.set_expected_tokens(long, 1000.0)
    order = []
    for seq in range(1, 9):
        entry = Entry(seq, 0, None)
        index.add(entry)
        index.set_expected_tokens(entry, 10.0)
        order.append(index.pop().seq)
    assert order.index(0) == overtakers + 1  # the queue that each of them met is one request long


def add(index: HostIndex, seq: int) -> Entry:
    entry = Entry(seq, 0, None)
    index.add(entry)
    return entry


def test_a_longer_queue_later_lets_more_pass() -> None:
    index = HostIndex(POLICIES["pars"](), PassingLimit(beta=0.5, floor_requests=0))
    entries = [add(index, 0)]
    assert index.slack(entries[0]) == 0
    entries += [add(index, seq) for seq in range(1, 5)]
    assert index.slack(entries[0]) == 6  # 1.5 times the four that the last one met
    assert index.slack(entries[4]) == 2
    for entry in entries[:0:-1]:
        index.remove(entry)
    assert index.slack(entries[0]) == 2
    assert index.slack(add(index, 5)) == 0  # half a request


@pytest.mark.parametrize("popped", [1, 2, 3])
def test_those_who_left_before_an_order_was_needed_count_too(popped: int) -> None:
    """Three come and are planned by arrival alone; what the last one met is not forgotten when it stays."""
    index = HostIndex(POLICIES["pars"](), PassingLimit(beta=0.0, floor_requests=0))
    for seq in (-2, -1):  # after a step of two, four are planned at once
        add(index, seq)
    index.begin_step(0.0)
    assert [index.pop().seq for _ in range(2)] == [-2, -1]
    index.begin_step(1.0)
    entries = [add(index, seq) for seq in range(3)]
    assert [index.pop().seq for _ in range(popped)] == list(range(popped))
    if popped == 3:
        index.put_back(entries[2])  # vLLM skipped it
    index.begin_step(2.0)
    assert index.slack(entries[2]) == 0  # two were ahead of it, and two may go ahead
    for seq in range(3, 3 + min(popped, 2)):
        add(index, seq)  # meets no more than two
        assert index.slack(entries[2]) == 0


def test_the_limit_does_not_grow_for_ever() -> None:
    index = HostIndex(POLICIES["pars"](), PassingLimit(beta=0.5, floor_requests=0))
    entries = [add(index, seq) for seq in range(MAX_GROWTH * GROWTH_FROM + 500)]
    assert index.slack(entries[0]) == 1.5 * MAX_GROWTH * GROWTH_FROM
    assert index.slack(entries[1]) == 1.5 * MAX_GROWTH * GROWTH_FROM - 1


def test_requests_that_come_back_to_a_new_class_are_new_to_it() -> None:
    index = HostIndex(POLICIES["pars"](), PassingLimit(beta=0.5, floor_requests=0))
    entries = [Entry(seq, 0, None) for seq in (9, 7)]
    for entry in entries:
        index.put_back(entry)
    assert [index.slack(entry) for entry in entries] == [0, 0]
    assert [index.pop().seq, index.pop().seq] == [7, 9]


def test_a_request_skipped_in_every_step_leaves_nothing_behind() -> None:
    index = HostIndex(POLICIES["pars"](), PassingLimit(beta=0.0, floor_requests=0))
    skipped = add(index, 0)
    for step in range(1000):
        index.begin_step(float(step))
        assert index.pop() is skipped
        index.put_back(skipped)
    assert index.slack(skipped) == 0
    assert index._classes[0].tree.capacity == MIN_CAPACITY


@pytest.mark.parametrize("field", ["beta", "floor_requests"])
def test_settings_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*>= 0, got -1"):
        PassingLimit(**{field: -1.0})


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, beta=st.sampled_from([0.0, 0.5, 2.0]), floor=st.sampled_from([0.0, 3.0]))
def test_limit_holds_when_steps_are_planned_ahead(seed: int, beta: float, floor: float) -> None:
    """All who go ahead of a waiting request count, older or later, and the queues that were really met."""
    rng = random.Random(seed)
    index = HostIndex(POLICIES["oracle"](), PassingLimit(beta, floor))
    waiting: dict[int, Entry] = {}
    ahead: dict[int, int] = {}
    longest: dict[int, int] = {}  # that a request or a later one met
    seq = overtakes = 0
    for step in range(150):
        for _ in range(rng.choice([0, 1, 4]) if step % 50 < 25 else rng.choice([0, 0, 1])):
            for other in waiting:
                longest[other] = max(longest[other], len(waiting))
            entry = waiting[seq] = Entry(seq, 0, Request(rng.randint(1, 9)))
            ahead[seq], longest[seq] = 0, len(waiting) - 1
            index.add(entry)
            seq += 1
        if waiting and rng.random() < 0.2:
            aborted = rng.choice(list(waiting.values()))
            index.remove(aborted)
            del waiting[aborted.seq]
        index.begin_step(float(step), plan_anew=rng.random() < 0.2)
        for _ in range(min(rng.choice([0, 1, 2, 10]), len(waiting))):
            popped = index.pop()
            del waiting[popped.seq]
            for other in waiting:
                ahead[other] += 1
                overtakes += other < popped.seq
                assert ahead[other] <= (1 + beta) * longest[other] + floor
        index.plan_ahead()
    assert len(index) == len(waiting)
    assert overtakes or beta == floor == 0


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, beta=st.sampled_from([0.0, 0.5]))
def test_who_is_skipped_is_charged_when_the_tree_grows_in_the_midst_of_a_step(seed: int, beta: float) -> None:
    """Those who came after the step was planned get their places in it, once more are asked for."""
    rng = random.Random(seed)
    guard = PassingLimit(beta, floor_requests=100)
    index, reference = HostIndex(POLICIES["oracle"](), guard), ReferencePasses(guard)
    entries: list[Entry] = []
    for step in range(25):
        for _ in range(rng.choice([0, 1, 40]) if len(reference.waiting) < 150 else 0):
            entries.append(Entry(len(entries), 0, Request(rng.randint(1, 9))))
            index.add(entries[-1])
            reference.arrive(entries[-1].seq)
        index.begin_step(float(step))
        index.room = rng.choice([1, 30])
        popped = [index.pop() for _ in range(min(rng.choice([0, 5, 30]), len(reference.waiting)))]
        for entry in popped:
            reference.leave(entry.seq)
        for entry in popped:
            if rng.random() < 0.3:
                index.put_back(entry)
                reference.rejoin(entry.seq)
        for seq in rng.sample(sorted(reference.waiting), min(10, len(reference.waiting))):
            assert index.slack(entries[seq]) == math.floor(reference.remaining(seq) + 1e-9)
        index.plan_ahead()


def test_the_skipped_keep_their_places_in_a_tree_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be copied once for each of them."""
    index = HostIndex(POLICIES["pars"](), PassingLimit())
    for seq in range(60):
        add(index, seq)
    index.plan_ahead()
    for seq in range(60, 200):
        add(index, seq)
    copied = []

    def counted(*arguments: Any) -> Any:
        copied.append(arguments)
        return regrown(*arguments)

    monkeypatch.setattr("pars_fast.priority_class.regrown", counted)
    index.begin_step(0.0)
    skipped = [index.pop() for _ in range(100)]
    for entry in reversed(skipped):
        index.put_back(entry)
    assert [index.pop().seq for _ in range(200)] == list(range(200))
    assert len(copied) <= 2
