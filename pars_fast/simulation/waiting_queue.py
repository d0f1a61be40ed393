"""The waiting queues of many engines in flat arrays: `HostIndex` and the guards, compiled.

The order is `HostIndex`'s: preempted requests first, then the lowest key, a request without a score having
the running median; the guard may put another request ahead. Requests are numbered in order of arrival, which
is `seq`. All arrays are by request, except those named `..._of` which are by engine. Per engine there is one
chain of all its arrivals (`after`), along which the oldest waiting one and the oldest without a score move.
Prompts go to the ranker as `RankingLoop` hands them over.

A guard keeps each waiting request in one of two heaps, `later` and `urgent`, which share their links:

| guard | `later`, by | `urgent`, by |
|---|---|---|
| fixed_threshold, relative_ageing, uniboost | time at which it goes first | |
| idle_quantum | step of its next promotion | promoted, by expected tokens |
| overtaking_budget | total charge at which it must be looked at | short of budget, by arrival |

Where this differs from the live guards: a score that comes late moves a request at its next promotion only
(idle_quantum), and requests without a score go by arrival among themselves (the three by time).
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from pars_fast.guards import (
    FixedThreshold,
    Guard,
    IdleQuantum,
    NoGuard,
    OvertakingBudget,
    RelativeAgeing,
    UniBoost,
)
from pars_fast.host_index import MAX_EXPECTED_TOKENS
from pars_fast.simulation.arrays import Flags, Floats, Ints
from pars_fast.simulation.heaps import EMPTY, meld, pop

NO_GUARD, FIXED_THRESHOLD, RELATIVE_AGEING, UNIBOOST, IDLE_QUANTUM, OVERTAKING_BUDGET = range(6)
INITIAL_MEDIAN = 128.0
MEDIAN_WINDOW = 511
MAX_IN_FLIGHT = 8  # as in `integration/ranking_loop.py`
_FIRST_CAPACITY = 64  # of an engine's tree


class Order(NamedTuple):
    """What orders the queue. `a` and `b` are the guard's two settings, in the order of its fields."""

    guard: int
    a: float
    b: float
    score_delay_s: float  # of a ranker, from handing prompts over
    uses_ranker: bool  # keys come with scores; else both are known at arrival, if there are any


class Queue(NamedTuple):
    """The state; `EMPTY` ends a chain or heap."""

    arrival_s: Floats
    arrival_step: Ints
    key: Floats  # lower runs first
    expected: Floats  # tokens, NaN if it will never be scored
    scored: Flags
    waiting: Flags
    preempted: Flags  # waits in lane 0
    charge: Floats  # tokens that its admission cost those it passed
    after: Ints  # the next arrival at the same engine
    to_score: Ints  # the one before it of those to be handed over, newest first
    place: Ints  # number among the arrivals at its engine
    child: Ints  # heap by key
    sibling: Ints
    lane_child: Ints  # heap of preempted requests
    lane_sibling: Ints
    guard_key: Floats
    guard_child: Ints
    guard_sibling: Ints
    budget: Floats
    trees: Floats  # every engine's Fenwick tree of charges
    trees_used: Ints  # (1,) elements of `trees` given out
    keyed_of: Ints  # root of the heap by key
    lane_of: Ints
    later_of: Ints
    urgent_of: Ints
    last_of: Ints  # newest arrival
    oldest_of: Ints  # oldest arrival that may still wait
    unscored_of: Ints  # oldest that may still wait without a score
    to_score_of: Ints  # newest arrival that has not been handed over
    in_flight: Ints  # (engines, 8) requests that are with the ranker
    in_flight_due_s: Floats  # (engines, 8) when their scores come, infinity for a free place
    in_flight_of: Ints
    arrivals_of: Ints
    waiting_of: Ints
    unscored_waiting_of: Ints
    expected_waiting_of: Floats  # tokens, over the scored
    total_charge_of: Floats
    tree_start_of: Ints  # in `trees`
    tree_capacity_of: Ints  # a power of two
    tree_base_of: Ints  # `place` of the first charge kept
    median_of: Floats
    recent: Floats  # (engines, window) last scores in order of coming
    ranked: Floats  # the same, ascending
    scores_of: Ints


def guard_order(guard: Guard, *, score_delay_s: float, uses_ranker: bool) -> Order:
    """Raises: ValueError: if the guard is none that is known here."""
    match guard:
        case NoGuard():
            kind, a, b = NO_GUARD, 0.0, 0.0
        case FixedThreshold():
            kind, a, b = FIXED_THRESHOLD, guard.seconds, 0.0
        case RelativeAgeing():
            kind, a, b = RELATIVE_AGEING, guard.s_per_token, 0.0
        case UniBoost():
            kind, a, b = UNIBOOST, guard.knob, 0.0
        case IdleQuantum():
            kind, a, b = IDLE_QUANTUM, float(guard.idle_steps), float(guard.quantum_steps)
        case OvertakingBudget():
            kind, a, b = OVERTAKING_BUDGET, guard.beta, guard.floor_tokens
        case _:
            raise ValueError(f"the fast simulator does not know the guard {guard.name}")
    return Order(kind, float(a), float(b), float(score_delay_s), uses_ranker)


def make_queue(arrival_s: Floats, key: Floats, expected: Floats, engines: int) -> Queue:
    """Empty queues for requests with known keys and scores; both are seen only once they have come."""
    count = len(arrival_s)

    def floats(size: int) -> Floats:
        return np.zeros(size)

    def links(size: int) -> Ints:
        return np.full(size, EMPTY, dtype=np.int64)

    def flags() -> Flags:
        return np.zeros(count, dtype=np.bool_)

    starts = np.arange(engines, dtype=np.int64) * (_FIRST_CAPACITY + 1)
    return Queue(
        arrival_s=arrival_s, arrival_step=np.zeros(count, np.int64), key=key,
        expected=np.clip(expected, 1.0, MAX_EXPECTED_TOKENS), scored=flags(), waiting=flags(),
        preempted=flags(), charge=floats(count), after=links(count), to_score=links(count),
        place=links(count),
        child=links(count), sibling=links(count), lane_child=links(count), lane_sibling=links(count),
        guard_key=floats(count), guard_child=links(count), guard_sibling=links(count), budget=floats(count),
        # Trees double up to 4 times the length of a queue.
        trees=floats(engines * 2 * _FIRST_CAPACITY + 16 * count),
        trees_used=np.array([engines * (_FIRST_CAPACITY + 1)]),
        keyed_of=links(engines), lane_of=links(engines), later_of=links(engines), urgent_of=links(engines),
        last_of=links(engines), oldest_of=links(engines), unscored_of=links(engines),
        to_score_of=links(engines), in_flight=np.zeros((engines, MAX_IN_FLIGHT), np.int64),
        in_flight_due_s=np.full((engines, MAX_IN_FLIGHT), np.inf), in_flight_of=np.zeros(engines, np.int64),
        arrivals_of=np.zeros(engines, np.int64),
        waiting_of=np.zeros(engines, np.int64), unscored_waiting_of=np.zeros(engines, np.int64),
        expected_waiting_of=floats(engines), total_charge_of=floats(engines), tree_start_of=starts,
        tree_capacity_of=np.full(engines, _FIRST_CAPACITY, np.int64),
        tree_base_of=np.zeros(engines, np.int64), median_of=np.full(engines, INITIAL_MEDIAN),
        recent=np.zeros((engines, MEDIAN_WINDOW)), ranked=np.zeros((engines, MEDIAN_WINDOW)),
        scores_of=np.zeros(engines, np.int64),
    )


# --- What the engine calls ----------------------------------------------------------------------------------


@njit
def arrive(q: Queue, order: Order, e: int, i: int, step: int) -> None:
    """Request `i` joins the queue of engine `e`."""
    if q.last_of[e] == EMPTY:
        q.oldest_of[e] = q.unscored_of[e] = i
    else:
        q.after[q.last_of[e]] = i
    q.last_of[e] = i
    q.place[i] = q.arrivals_of[e]
    q.arrivals_of[e] += 1
    q.arrival_step[i] = step
    q.waiting[i] = True
    q.waiting_of[e] += 1
    q.unscored_waiting_of[e] += 1
    if order.uses_ranker:
        q.to_score[i] = q.to_score_of[e]
        q.to_score_of[e] = i
    else:
        _score(q, order, e, i)
    if order.guard == OVERTAKING_BUDGET:
        tokens_ahead = q.expected_waiting_of[e] + q.unscored_waiting_of[e] * q.median_of[e] - _tokens(q, e, i)
        q.budget[i] = order.b + order.a * tokens_ahead
        if q.place[i] - q.tree_base_of[e] >= q.tree_capacity_of[e]:
            _rebuild_tree(q, e)
    if not order.uses_ranker:
        q.keyed_of[e] = meld(q.keyed_of[e], i, q.key, q.child, q.sibling)
    _watch(q, order, e, i)


@njit
def take_scores(q: Queue, order: Order, e: int, now: float) -> None:
    """A step begins: what the ranker has finished is taken."""
    while q.in_flight_of[e] > 0 and q.in_flight_due_s[e, 0] <= now:
        due = q.in_flight_due_s[e, 0]
        taken = 0
        while taken < q.in_flight_of[e] and q.in_flight_due_s[e, taken] == due:
            _score(q, order, e, q.in_flight[e, taken])
            taken += 1
        left = q.in_flight_of[e] - taken
        q.in_flight[e, :left] = q.in_flight[e, taken : taken + left].copy()
        q.in_flight_due_s[e, :left] = q.in_flight_due_s[e, taken : taken + left].copy()
        q.in_flight_of[e] = left


@njit
def hand_over(q: Queue, order: Order, e: int, now: float) -> None:
    """A step is scheduled: if it left requests waiting, the newest go to the ranker, 8 at once at most."""
    while wants_scores(q, order, e):
        i = q.to_score_of[e]
        q.to_score_of[e] = q.to_score[i]
        if q.waiting[i]:
            q.in_flight[e, q.in_flight_of[e]] = i
            q.in_flight_due_s[e, q.in_flight_of[e]] = now + order.score_delay_s
            q.in_flight_of[e] += 1


@njit
def next_change_s(q: Queue, order: Order, e: int, now: float) -> float:
    """When the order may change though nobody comes or goes; infinity if never."""
    change = q.in_flight_due_s[e, 0] if q.in_flight_of[e] > 0 else math.inf
    if order.guard == FIXED_THRESHOLD or order.guard == RELATIVE_AGEING:
        time = q.guard_key[_earliest(q, order, e)]
        if time > now:
            change = min(change, time)
    return change


@njit
def wants_scores(q: Queue, order: Order, e: int) -> bool:
    """Whether a prompt could be handed over now."""
    return (order.uses_ranker and q.waiting_of[e] > 0 and q.in_flight_of[e] < MAX_IN_FLIGHT
            and q.to_score_of[e] != EMPTY)


@njit
def head(q: Queue, order: Order, e: int, now: float, step: int) -> int:
    """Who runs next at engine `e`, where someone waits."""
    if q.lane_of[e] != EMPTY:
        return q.lane_of[e]
    chosen = _shortest(q, order, e)
    if order.guard == NO_GUARD:
        return chosen
    if order.guard == OVERTAKING_BUDGET:
        while True:
            older = _overdrawn(q, e, chosen, _tokens(q, e, chosen))
            if older == EMPTY:
                return chosen
            chosen = older
    if order.guard == IDLE_QUANTUM:
        promoted = _promoted(q, order, e, step)
        return chosen if promoted == EMPTY else promoted
    due = _earliest(q, order, e)
    return due if order.guard == UNIBOOST or q.guard_key[due] <= now else chosen


@njit
def admit(q: Queue, order: Order, e: int, i: int) -> None:
    """The request `i`, just given by `head`, leaves the queue and is charged to those it passes."""
    if q.preempted[i]:
        q.lane_of[e] = pop(i, q.key, q.lane_child, q.lane_sibling)
        q.preempted[i] = False
    elif order.guard == OVERTAKING_BUDGET:
        _charge(q, e, i, _tokens(q, e, i))
    q.waiting[i] = False
    _account(q, e, i, -1)


@njit
def preempt(q: Queue, e: int, i: int) -> None:
    """A running request waits again, before all that were never admitted."""
    q.waiting[i] = q.preempted[i] = True
    _account(q, e, i, 1)
    q.lane_child[i] = EMPTY
    q.lane_of[e] = meld(q.lane_of[e], i, q.key, q.lane_child, q.lane_sibling)


@njit
def finish(q: Queue, order: Order, e: int, i: int, output_tokens: int) -> None:
    """Correct what the request was charged to the tokens it made."""
    if order.guard == OVERTAKING_BUDGET:
        _charge(q, e, i, output_tokens - q.charge[i])


# --- Order and scores ---------------------------------------------------------------------------------------


@njit
def _tokens(q: Queue, e: int, i: int) -> float:
    return q.expected[i] if q.scored[i] else q.median_of[e]


@njit
def _account(q: Queue, e: int, i: int, sign: int) -> None:
    q.waiting_of[e] += sign
    if q.scored[i]:
        q.expected_waiting_of[e] += sign * q.expected[i]
    else:
        q.unscored_waiting_of[e] += sign


@njit
def _score(q: Queue, order: Order, e: int, i: int) -> None:
    """Request `i` gets its score, if it has one, waiting or not."""
    if math.isnan(q.expected[i]):
        return
    if q.waiting[i]:
        _account(q, e, i, -1)
    q.scored[i] = True
    _add_to_median(q, e, q.expected[i])
    if not q.waiting[i]:
        return
    _account(q, e, i, 1)
    if order.uses_ranker and not q.preempted[i]:
        q.keyed_of[e] = meld(q.keyed_of[e], i, q.key, q.child, q.sibling)
        if order.guard in (RELATIVE_AGEING, UNIBOOST):
            _watch(q, order, e, i)


@njit
def _add_to_median(q: Queue, e: int, value: float) -> None:
    ranked, recent = q.ranked[e], q.recent[e]
    size = min(q.scores_of[e], MEDIAN_WINDOW)
    slot = q.scores_of[e] % MEDIAN_WINDOW
    if size == MEDIAN_WINDOW:
        gone = np.searchsorted(ranked, recent[slot])
        ranked[gone : size - 1] = ranked[gone + 1 : size]
        size -= 1
    recent[slot] = value
    place = np.searchsorted(ranked[:size], value, side="right")
    for k in range(size, place, -1):
        ranked[k] = ranked[k - 1]
    ranked[place] = value
    q.scores_of[e] += 1
    q.median_of[e] = ranked[(size + 1) // 2]


@njit
def _shortest(q: Queue, order: Order, e: int) -> int:
    while q.keyed_of[e] != EMPTY and not q.waiting[q.keyed_of[e]]:
        q.keyed_of[e] = pop(q.keyed_of[e], q.key, q.child, q.sibling)
    keyed = q.keyed_of[e]
    if not order.uses_ranker:
        return keyed
    unscored = _oldest_unscored(q, e)
    if unscored == EMPTY:
        return keyed
    if keyed == EMPTY or (q.median_of[e], unscored) < (q.key[keyed], keyed):
        return unscored
    return keyed


@njit
def _oldest(q: Queue, e: int) -> int:
    """The oldest waiting request; the newest arrival if none waits."""
    while not q.waiting[q.oldest_of[e]] and q.after[q.oldest_of[e]] != EMPTY:
        q.oldest_of[e] = q.after[q.oldest_of[e]]
    return q.oldest_of[e]


@njit
def _oldest_unscored(q: Queue, e: int) -> int:
    i = q.unscored_of[e]
    while i != EMPTY and not (q.waiting[i] and not q.scored[i]) and q.after[i] != EMPTY:
        i = q.after[i]
    q.unscored_of[e] = i  # the newest stays, so that the chain goes on from there
    return i if i != EMPTY and q.waiting[i] and not q.scored[i] else EMPTY


# --- Guards -------------------------------------------------------------------------------------------------


@njit
def _watch(q: Queue, order: Order, e: int, i: int) -> None:
    """Put a waiting request where the guard will look for it."""
    if order.guard == NO_GUARD:
        return
    if order.guard == OVERTAKING_BUDGET:
        q.guard_key[i] = q.total_charge_of[e] + q.budget[i]  # nothing is charged to the newest yet
    elif order.guard == IDLE_QUANTUM:
        q.guard_key[i] = q.arrival_step[i] + order.a
    elif order.guard == FIXED_THRESHOLD:
        q.guard_key[i] = q.arrival_s[i] + order.a
        return  # the oldest is the first, and known
    elif order.guard == RELATIVE_AGEING:
        q.guard_key[i] = q.arrival_s[i] + order.a * _tokens(q, e, i)
    else:
        q.guard_key[i] = q.arrival_s[i] + order.a * math.log(_tokens(q, e, i))
    if q.scored[i] or order.guard in (OVERTAKING_BUDGET, IDLE_QUANTUM):
        q.later_of[e] = meld(q.later_of[e], i, q.guard_key, q.guard_child, q.guard_sibling)


@njit
def _earliest(q: Queue, order: Order, e: int) -> int:
    """The waiting request whose time comes first."""
    if order.guard == FIXED_THRESHOLD:
        return _oldest(q, e)
    while q.later_of[e] != EMPTY and not q.waiting[q.later_of[e]]:
        q.later_of[e] = pop(q.later_of[e], q.guard_key, q.guard_child, q.guard_sibling)
    scored, unscored = q.later_of[e], _oldest_unscored(q, e)
    if scored == EMPTY or (unscored != EMPTY and q.guard_key[unscored] < q.guard_key[scored]):
        return unscored
    return scored


@njit
def _promoted(q: Queue, order: Order, e: int, step: int) -> int:
    """The promoted request of the fewest expected tokens; EMPTY if none is."""
    period = order.a + order.b
    while q.later_of[e] != EMPTY and q.guard_key[q.later_of[e]] <= step:
        i = q.later_of[e]
        q.later_of[e] = pop(i, q.guard_key, q.guard_child, q.guard_sibling)
        if q.waiting[i]:
            q.guard_key[i] = _tokens(q, e, i)
            q.urgent_of[e] = meld(q.urgent_of[e], i, q.guard_key, q.guard_child, q.guard_sibling)
    while q.urgent_of[e] != EMPTY:
        i = q.urgent_of[e]
        waited = step - q.arrival_step[i]
        if q.waiting[i] and waited % period >= order.a:
            return i
        q.urgent_of[e] = pop(i, q.guard_key, q.guard_child, q.guard_sibling)
        if q.waiting[i]:
            q.guard_key[i] = q.arrival_step[i] + waited // period * period + order.a
            q.later_of[e] = meld(q.later_of[e], i, q.guard_key, q.guard_child, q.guard_sibling)
    return EMPTY


@njit
def _overdrawn(q: Queue, e: int, i: int, tokens: float) -> int:
    """The oldest waiting request that `i` may not pass with `tokens` of work, or EMPTY."""
    while q.later_of[e] != EMPTY and q.guard_key[q.later_of[e]] < q.total_charge_of[e] + tokens:
        older = q.later_of[e]
        q.later_of[e] = pop(older, q.guard_key, q.guard_child, q.guard_sibling)
        if not q.waiting[older]:
            continue
        remaining = q.budget[older] - _charged_beyond(q, e, older)
        if remaining < tokens:
            q.guard_key[older] = 0.0  # equal keys: order of arrival
            q.urgent_of[e] = meld(q.urgent_of[e], older, q.guard_key, q.guard_child, q.guard_sibling)
        else:
            q.guard_key[older] = q.total_charge_of[e] + remaining
            q.later_of[e] = meld(q.later_of[e], older, q.guard_key, q.guard_child, q.guard_sibling)
    while q.urgent_of[e] != EMPTY and q.urgent_of[e] < i:
        oldest = q.urgent_of[e]
        remaining = 0.0
        if q.waiting[oldest]:
            remaining = q.budget[oldest] - _charged_beyond(q, e, oldest)
            if remaining < tokens:
                return oldest
        q.urgent_of[e] = pop(oldest, q.guard_key, q.guard_child, q.guard_sibling)
        if q.waiting[oldest]:
            q.guard_key[oldest] = q.total_charge_of[e] + remaining
            q.later_of[e] = meld(q.later_of[e], oldest, q.guard_key, q.guard_child, q.guard_sibling)
    return EMPTY


# Charges: a Fenwick tree per engine whose element p sums a power of two of places up from p, so that both a
# charge and the sum beyond a place take O(log n). It starts at the oldest waiting request and grows with the
# queue.


@njit
def _charge(q: Queue, e: int, i: int, tokens: float) -> None:
    q.charge[i] += tokens
    q.total_charge_of[e] += max(0.0, tokens)
    p = q.place[i] - q.tree_base_of[e] + 1
    while p > 0:  # else nobody waits before it
        q.trees[q.tree_start_of[e] + p] += tokens
        p -= p & -p


@njit
def _charged_beyond(q: Queue, e: int, i: int) -> float:
    p = q.place[i] - q.tree_base_of[e] + 2
    total = 0.0
    while p <= q.tree_capacity_of[e]:
        total += q.trees[q.tree_start_of[e] + p]
        p += p & -p
    return total


@njit
def _rebuild_tree(q: Queue, e: int) -> None:
    """Begin at the oldest waiting request; twice the room of the queue at least."""
    i = _oldest(q, e)
    q.tree_base_of[e] = q.place[i]
    span = q.arrivals_of[e] - q.place[i]
    if q.tree_capacity_of[e] < 2 * span:
        while q.tree_capacity_of[e] < 2 * span:
            q.tree_capacity_of[e] *= 2
        q.tree_start_of[e] = q.trees_used[0]
        q.trees_used[0] += q.tree_capacity_of[e] + 1
    start, capacity = q.tree_start_of[e], q.tree_capacity_of[e]
    q.trees[start : start + capacity + 1] = 0.0
    while i != EMPTY:
        q.trees[start + 1 + q.place[i] - q.tree_base_of[e]] = q.charge[i]
        i = q.after[i]
    for p in range(capacity, 0, -1):
        q.trees[start + p - (p & -p)] += q.trees[start + p]
