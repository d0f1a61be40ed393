"""The promise that the overtaking budget makes; its definition is in `test_random_operations`."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.guards import OvertakingBudget
from pars_fast.host_index import HostIndex
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry

SEEDS = st.integers(0, 2**32 - 1)


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
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta, floor))
    waiting: dict[int, Entry] = {}
    running: list[Entry] = []
    taken: dict[int, float] = {}
    budget: dict[int, float] = {}
    arrived = 0
    while arrived < 300 or waiting:
        for _ in range(rng.choice([0, 0, 1, 6]) if arrived < 300 else 0):
            waiting[arrived] = Entry(arrived, 0, None)
            index.add(waiting[arrived])
            budget[arrived] = index.slack(waiting[arrived])
            arrived += 1
        unscored = [entry for entry in waiting.values() if entry.expected_tokens is None]
        for entry in rng.sample(unscored, min(2, len(unscored))):
            index.set_expected_tokens(entry, rng.lognormvariate(4, 1.5))
        if waiting:
            entry = index.pop()
            del waiting[entry.seq]
            running.append(entry)
            for passed in _older(waiting, entry):
                taken[passed.seq] = taken.get(passed.seq, 0.0) + entry.charged_tokens
                assert taken[passed.seq] <= budget[passed.seq] + 1e-6
        if corrected and running and rng.random() < 0.3:
            entry = running.pop(rng.randrange(len(running)))
            real = int(rng.lognormvariate(4, 1.5)) + 1
            for passed in _older(waiting, entry):
                taken[passed.seq] = taken.get(passed.seq, 0.0) + real - entry.charged_tokens
            index.finish(entry, real)


def _older(waiting: dict[int, Entry], entry: Entry) -> list[Entry]:
    return [other for other in waiting.values() if other.seq < entry.seq]


def test_without_allowance_the_order_is_that_of_arrival() -> None:
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta=0.0, floor_tokens=0.0))
    for seq in range(50):
        entry = Entry(seq, 0, None)
        index.set_expected_tokens(entry, 100.0 - seq)
        index.add(entry)
    assert [index.pop().seq for _ in range(50)] == list(range(50))
    assert index.overtakes == 0


@pytest.mark.parametrize(("floor", "overtakers"), [(0.0, 0), (9.0, 0), (10.0, 1), (95.0, 9)])
def test_the_floor_says_how_much_short_work_goes_ahead(floor: float, overtakers: int) -> None:
    """One long request, then short ones of 10 tokens each: floor // 10 of them pass it."""
    index = HostIndex(POLICIES["pars"](), OvertakingBudget(beta=0.0, floor_tokens=floor))
    for seq in range(50):
        entry = Entry(seq, 0, None)
        index.set_expected_tokens(entry, 1000.0 if seq == 0 else 10.0)
        index.add(entry)
    order = [index.pop().seq for _ in range(50)]
    assert order.index(0) == overtakers
    assert index.overtakes == overtakers
