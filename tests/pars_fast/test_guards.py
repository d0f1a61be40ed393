"""Each guard against its definition, asked anew of every waiting request; names and settings as text."""

import math
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.guards import (
    GUARDS,
    FixedThreshold,
    Guard,
    IdleQuantum,
    NoGuard,
    OvertakingBudget,
    PassingLimit,
    RelativeAgeing,
    UniBoost,
    guard_text,
    parse_guard,
)
from pars_fast.host_index import HostIndex
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry

SEEDS = st.integers(0, 2**32 - 1)
TYPICAL = 128.0


def key(entry: Entry) -> tuple[float, int]:
    return (entry.expected_tokens or TYPICAL, entry.seq)


def shortest(waiting: list[Entry]) -> Entry:
    return min(waiting, key=key)


def fixed_threshold(guard: FixedThreshold, waiting: list[Entry], time_s: float, step: int) -> Entry:
    due = [entry for entry in waiting if entry.arrival_s + guard.seconds <= time_s]
    return min(due, key=lambda entry: entry.seq) if due else shortest(waiting)


def relative_ageing(guard: RelativeAgeing, waiting: list[Entry], time_s: float, step: int) -> Entry:
    def deadline(entry: Entry) -> tuple[float, int]:
        return (entry.arrival_s + guard.s_per_token * key(entry)[0], entry.seq)

    first = min(waiting, key=deadline)
    return first if deadline(first)[0] <= time_s else shortest(waiting)


def uniboost(guard: UniBoost, waiting: list[Entry], time_s: float, step: int) -> Entry:
    return min(waiting, key=lambda entry: (entry.arrival_s + guard.knob * math.log(key(entry)[0]), entry.seq))


def idle_quantum(guard: IdleQuantum, waiting: list[Entry], time_s: float, step: int) -> Entry:
    period = guard.idle_steps + guard.quantum_steps
    promoted = [e for e in waiting if (step - e.arrival_step) % period >= guard.idle_steps]
    return shortest(promoted or waiting)


def none(guard: NoGuard, waiting: list[Entry], time_s: float, step: int) -> Entry:
    return shortest(waiting)


DEFINITIONS: list[tuple[Guard, Callable[..., Entry]]] = [
    (NoGuard(), none),
    (FixedThreshold(0.0), fixed_threshold),
    (FixedThreshold(9.0), fixed_threshold),
    (RelativeAgeing(0.05), relative_ageing),
    (RelativeAgeing(1.0), relative_ageing),
    (UniBoost(0.0), uniboost),
    (UniBoost(5.0), uniboost),
    (UniBoost(1e6), uniboost),
    (IdleQuantum(1, 1), idle_quantum),
    (IdleQuantum(5, 2), idle_quantum),
    (IdleQuantum(20, 1000), idle_quantum),
]


@pytest.mark.parametrize(
    ("guard", "definition"), DEFINITIONS, ids=lambda value: getattr(value, "__name__", str(value))
)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_a_guard_equals_its_definition(guard: Guard, definition: Callable[..., Entry], seed: int) -> None:
    """Arrivals, scores, admissions, skips and aborts at random, in steps of random length; many ties.

    Half of the requests are scored before they arrive and half later, so that each counts as typical for a
    while; the median of the scores is the typical length throughout.
    """
    rng = random.Random(seed)
    index = HostIndex(POLICIES["pars"](), guard, initial_expected_tokens=TYPICAL)
    waiting: list[Entry] = []
    time_s, seq = 0.0, 0
    for step in range(1, 160):
        time_s += rng.choice([0.0, 0.25, 1.0, 8.0])
        for _ in range(rng.choice([0, 0, 1, 4]) if step < 120 else 0):
            entry = Entry(seq, 0, None, arrival_s=time_s)
            waiting.append(entry)
            index.add(entry)
            seq += 1
        unscored = [entry for entry in waiting if entry.expected_tokens is None]
        for entry in rng.sample(unscored, min(2, len(unscored))):
            _score(index, entry, rng)
        index.begin_step(time_s)
        for _ in range(rng.choice([0, 1, 2])):
            if waiting:
                head = index.head()
                assert head is definition(guard, waiting, time_s, step)
                assert index.pop() is head
                if rng.random() < 0.2:
                    index.put_back(head)
                else:
                    waiting.remove(head)
        if waiting and rng.random() < 0.1:
            index.remove(waiting.pop(rng.randrange(len(waiting))))
    while waiting:
        waiting.remove(index.pop())
    assert len(index) == 0


def _score(index: HostIndex, entry: Entry, rng: random.Random) -> None:
    """Two scores at once, on both sides of the typical one, keep it where it is."""
    low = float(rng.choice([1, 10, 60]))
    for tokens in (TYPICAL, low):
        index.set_expected_tokens(entry, tokens)
        index._now.typical_tokens = index._median.value = TYPICAL
    if rng.random() < 0.5:
        index.set_expected_tokens(entry, 4 * low + 100)
        index._now.typical_tokens = index._median.value = TYPICAL


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", GUARDS)
def test_each_guard_goes_with_each_policy(name: str, policy: str) -> None:
    """What goes in comes out, once."""

    class Request:
        request_id, priority, max_tokens, num_prompt_tokens, num_output_tokens = "a", 0, 50, 3, 0

    index = HostIndex(POLICIES[policy](), GUARDS[name]())
    for seq in range(40):
        entry = Entry(seq, 0, Request(), arrival_s=float(seq))
        index.add(entry)
        index.set_expected_tokens(entry, 100.0 - seq)
    out = []
    for step in range(40):
        index.begin_step(10.0 * step)
        out.append(index.pop().seq)
    assert sorted(out) == list(range(40))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, guard=st.sampled_from([FixedThreshold(3.0), RelativeAgeing(0.02)]))
def test_a_threshold_bounds_every_wait(seed: int, guard: Guard) -> None:
    """One request a second comes and goes, so nobody waits longer than the threshold and the queue it met."""
    rng = random.Random(seed)
    index = HostIndex(POLICIES["pars"](), guard)
    backlog = 20
    for seq in range(200):
        entry = Entry(seq, 0, None, arrival_s=float(seq))
        index.add(entry)
        index.set_expected_tokens(entry, float(rng.choice([5, 50, 400])))
        if seq >= backlog:
            index.begin_step(float(seq))
            served = index.pop()
            threshold = 3.0 if isinstance(guard, FixedThreshold) else 0.02 * index.expected(served)
            assert seq - served.arrival_s <= threshold + backlog + 8.0  # 0.02 s of the longest answer


def test_settings_as_text() -> None:
    guards: list[Guard] = [NoGuard(), FixedThreshold(60.0), IdleQuantum(100, 5), RelativeAgeing(0.0123456789),
              UniBoost(2.5), OvertakingBudget(0.25, 1000.0), PassingLimit(0.25, 8.0)]
    assert [parse_guard(guard_text(guard)) for guard in guards] == guards
    assert guard_text(OvertakingBudget()) == "overtaking_budget:beta=0.5,floor_tokens=2000"
    assert guard_text(NoGuard()) == "none"
    assert [parse_guard(name) for name in GUARDS] == [guard() for guard in GUARDS.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one of none, fixed_threshold, idle_quantum, relative_ageing, uniboost, overtaking_budget, "),
        ("fixed_threshold:", None),
        ("fixed_threshold:seconds", "fixed_threshold with seconds as a number, not ''"),
        ("fixed_threshold:seconds=-1", "fixed_threshold with another value: seconds must be >= 0, got -1"),
        ("relative_ageing:s_per_token=nan", "s_per_token must be >= 0, got nan"),
        ("uniboost:knob=inf", "knob must be finite and >= 0, got inf"),
        ("idle_quantum:idle_steps=1.5", "idle_quantum with idle_steps as a whole number, not '1.5'"),
        ("idle_quantum:quantum_steps=0", "quantum_steps must be a whole number >= 1, got 0"),
        ("overtaking_budget:alpha=1", "overtaking_budget with beta, floor_tokens, not 'alpha'"),
        ("overtaking_budget:beta=-1", "beta must be finite and >= 0, got -1"),
        ("overtaking_budget:floor_tokens=-1", "floor_tokens must be >= 0, got -1"),
    ],
)
def test_a_wrong_text_says_what_would_be_right(text: str, message: str | None) -> None:
    if message is None:
        assert parse_guard(text) == FixedThreshold()
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_guard(text)


def test_the_policy_changes_only_while_nothing_waits() -> None:
    index = HostIndex(POLICIES["pars"]())
    assert index.guard == FixedThreshold()
    index.add(Entry(0, 0, None))
    with pytest.raises(ValueError, match="the policy can change only while nothing waits"):
        index.set_policy(POLICIES["pars"]())
    index.pop()
    index.set_policy(POLICIES["pars"](), NoGuard())
    assert type(index.policy) is POLICIES["pars"]
    assert index.guard.name == "none"


def test_heaps_of_a_request_skipped_in_every_step_stay_small() -> None:
    for guard in (FixedThreshold(0.0), IdleQuantum(1, 1)):
        index = HostIndex(POLICIES["pars"](), guard)
        for seq in range(2):
            index.add(Entry(seq, 0, None))
        for step in range(2000):
            index.begin_step(float(step))
            index.put_back(index.pop())
        watch = index._classes[0].watch
        assert watch is not None
        assert sum(len(v) for v in vars(watch).values() if isinstance(v, list)) < 200
