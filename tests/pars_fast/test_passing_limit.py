"""The limit on passing against its definition, and the promise it makes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.guards import Moment, PassingLimit
from pars_fast.guards.passing_limit import GROWTH_FROM, MAX_GROWTH, Passes
from pars_fast.host_index import Entry, HostIndex
from pars_fast.policies import POLICIES

NOW = Moment()
SEEDS = st.integers(0, 2**32 - 1)


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
@given(seed=SEEDS, beta=st.sampled_from([0.0, 0.5, 2.0]), floor=st.sampled_from([0, 3]))
def test_limit_equals_its_definition(seed: int, beta: float, floor: int) -> None:
    """Random steps of arrivals, admissions, skips and aborts; `seq` has gaps, as with other priorities."""
    rng = random.Random(seed)
    guard = PassingLimit(beta, floor)
    passes, reference = Passes(guard), ReferencePasses(guard)
    entries: dict[int, Entry] = {}
    seq = 0
    for step in range(200):
        busy = step % 50 < 25  # the queue grows, and then is emptied
        for _ in range(rng.choice([0, 1, 4]) if busy else rng.choice([0, 0, 1])):
            seq += rng.randint(1, 3)
            entries[seq] = Entry(seq, 0, None)
            passes.arrive(entries[seq], 0.0, NOW)
            reference.arrive(seq)
        skipped = []
        for _ in range(rng.randrange(4)):
            if not reference.waiting:
                break
            chosen = rng.choice(sorted(reference.waiting))
            assert passes.ahead_of(chosen, 7.0, NOW) == reference.blocked_by(chosen)
            passes.leave(chosen)
            reference.leave(chosen)
            if rng.random() < 0.3:
                skipped.append(chosen)
        for chosen in skipped:
            passes.rejoin(entries[chosen], NOW)
            reference.rejoin(chosen)
        for waiting in reference.waiting:
            assert passes.remaining(waiting) == reference.remaining(waiting)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, beta=st.sampled_from([0.0, 0.3, 2.0]), floor=st.sampled_from([0, 5]))
def test_nobody_has_more_requests_ahead_than_the_limit(seed: int, beta: float, floor: int) -> None:
    """The promise, whatever the scores: counted at every admission for all that wait."""
    rng = random.Random(seed)
    index = HostIndex(POLICIES["pars_fast"](), PassingLimit(beta, floor))
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
        for entry in rng.sample(unscored, min(2, len(unscored))):
            index.set_expected_tokens(entry, rng.lognormvariate(4, 1.5))
        if waiting:
            entry = index.pop()
            del waiting[entry.seq]
            for seq in waiting:
                admitted_since[seq] += 1
            assert admitted_since[entry.seq] <= floor + (1 + beta) * longest_since[entry.seq]


@pytest.mark.parametrize(("floor", "overtakers"), [(0, 0), (0.9, 0), (3, 3)])
def test_the_floor_says_how_many_pass_a_lone_request(floor: float, overtakers: int) -> None:
    index = HostIndex(POLICIES["pars_fast"](), PassingLimit(0.0, floor))
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


def test_a_longer_queue_later_lets_more_pass() -> None:
    passes = Passes(PassingLimit(beta=0.5, floor_requests=0))
    passes.arrive(Entry(0, 0, None), 0.0, NOW)
    assert passes.remaining(0) == 0
    for seq in range(1, 5):
        passes.arrive(Entry(seq, 0, None), 0.0, NOW)
    assert passes.remaining(0) == 6  # 1.5 times the four that the last one met
    assert passes.remaining(4) == 2
    for seq in range(4, 0, -1):
        passes.leave(seq)
    assert passes.remaining(0) == 2
    passes.arrive(Entry(5, 0, None), 0.0, NOW)
    assert passes.remaining(5) == 1.5 - 1


def test_the_limit_does_not_grow_for_ever() -> None:
    passes = Passes(PassingLimit(beta=0.5, floor_requests=0))
    for seq in range(MAX_GROWTH * GROWTH_FROM + 500):
        passes.arrive(Entry(seq, 0, None), 0.0, NOW)
    assert passes.remaining(0) == 1.5 * MAX_GROWTH * GROWTH_FROM
    assert passes.remaining(1) == 1.5 * MAX_GROWTH * GROWTH_FROM - 1


def test_requests_that_come_back_to_a_new_watch_are_new_to_it() -> None:
    passes = Passes(PassingLimit(beta=0.5, floor_requests=0))
    for seq in (7, 9):
        passes.rejoin(Entry(seq, 0, None), NOW)
    assert [passes.remaining(7), passes.remaining(9)] == [1.5, 0.5]
    assert passes.ahead_of(9, 1.0, NOW) is None


def test_a_request_skipped_in_every_step_leaves_nothing_behind() -> None:
    passes = Passes(PassingLimit(beta=0.0, floor_requests=0))
    skipped = Entry(0, 0, None)
    passes.arrive(skipped, 0.0, NOW)
    for _ in range(1000):
        passes.leave(0)
        passes.rejoin(skipped, NOW)
        assert passes.ahead_of(0, 5.0, NOW) is None
    assert len(passes._far) < 100


@pytest.mark.parametrize("field", ["beta", "floor_requests"])
def test_settings_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*>= 0, got -1"):
        PassingLimit(**{field: -1.0})
