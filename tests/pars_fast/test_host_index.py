"""The queue's order on the host against a sorted list, and what is never lost."""

import math
import random
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast import waiting_tree
from pars_fast.guards import (
    FixedThreshold,
    Guard,
    IdleQuantum,
    NoGuard,
    OvertakingBudget,
    PassingLimit,
    RelativeAgeing,
    UniBoost,
)
from pars_fast.host_index import MAX_EXPECTED_TOKENS, HostIndex, RunningMedian, warm_up
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry, PriorityClass
from pars_fast.waiting_tree import MIN_CAPACITY

NO_GUARD = OvertakingBudget(beta=0.0, floor_tokens=math.inf)
INITIAL = 128.0


class Request:
    """What policies read of a request."""

    request_id, num_prompt_tokens, num_output_tokens = "a", 3, 0

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens


class ReferenceIndex:
    """Waiting requests in a plain list, sorted anew for every question."""

    def __init__(self, policy: str, ranking: bool) -> None:
        self.policy, self.ranking = policy, ranking
        self.waiting: list[Entry] = []
        self.scores: list[float] = []

    def order(self) -> list[Entry]:
        return sorted(
            self.waiting, key=lambda entry: (entry.priority, entry.lane, self._key(entry), entry.seq)
        )

    def _key(self, entry: Entry) -> float:
        if not self.ranking or self.policy == "fcfs":
            return 0.0
        if self.policy == "oracle":
            return float(entry.payload.max_tokens)
        return self.median() if entry.expected_tokens is None else entry.expected_tokens

    def median(self) -> float:
        return statistics.median_high(self.scores[-511:]) if self.scores else INITIAL


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(["fcfs", "oracle", "pars"]),
    ranking=st.sampled_from([True, True, False]),
    priorities=st.sampled_from([1, 3]),
)
def test_order_equals_a_sorted_list(seed: int, policy: str, ranking: bool, priorities: int) -> None:
    """Arrivals, scores, admissions, skips, preemptions and aborts at random; few keys, so many ties."""
    rng = random.Random(seed)
    index = HostIndex(POLICIES[policy](), NO_GUARD, initial_expected_tokens=INITIAL)
    index.ranking = ranking
    reference = ReferenceIndex(policy, ranking)
    running: list[Entry] = []
    for seq in range(300):
        entry = Entry(seq, rng.randrange(priorities), Request(rng.randint(1, 9)))
        index.add(entry)
        reference.waiting.append(entry)
        for _ in range(rng.randrange(3)):
            _random_operation(rng, index, reference, running)
        assert len(index) == len(reference.waiting)
        if reference.waiting:
            assert index.head() is reference.order()[0]
        if seq % 50 == 0:
            assert list(index) == reference.order()
    remaining = reference.order()
    assert [index.pop() for _ in remaining] == remaining
    assert len(index) == 0


def _random_operation(
    rng: random.Random, index: HostIndex, reference: ReferenceIndex, running: list[Entry]
) -> None:
    waiting = reference.waiting
    operation = rng.choice(["score", "score", "admit", "admit", "skip", "preempt", "abort"])
    if operation == "score" and waiting + running:
        entry, tokens = rng.choice(waiting + running), float(rng.randint(1, 9))
        index.set_expected_tokens(entry, tokens)
        reference.scores.append(tokens)
    elif operation in ("admit", "skip") and waiting:
        head = index.head()
        entry = index.pop()
        assert entry is head is reference.order()[0]
        if operation == "skip":
            index.put_back(entry)
        else:
            waiting.remove(entry)
            running.append(entry)
    elif operation == "preempt" and running:
        entry = running.pop(rng.randrange(len(running)))
        entry.lane = 0
        index.put_back(entry)
        waiting.append(entry)
    elif operation == "abort" and waiting:
        index.remove(waiting.pop(rng.randrange(len(waiting))))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), floor=st.sampled_from([0.0, 50.0, 500.0]))
def test_membership_is_never_lost_under_the_guard(seed: int, floor: float) -> None:
    """Whatever the guard decides: what goes in comes out, once, and the head is what is popped."""
    rng = random.Random(seed)
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta=0.5, floor_tokens=floor))
    inside: set[int] = set()
    running: list[Entry] = []
    out: list[int] = []
    for seq in range(400):
        entry = Entry(seq, rng.randrange(2), None)
        index.add(entry)
        inside.add(seq)
        if rng.random() < 0.7:
            index.set_expected_tokens(entry, rng.lognormvariate(4, 1.5))
        for _ in range(rng.choice([0, 1, 1, 2])):
            if not len(index):
                break
            head = index.head()
            entry = index.pop()
            assert entry is head
            if rng.random() < 0.2:
                index.put_back(entry)
            else:
                running.append(entry)
        if running and rng.random() < 0.8:
            entry = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.2:
                entry.lane = 0
                index.put_back(entry)
            else:
                index.finish(entry, rng.randint(1, 300))
                out.append(entry.seq)
        assert {e.seq for e in index} == inside - {e.seq for e in running} - set(out)
    out += [entry.seq for entry in running] + [index.pop().seq for _ in range(len(index))]
    assert sorted(out) == sorted(inside)


def test_priority_comes_before_everything() -> None:
    index = HostIndex(POLICIES["pars"](), NO_GUARD)
    _add(index, 0, priority=1, expected=1.0)
    _add(index, 1, priority=0, expected=900.0)
    _add(index, 2, priority=-1)
    assert _drain(index) == [2, 1, 0]


def test_a_request_without_a_score_counts_as_the_median() -> None:
    index = HostIndex(POLICIES["pars"](), NO_GUARD)
    for seq, expected in enumerate([10.0, 50.0, None, 90.0, 50.0]):
        _add(index, seq, expected=expected)
    assert _drain(index) == [0, 1, 2, 4, 3]


def test_a_preempted_request_goes_first_in_its_class() -> None:
    index = HostIndex(POLICIES["pars"](), NO_GUARD)
    for seq, expected in enumerate([10.0, 900.0, 20.0]):
        _add(index, seq, expected=expected)
    entries = {entry.seq: entry for entry in index}
    index.pop()
    index.remove(entries[1])
    entries[1].lane = 0
    index.put_back(entries[1])
    _add(index, 3, expected=1.0)
    assert _drain(index) == [1, 3, 2]


def test_a_preempted_request_comes_back_long_after_its_charges_were_forgotten() -> None:
    """The guard forgets what no waiting request can see; a request preempted late was running meanwhile."""
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta=0.0, floor_tokens=50.0))
    old = _add(index, 0, expected=5.0)
    assert index.pop() is old
    for seq in range(1, 3000):
        _add(index, seq, expected=5.0)
        index.pop()
    old.lane = 0
    index.put_back(old)
    _add(index, 3000, expected=1.0)
    _add(index, 3001, expected=1.0)
    assert _drain(index) == [0, 3000, 3001]


def test_a_skipped_request_gives_back_what_it_charged() -> None:
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta=0.0, floor_tokens=10.0))
    _add(index, 0, expected=100.0)
    short = _add(index, 1, expected=10.0)
    for _ in range(5):
        assert index.pop() is short
        index.put_back(short)
    assert _drain(index) == [1, 0]


def test_an_abort_gives_back_what_it_did_not_use() -> None:
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta=0.0, floor_tokens=10.0))
    _add(index, 0, expected=100.0)
    first = _add(index, 1, expected=10.0)
    assert index.pop() is first
    index.finish(first, 0)
    _add(index, 2, expected=10.0)
    assert _drain(index) == [2, 0]


def test_switching_ranking_off_and_on_keeps_scores() -> None:
    index = HostIndex(POLICIES["pars"](), NO_GUARD)
    for seq, expected in enumerate([30.0, 20.0, 10.0]):
        _add(index, seq, expected=expected)
    index.ranking = False
    assert [entry.seq for entry in index] == [0, 1, 2]
    assert index.pop().seq == 0
    index.ranking = True
    assert _drain(index) == [2, 1]


@pytest.mark.parametrize(
    ("expected", "kept"), [(0.0, 1.0), (-5.0, 1.0), (1e12, MAX_EXPECTED_TOKENS), (7.5, 7.5)]
)
def test_expected_tokens_are_clamped(expected: float, kept: float) -> None:
    index = HostIndex(POLICIES["pars"](), NO_GUARD)
    assert _add(index, 0, expected=expected).expected_tokens == kept


@pytest.mark.parametrize("policy", ["fcfs", "oracle"])
def test_an_estimate_does_not_change_a_key_known_from_the_start(policy: str) -> None:
    index = HostIndex(POLICIES[policy](), NO_GUARD)
    _add(index, 0, expected=900.0)
    _add(index, 1, expected=1.0)
    assert _drain(index) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranking=st.sampled_from([True, True, False]),
    priorities=st.sampled_from([1, 2]),
)
def test_a_plan_made_ahead_outlasts_what_comes_before_its_step(
    seed: int, ranking: bool, priorities: int
) -> None:
    """Who was planned goes first, less who was aborted, unless a higher priority came; then all by order."""
    rng = random.Random(seed)
    index = HostIndex(POLICIES["pars"](), NoGuard(), initial_expected_tokens=INITIAL)
    index.ranking = ranking
    reference = ReferenceIndex("pars", ranking)
    seq = 0
    for step in range(60):
        index.plan_ahead()
        planned = reference.order()[: len(index.planned)]
        assert bool(planned) is bool(reference.waiting)
        for _ in range(rng.choice([0, 1, 3, 10])):
            kind = rng.choice(["arrive", "arrive", "score", "abort"])
            if kind == "arrive":
                entry = Entry(seq, rng.randrange(priorities), Request(1))
                seq += 1
                if planned and entry.priority < planned[0].priority:
                    planned = []
                index.add(entry)
                reference.waiting.append(entry)
            elif reference.waiting:
                entry = rng.choice(reference.waiting)
                if kind == "score":
                    reference.scores.append(float(rng.randint(1, 9)))
                    index.set_expected_tokens(entry, reference.scores[-1])
                else:
                    index.remove(entry)
                    reference.waiting.remove(entry)
                    planned = [other for other in planned if other is not entry]
        assert len(index) == len(reference.waiting)
        plan_anew = rng.random() < 0.3
        index.begin_step(float(step), plan_anew=plan_anew)
        first = [] if plan_anew else planned
        expected = first + [entry for entry in reference.order() if entry not in first]
        popped = [index.pop() for _ in range(rng.randint(0, min(12, len(expected))))]
        assert popped == expected[: len(popped)]
        for entry in popped:
            reference.waiting.remove(entry)
        if popped and rng.random() < 0.2:  # the last one is skipped
            index.put_back(popped[-1])
            reference.waiting.append(popped[-1])
    remaining = reference.order()
    index.plan_ahead()
    assert [index.pop() for _ in remaining] == remaining
    assert len(index) == 0


def test_nothing_is_planned_ahead_where_the_order_depends_on_what_happens_until_then() -> None:
    for policy, guard in (("pars", OvertakingBudget()), ("pars", FixedThreshold(60.0)), ("elis", NoGuard())):
        index = HostIndex(POLICIES[policy](), guard)
        _add(index, 0)
        index.plan_ahead()
        assert not index.planned


def test_a_plan_made_ahead_stays_as_it_is_while_nothing_happens() -> None:
    index = HostIndex(POLICIES["pars"](), PassingLimit())
    for seq in range(20):
        _add(index, seq, expected=float(20 - seq))
    index.plan_ahead()
    planned = list(index.planned)
    index._ranked_plan = None  # type: ignore[method-assign, assignment]
    for step in range(3):  # without a free seat
        index.begin_step(float(step))
        index.plan_ahead()
    assert index.planned == planned != []
    assert index.overtakes == 0  # so far nobody was admitted


def test_more_news_than_are_noted_at_a_time_undo_a_plan_made_ahead() -> None:
    index = HostIndex(POLICIES["pars"](), NoGuard())
    _add(index, 0, expected=100.0)
    index.plan_ahead()
    for seq in range(1, 400):
        _add(index, seq, expected=50.0)
    index.begin_step(0.0)
    assert _drain(index) == [*range(1, 400), 0]


def test_a_step_that_skips_a_thousand_requests_plans_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one free seat, and all but the last one of them blocked, as by an adapter or a grammar."""
    index = HostIndex(POLICIES["pars"](), PassingLimit())
    for seq in range(1001):
        _add(index, seq, expected=float(1001 - seq))
    plan_next, plans = PriorityClass.plan_next, 0

    def counted(group: PriorityClass, *arguments: Any) -> Any:
        nonlocal plans
        plans += 1
        return plan_next(group, *arguments)

    monkeypatch.setattr(PriorityClass, "plan_next", counted)
    index.room = 1
    for step in range(2):
        index.begin_step(float(step))
        skipped = [index.pop() for _ in range(1000)]
        assert [entry.seq for entry in skipped] == list(range(1000, 0, -1))
        assert index.head().seq == 0
        for entry in reversed(skipped):
            index.put_back(entry)
        assert index.overtakes == 0
        index.plan_ahead()
    assert plans < 60
    assert _drain(index) == list(range(1000, -1, -1))


def test_who_is_skipped_is_no_admission_and_who_comes_back_later_was_one() -> None:
    index = HostIndex(POLICIES["pars"](), NoGuard())
    _add(index, 0, expected=100.0)
    short = _add(index, 1, expected=10.0)
    for _ in range(2):
        assert index.pop() is short
        assert index.overtakes == 1
        index.put_back(short)
        assert index.overtakes == 0
    assert index.pop() is short
    index.begin_step(0.0)
    index.put_back(short)  # a session's next turn
    assert index.overtakes == 1


@pytest.mark.parametrize(
    "guard", [FixedThreshold(60.0), RelativeAgeing(), UniBoost(), IdleQuantum(1, 1000)], ids=lambda g: g.name
)
def test_who_was_admitted_in_arrival_order_is_not_put_first_afterwards(guard: Guard) -> None:
    index = HostIndex(POLICIES["pars"](), guard)
    for seq in range(3):
        _add(index, seq)
    index.ranking = False
    assert index.pop().seq == 0
    index.ranking = True
    for time_s in (1e6, 2e6):
        index.begin_step(time_s)
    assert _drain(index) == [1, 2]


@pytest.mark.parametrize(("policy", "ranking"), [("pars", False), ("vtc", True)])
@pytest.mark.parametrize("guard", [FixedThreshold(), IdleQuantum()], ids=lambda g: g.name)
def test_a_guard_keeps_nothing_of_those_who_left(guard: Guard, policy: str, ranking: bool) -> None:
    """In arrival order, or under a policy that asks no guard."""
    index = HostIndex(POLICIES[policy](), guard)
    index.ranking = ranking
    for seq in range(1000):
        _add(index, seq)
        index.begin_step(0.0)
        index.pop()
    kept = [value for value in vars(index._classes[0].watch).values() if isinstance(value, list | dict)]
    assert sum(map(len, kept)) < 200


def test_an_empty_index_says_so() -> None:
    index = HostIndex(POLICIES["fcfs"](), NO_GUARD)
    with pytest.raises(IndexError, match="empty queue"):
        index.head()
    with pytest.raises(IndexError, match="empty queue"):
        index.pop()


def test_requests_that_left_leave_no_room_taken() -> None:
    """Scored again and again, skipped in every step, or one after the other: the tree stays small."""
    index = HostIndex(POLICIES["pars"](), NO_GUARD)
    entry = _add(index, 0)
    for score in range(2000):
        index.set_expected_tokens(entry, float(score + 1))
    for step in range(2000):
        index.begin_step(float(step))
        index.put_back(index.pop())
    for seq in range(1, 5000):
        _add(index, seq, expected=float(seq % 7))
        index.begin_step(float(seq))
        index.pop()
    assert index._classes[0].tree.capacity == MIN_CAPACITY
    assert len(index) == 1


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(1, 1e5), min_size=1, max_size=60), window=st.integers(1, 20))
def test_running_median_equals_statistics(values: list[float], window: int) -> None:
    median = RunningMedian(INITIAL, window)
    assert median.value == INITIAL
    for count, value in enumerate(values, start=1):
        median.add(value)
        assert median.value == statistics.median_high(values[max(0, count - window) : count])


def _add(index: HostIndex, seq: int, *, priority: int = 0, expected: float | None = None) -> Entry:
    entry = Entry(seq, priority, Request(max_tokens=100))
    if expected is not None:
        index.set_expected_tokens(entry, expected)
    index.add(entry)
    return entry


def _drain(index: HostIndex) -> list[int]:
    return [index.pop().seq for _ in range(len(index))]


def test_priorities_that_nobody_has_any_more_are_forgotten() -> None:
    """Only between steps: what was popped and is put back within one finds its charges."""
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta=0.0, floor_tokens=10.0))
    for seq in range(1000):
        _add(index, seq, priority=seq, expected=5.0)
        index.begin_step(0.0)
        index.pop()
    assert len(index._classes) <= 2
    assert len(index._priorities) <= 2


def test_a_charge_of_a_forgotten_class_changes_nothing() -> None:
    """A request that runs outlives its class; what it makes then concerns nobody in the new one."""
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta=0.0, floor_tokens=10.0))
    _add(index, 0, priority=1, expected=100.0)
    _add(index, 1, priority=1, expected=10.0)
    short, long = index.pop(), index.pop()
    assert (short.seq, long.seq) == (1, 0)
    _add(index, 2)
    index.begin_step(0.0)  # priority 1 is forgotten, 0 is not
    index.put_back(long)  # a session's next turn, with the budget it had
    index.finish(short, 0)  # would give back 10 tokens that its new watch never took
    assert index.slack(long) == 10.0
    short.lane = 0
    index.put_back(short)
    assert _drain(index) == [2, 1, 0]


def test_after_the_warm_up_nothing_is_compiled_while_requests_wait() -> None:
    """Else the first step of an engine would take seconds."""
    warm_up.cache_clear()
    warm_up()
    names = ("apply", "plan", "take", "undo", "slack_of", "_copy")  # what is called from Python
    compiled = [getattr(waiting_tree, name) for name in names]
    before = [list(function.signatures) for function in compiled]
    assert all(before)
    for guard in (PassingLimit(), OvertakingBudget(), NoGuard(), FixedThreshold(0.0)):
        index = HostIndex(POLICIES["pars"](), guard, device_order_min_waiting=1)
        entries = [_add(index, seq, expected=float(seq % 5 + 1) if seq % 3 else None) for seq in range(200)]
        index.set_device_order([1, 2])
        for step in range(40):
            index.begin_step(1e3 * step)
            entry = index.pop()
            index.head()
            if step % 2:
                index.put_back(entry)
            else:
                index.finish(entry, 7)
        index.ranking = False
        index.remove(index.head())
        assert index.slack(entries[-1]) > 0
    assert [list(function.signatures) for function in compiled] == before


def test_a_devices_order_is_left_alone_while_too_few_wait() -> None:
    """To take it over costs more than it saves, and what is planned ahead would have to be planned anew."""
    index = HostIndex(POLICIES["pars"](), PassingLimit(), device_order_min_waiting=4)
    for seq in range(3):
        _add(index, seq, expected=float(seq + 1))
    index.begin_step(0.0)
    index.head()
    planned = list(index.planned)
    index.set_device_order([2, 1, 0])
    assert index.planned == planned
    assert not len(index._hint)
    _add(index, 3, expected=4.0)
    index.set_device_order([2, 1, 0])
    assert index._hint.tolist() == [2, 1, 0]
