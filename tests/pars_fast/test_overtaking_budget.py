"""The overtaking budget against its definition, and the promise it makes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.guards import Moment, OvertakingBudget
from pars_fast.guards.charges import _BLOCK
from pars_fast.guards.overtaking_budget import Budgets
from pars_fast.host_index import Entry, HostIndex
from pars_fast.policies import POLICIES

NOW = Moment()
SEEDS = st.integers(0, 2**32 - 1)


class ReferenceBudget:
    """The definition, summed anew for every question. Tokens are whole, so floats compare exactly."""

    def __init__(self, guard: OvertakingBudget) -> None:
        self.guard = guard
        self.budget: dict[int, float] = {}
        self.charges: list[tuple[int, float]] = []

    def arrive(self, seq: int, tokens_ahead: float) -> float:
        self.budget[seq] = self.guard.floor_tokens + self.guard.beta * tokens_ahead
        return self.budget[seq]

    def remaining(self, seq: int) -> float:
        return self.budget[seq] - sum(tokens for other, tokens in self.charges if other > seq)

    def blocked_by(self, seq: int, tokens: float) -> int | None:
        older = (other for other in self.budget if other < seq and self.remaining(other) < tokens)
        return min(older, default=None)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, stride=st.sampled_from([1, 3, _BLOCK - 1, _BLOCK + 1]))
def test_budget_equals_its_definition(seed: int, stride: int) -> None:
    """Random steps of arrivals, admissions, skips, aborts and corrections.

    `stride` spreads `seq`, as other priority classes do, so that blocks are crossed, left empty and
    forgotten; 250 steps leave far more than the 64 stale looks that start a clean-up.
    """
    rng = random.Random(seed)
    guard = OvertakingBudget(beta=0.5, floor_tokens=rng.choice([0.0, 200.0, 5000.0]))
    budget, reference = Budgets(guard), ReferenceBudget(guard)
    entries: dict[int, Entry] = {}
    seq = 0
    for _ in range(250):
        for _ in range(rng.randrange(3)):
            seq += rng.randint(1, stride)
            ahead = float(rng.randrange(1000))
            entries[seq] = Entry(seq, 0, None)
            budget.arrive(entries[seq], ahead, NOW)
            assert entries[seq].budget == reference.arrive(seq, ahead)
        _random_step(rng, entries, budget, reference)
        assert len(budget) == len(reference.budget)
    for waiting in reference.budget:
        assert budget.remaining(waiting) == reference.remaining(waiting)


def _random_step(
    rng: random.Random, entries: dict[int, Entry], budget: Budgets, reference: ReferenceBudget
) -> None:
    """What happens between two arrivals: undoing an admission is only allowed before the next one."""
    skipped: list[tuple[int, float]] = []
    for _ in range(rng.randrange(4)):
        if not reference.budget:
            break
        seq, tokens = rng.choice(list(reference.budget)), float(rng.randint(1, 400))
        assert budget.ahead_of(seq, tokens, NOW) == reference.blocked_by(seq, tokens)
        left = reference.budget.pop(seq)
        budget.leave(seq)
        if rng.random() < 0.2:
            continue  # aborted
        _charge(seq, tokens, budget, reference)
        if rng.random() < 0.3:
            _charge(seq, -tokens, budget, reference)
            skipped.append((seq, left))
    for seq, left in skipped:
        budget.rejoin(entries[seq], NOW)
        reference.budget[seq] = left
    if reference.charges and rng.random() < 0.5:
        _charge(rng.choice(reference.charges)[0], float(rng.randint(-50, 50)), budget, reference)


def _charge(seq: int, tokens: float, budget: Budgets, reference: ReferenceBudget) -> None:
    budget.charge(seq, tokens)
    reference.charges.append((seq, tokens))


def test_charges_reach_across_a_block_boundary() -> None:
    budget = Budgets(OvertakingBudget(beta=0.0, floor_tokens=100.0))
    for seq in (_BLOCK - 2, _BLOCK - 1, _BLOCK, 2 * _BLOCK):
        budget.arrive(Entry(seq, 0, None), 0.0, NOW)
    budget.charge(_BLOCK, 30.0)
    assert [budget.remaining(s) for s in (_BLOCK - 2, _BLOCK - 1, _BLOCK, 2 * _BLOCK)] == [
        70.0,
        70.0,
        100.0,
        100.0,
    ]
    assert budget.ahead_of(2 * _BLOCK, 70.0, NOW) is None
    assert budget.ahead_of(2 * _BLOCK, 71.0, NOW) == _BLOCK - 2


def test_a_request_that_comes_back_after_its_block_was_forgotten() -> None:
    """It sees the charges that are still kept, and nothing breaks."""
    budget = Budgets(OvertakingBudget(beta=0.0, floor_tokens=100.0))
    last = 5 * _BLOCK
    for seq in range(last):
        budget.arrive(Entry(seq, 0, None), 0.0, NOW)
        budget.leave(seq)
    budget.rejoin(Entry(0, 0, None, budget=100.0), NOW)
    assert budget.remaining(0) == 100.0
    budget.charge(last, 40.0)
    assert budget.remaining(0) == 60.0
    assert budget.ahead_of(last + 1, 61.0, NOW) == 0


def test_a_request_skipped_in_every_step_leaves_nothing_behind() -> None:
    """An overdrawn request that waits for a grammar is popped and put back for as long as that takes."""
    budget = Budgets(OvertakingBudget(beta=0.0, floor_tokens=0.0))
    skipped = Entry(0, 0, None)
    budget.arrive(skipped, 0.0, NOW)
    budget.arrive(Entry(1, 0, None), 0.0, NOW)
    for _ in range(1000):
        assert budget.ahead_of(1, 5.0, NOW) == 0
        budget.leave(0)
        budget.rejoin(skipped, NOW)
    assert len(budget._near) <= 2


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    beta=st.sampled_from([0.0, 0.3, 2.0]),
    floor=st.sampled_from([0.0, 150.0, 2000.0]),
    corrected=st.booleans(),
)
def test_later_arrivals_never_take_more_than_the_budget(
    seed: int, beta: float, floor: float, corrected: bool
) -> None:
    """The promise, counted anew at every admission: whoever is passed can pay for it.

    `corrected`: finished requests turn their charge into the tokens they really made, which may overdraw a
    budget after the fact; even then nobody passes the overdrawn request.
    """
    rng = random.Random(seed)
    index = HostIndex(POLICIES["pars_fast"](), OvertakingBudget(beta, floor))
    waiting: dict[int, Entry] = {}
    running: list[Entry] = []
    taken: dict[int, float] = {}
    arrived = 0
    while arrived < 300 or waiting:
        for _ in range(rng.choice([0, 0, 1, 6]) if arrived < 300 else 0):
            waiting[arrived] = Entry(arrived, 0, None)
            index.add(waiting[arrived])
            arrived += 1
        unscored = [entry for entry in waiting.values() if entry.expected_tokens is None]
        for entry in rng.sample(unscored, min(2, len(unscored))):
            index.set_expected_tokens(entry, rng.lognormvariate(4, 1.5))
        if waiting:
            entry = index.pop()
            del waiting[entry.seq]
            running.append(entry)
            for passed in _older(waiting, entry):
                assert entry.charged_tokens is not None
                taken[passed.seq] = taken.get(passed.seq, 0.0) + entry.charged_tokens
                assert taken[passed.seq] <= passed.budget + 1e-6
        if corrected and running and rng.random() < 0.3:
            entry = running.pop(rng.randrange(len(running)))
            assert entry.charged_tokens is not None
            real = int(rng.lognormvariate(4, 1.5)) + 1
            for passed in _older(waiting, entry):
                taken[passed.seq] = taken.get(passed.seq, 0.0) + real - entry.charged_tokens
            index.finish(entry, real)


def _older(waiting: dict[int, Entry], entry: Entry) -> list[Entry]:
    return [other for other in waiting.values() if other.seq < entry.seq]


def test_without_allowance_the_order_is_that_of_arrival() -> None:
    index = HostIndex(POLICIES["pars_fast"](), OvertakingBudget(beta=0.0, floor_tokens=0.0))
    for seq in range(50):
        entry = Entry(seq, 0, None)
        index.set_expected_tokens(entry, 100.0 - seq)
        index.add(entry)
    assert [index.pop().seq for _ in range(50)] == list(range(50))
    assert index.overtakes == 0


@pytest.mark.parametrize(("floor", "overtakers"), [(0.0, 0), (9.0, 0), (10.0, 1), (95.0, 9)])
def test_the_floor_says_how_much_short_work_goes_ahead(floor: float, overtakers: int) -> None:
    """One long request, then short ones of 10 tokens each: floor // 10 of them pass it."""
    index = HostIndex(POLICIES["pars_fast"](), OvertakingBudget(beta=0.0, floor_tokens=floor))
    for seq in range(50):
        entry = Entry(seq, 0, None)
        index.set_expected_tokens(entry, 1000.0 if seq == 0 else 10.0)
        index.add(entry)
    order = [index.pop().seq for _ in range(50)]
    assert order.index(0) == overtakers
    assert index.overtakes == overtakers
