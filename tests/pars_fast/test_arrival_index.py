"""What the queue falls back to: plain arrival order, within priority and lane."""

import random

import pytest

from pars_fast.arrival_index import ArrivalIndex
from pars_fast.priority_class import Entry


def test_order_is_that_of_arrival_within_priority_and_lane() -> None:
    rng = random.Random(0)
    entries = [Entry(seq, rng.randrange(3), None, lane=rng.choice((0, 1))) for seq in range(60)]
    index = ArrivalIndex(entries[:20])
    for entry in entries[20:]:
        index.add(entry)
    gone = rng.sample(entries, 10)
    for entry in gone:
        index.remove(entry)
    expected = sorted((e for e in entries if e not in gone), key=lambda e: (e.priority, e.lane, e.seq))
    assert list(index) == expected
    index.begin_step(5.0)
    assert index.head() is expected[0]
    assert [index.pop() for _ in expected] == expected
    assert not any(entry.waiting for entry in entries)
    assert {entry.admitted_s for entry in expected if entry.lane} == {5.0}


def test_an_empty_one_says_so() -> None:
    index = ArrivalIndex([])
    assert len(index) == 0
    for method in (index.head, index.pop):
        with pytest.raises(IndexError):
            method()
