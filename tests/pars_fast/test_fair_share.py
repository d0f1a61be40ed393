"""Virtual time against a fluid that is shared step by step, and the delay bound that follows from it."""

import heapq
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.policies.fair_share import FairShare
from pars_fast.simulation.fairness import ideal_finish_s

# (time of arrival, demand), whole numbers so that the reference is exact
ARRIVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 50)), min_size=1, max_size=25).map(sorted)


def fluid_finish(arrivals: list[tuple[int, int]], rate: int) -> list[Fraction]:
    """Finish times in the fluid: everybody's rest shrinks alike until the next one is empty or arrives."""
    rest: dict[int, Fraction] = {}
    finish: dict[int, Fraction] = {}
    now, coming = Fraction(0), 0
    while len(finish) < len(arrivals):
        while coming < len(arrivals) and arrivals[coming][0] <= now:
            rest[coming] = Fraction(arrivals[coming][1])
            coming += 1
        until = Fraction(arrivals[coming][0]) if coming < len(arrivals) else None
        if rest:
            done = now + min(rest.values()) * len(rest) / rate
            until = done if until is None else min(until, done)
        assert until is not None
        for number in rest:
            rest[number] -= (until - now) * rate / len(rest)
        now = until
        for number in [number for number, left in rest.items() if left == 0]:
            del rest[number]
            finish[number] = now
    return [finish[number] for number in range(len(arrivals))]


@given(arrivals=ARRIVALS, rate=st.integers(1, 7))
def test_finish_times_are_those_of_the_fluid(arrivals: list[tuple[int, int]], rate: int) -> None:
    times, demands = (np.array(column, np.float64) for column in zip(*arrivals, strict=True))
    expected = [float(time) for time in fluid_finish(arrivals, rate)]
    np.testing.assert_allclose(ideal_finish_s(times, demands, rate), expected, rtol=1e-9, atol=1e-9)


@given(arrivals=ARRIVALS, rate=st.integers(1, 7))
def test_the_order_at_arrival_is_the_order_of_finishing(arrivals: list[tuple[int, int]], rate: int) -> None:
    """Whoever comes later; equal virtual finish times finish together."""
    expected = fluid_finish(arrivals, rate)
    virtual = virtual_finish(arrivals, rate)
    for first in range(len(arrivals)):
        for second in range(len(arrivals)):
            if virtual[first] < virtual[second] - 1e-6:
                assert expected[first] <= expected[second]


def virtual_finish(arrivals: list[tuple[int, int]], rate: int) -> list[float]:
    share, now, finish = FairShare(), 0, []
    for number, (time, demand) in enumerate(arrivals):
        share.serve((time - now) * rate)
        now = time
        finish.append(share.join(str(number), demand))
    return finish


TASKS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
JOBS = st.lists(st.tuples(st.integers(0, 40), TASKS), min_size=1, max_size=20).map(sorted)


@settings(max_examples=300)
@given(jobs=JOBS, slots=st.integers(1, 5))
def test_nobody_finishes_two_tasks_later_than_in_the_ideal(
    jobs: list[tuple[int, list[int]]], slots: int
) -> None:
    """The server of `docs/fairness.md`: slots that take a task each, to its end, by virtual finish time."""
    arrivals = [(time, sum(tasks)) for time, tasks in jobs]
    ideal = fluid_finish(arrivals, slots)
    finished = serve(jobs, virtual_finish(arrivals, slots), slots)
    longest = max(max(tasks) for _, tasks in jobs)
    assert max(late - float(soon) for late, soon in zip(finished, ideal, strict=True)) <= 2 * longest + 1e-9


def serve(jobs: list[tuple[int, list[int]]], order: list[float], slots: int) -> list[float]:
    """When each job's last task ends if free slots take the waiting task of the lowest `order`."""
    waiting: list[tuple[float, int, int]] = []  # heap of (order, job, length)
    free_at = [0.0] * slots
    finished, coming = [0.0] * len(jobs), 0
    while coming < len(jobs) or waiting:
        now = heapq.heappop(free_at)
        if not waiting and coming < len(jobs):
            now = max(now, jobs[coming][0])
        while coming < len(jobs) and jobs[coming][0] <= now:
            for length in jobs[coming][1]:
                heapq.heappush(waiting, (order[coming], coming, length))
            coming += 1
        if waiting:
            _, job, length = heapq.heappop(waiting)
            now += length
            finished[job] = max(finished[job], now)
        heapq.heappush(free_at, now)
    return finished


def test_arrival_order_breaks_the_bound() -> None:
    """Else the property would show nothing: a short job behind a long one of many tasks."""
    jobs = [(0, [9] * 6), (0, [9] * 6), (1, [1])]
    ideal = fluid_finish([(time, sum(tasks)) for time, tasks in jobs], 1)
    finished = serve(jobs, [0.0, 0.0, 1.0], 1)
    assert finished[2] - float(ideal[2]) > 2 * 9


def test_what_nobody_demands_is_dropped() -> None:
    share = FairShare()
    share.join("a", 10.0)
    assert share.serve(1000.0) == ["a"]
    assert (len(share), share.virtual_time) == (0, 10.0)
    assert share.until_next() == float("inf")
    assert share.join("b", 5.0) == 15.0


def test_a_share_that_is_served_in_part() -> None:
    share = FairShare()
    share.join("a", 10.0)
    share.join("b", 30.0)
    assert share.serve(12.0) == []
    assert share.virtual_time == pytest.approx(6.0)
    assert share.serve(8.0) == ["a"]
    assert share.serve(19.0) == []
    assert share.serve(1.0) == ["b"]


def test_whoever_needs_less_than_it_said_leaves_earlier() -> None:
    """At once if the ideal has given it that much already, and it may come back."""
    share = FairShare()
    a, b = share.join("a", 100.0), share.join("b", 30.0)
    share.serve(20.0)
    share.move("a", 25.0)
    assert share.serve(30.0) == ["a"]
    assert share.virtual_time == 25.0
    share.move("a", a)
    assert share.serve(10.0) == ["b"]
    assert share.virtual_time == b == 30.0
    share.move("a", 30.0)
    assert (len(share), share.until_next(), share.serve(10.0)) == (0, float("inf"), [])


def test_nothing_is_kept_of_those_that_left_early() -> None:
    share = FairShare()
    share.join("for ever", 1e12)
    for number in range(5000):
        share.join(str(number), 1e6)
        share.move(str(number), 0.0)
    assert len(share) == 1
    assert len(share._next) < 200
