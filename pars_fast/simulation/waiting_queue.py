"""The waiting queues of many engines in flat arrays: `HostIndex` and the guards, compiled.

The order is `HostIndex`'s: preempted requests first, then the lowest key, a request without a score having
the running median; the guard may put another request ahead. Requests are numbered in order of arrival, which
is `seq`. Per engine there is one chain of all its arrivals (`after`), along which the oldest waiting one and
the oldest without a score move. Prompts go to the ranker as `RankingLoop` hands them over.

A guard keeps each waiting request in one of two heaps, `later` and `urgent`, which share their links:

| guard | `later`, by | `urgent`, by |
|---|---|---|
| fixed_threshold, relative_ageing, uniboost | time at which it goes first | |
| idle_quantum | step of its next promotion | promoted, by expected tokens |
| overtaking_budget | total charge at which it must be looked at | short of budget, by arrival |

The guards by time keep requests without a score in a heap of their own, `unscored_later`, since a score moves
them. Where this differs from the live guards: under idle_quantum a score that comes during a promotion counts
from the next one.
"""

import math
from typing import NamedTuple

import numpy as np

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
from pars_fast.simulation.arrays import Floats, Ints, Records, compiled
from pars_fast.simulation.heaps import EMPTY, meld, pop

NO_GUARD, FIXED_THRESHOLD, RELATIVE_AGEING, UNIBOOST, IDLE_QUANTUM, OVERTAKING_BUDGET = range(6)
INITIAL_MEDIAN = 128.0
MEDIAN_WINDOW = 511
MAX_IN_FLIGHT = 4  # as `ProcessRuntime.max_in_flight`
_FIRST_CAPACITY = 64  # of an engine's tree


class Order(NamedTuple):
    """What orders the queue. `a` and `b` are the guard's two settings, in the order of its fields."""

    guard: int
    a: float
    b: float
    score_delay_s: float  # of a ranker, from handing prompts over
    uses_ranker: bool  # keys come with scores; else both are known at arrival, if there are any


REQUEST = np.dtype([
    ("arrival_s", "f8"),
    ("seen_s", "f8"),  # end of the step in which it arrived: the live queue's time of arrival
    ("arrival_step", "i8"),
    ("key", "f8"),  # lower runs first
    ("expected", "f8"),  # tokens, NaN if it will never be scored
    ("scored", "?"),
    ("waiting", "?"),
    ("preempted", "?"),  # waits in lane 0
    ("charge", "f8"),  # tokens that its admission cost those it passed
    ("after", "i8"),  # the next arrival at the same engine
    ("to_score", "i8"),  # the one before it of those to be handed over, newest first
    ("place", "i8"),  # number among the arrivals at its engine
    ("child", "i8"), ("sibling", "i8"),  # heap by key
    ("lane_key", "f8"), ("lane_child", "i8"), ("lane_sibling", "i8"),  # heap of preempted requests
    ("guard_key", "f8"), ("guard_child", "i8"), ("guard_sibling", "i8"),  # the guard's two heaps
    ("unscored_key", "f8"), ("unscored_child", "i8"), ("unscored_sibling", "i8"),  # those without a score
    ("budget", "f8"),
], align=True)

ENGINE = np.dtype([
    ("keyed", "i8"),  # root of the heap by key
    ("lane", "i8"),
    ("later", "i8"),
    ("urgent", "i8"),
    ("unscored_later", "i8"),
    ("last", "i8"),  # newest arrival
    ("oldest", "i8"),  # oldest arrival that may still wait
    ("unscored", "i8"),  # oldest that may still wait without a score
    ("to_score", "i8"),  # newest arrival that has not been handed over
    ("num_in_flight", "i8"),
    ("num_arrivals", "i8"),
    ("num_waiting", "i8"),
    ("num_unscored", "i8"),  # of those that wait
    ("expected_waiting", "f8"),  # tokens, over the scored
    ("total_charge", "f8"),
    ("tree_start", "i8"),  # in `trees`
    ("tree_capacity", "i8"),  # a power of two
    ("tree_base", "i8"),  # `place` of the first charge kept
    ("median", "f8"),
    ("num_scores", "i8"),
], align=True)


class Queue(NamedTuple):
    """The state; `EMPTY` ends a chain or heap."""

    request: Records  # of REQUEST
    engine: Records  # of ENGINE
    trees: Floats  # every engine's Fenwick tree of charges
    trees_used: Ints  # (1,) elements of `trees` given out
    in_flight: Ints  # (engines, MAX_IN_FLIGHT) requests that are with the ranker
    in_flight_due_s: Floats  # (engines, MAX_IN_FLIGHT) when their scores come
    recent: Floats  # (engines, window) last scores in order of coming
    ranked: Floats  # the same, ascending


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
    request, engine = np.recarray(count, REQUEST), np.recarray(engines, ENGINE)
    for records in (request, engine):
        records[...] = np.zeros((), records.dtype)
    for name in ("after", "to_score", "child", "sibling", "lane_child", "lane_sibling", "guard_child",
                 "guard_sibling", "unscored_child", "unscored_sibling"):
        request[name] = EMPTY
    for name in ("keyed", "lane", "later", "urgent", "unscored_later", "last", "oldest", "unscored",
                 "to_score"):
        engine[name] = EMPTY
    request.arrival_s, request.key = arrival_s, key
    request.expected = np.clip(expected, 1.0, MAX_EXPECTED_TOKENS)
    engine.median = INITIAL_MEDIAN
    engine.tree_start = np.arange(engines) * (_FIRST_CAPACITY + 1)
    engine.tree_capacity = _FIRST_CAPACITY
    return Queue(
        request,
        engine,
        trees=np.zeros(engines * 2 * _FIRST_CAPACITY + 16 * count),  # one grows to 4 times its queue
        trees_used=np.array([engines * (_FIRST_CAPACITY + 1)]),
        in_flight=np.zeros((engines, MAX_IN_FLIGHT), np.int64),
        in_flight_due_s=np.zeros((engines, MAX_IN_FLIGHT)),
        recent=np.zeros((engines, MEDIAN_WINDOW)),
        ranked=np.zeros((engines, MEDIAN_WINDOW)),
    )


# --- What the engine calls ----------------------------------------------------------------------------------


@compiled
def arrive(q: Queue, order: Order, e: int, i: int, seen_s: float, step: int) -> None:
    """Request `i` joins the queue of engine `e`, which sees it at the end of a step."""
    if q.engine[e].last == EMPTY:
        q.engine[e].oldest = q.engine[e].unscored = i
    else:
        q.request[q.engine[e].last].after = i
    q.engine[e].last = i
    q.request[i].place = q.engine[e].num_arrivals
    q.engine[e].num_arrivals += 1
    q.request[i].seen_s, q.request[i].arrival_step = seen_s, step
    q.request[i].waiting = True
    q.engine[e].num_waiting += 1
    q.engine[e].num_unscored += 1
    if order.uses_ranker:
        q.request[i].to_score = q.engine[e].to_score
        q.engine[e].to_score = i
    else:
        _score(q, order, e, i)
    if order.guard == OVERTAKING_BUDGET:
        unscored = q.engine[e].num_unscored * q.engine[e].median
        tokens_ahead = q.engine[e].expected_waiting + unscored - _tokens(q, e, i)
        q.request[i].budget = order.b + order.a * tokens_ahead
        if q.request[i].place - q.engine[e].tree_base >= q.engine[e].tree_capacity:
            _rebuild_tree(q, e)
    if not order.uses_ranker:
        q.engine[e].keyed = meld(q.engine[e].keyed, i, q.request.key, q.request.child, q.request.sibling)
    _watch(q, order, e, i)


@compiled
def take_scores(q: Queue, order: Order, e: int, now: float) -> None:
    """A step begins: what the ranker has finished is taken."""
    while q.engine[e].num_in_flight > 0 and q.in_flight_due_s[e, 0] <= now:
        due = q.in_flight_due_s[e, 0]
        taken = 0
        while taken < q.engine[e].num_in_flight and q.in_flight_due_s[e, taken] == due:
            _score(q, order, e, q.in_flight[e, taken])
            taken += 1
        left = q.engine[e].num_in_flight - taken
        q.in_flight[e, :left] = q.in_flight[e, taken : taken + left].copy()
        q.in_flight_due_s[e, :left] = q.in_flight_due_s[e, taken : taken + left].copy()
        q.engine[e].num_in_flight = left


@compiled
def hand_over(q: Queue, order: Order, e: int, now: float) -> None:
    """A step is scheduled: if it left requests waiting, the newest go to the ranker, 8 at once at most."""
    while wants_scores(q, order, e):
        i = q.engine[e].to_score
        q.engine[e].to_score = q.request[i].to_score
        if q.request[i].waiting:
            q.in_flight[e, q.engine[e].num_in_flight] = i
            q.in_flight_due_s[e, q.engine[e].num_in_flight] = now + order.score_delay_s
            q.engine[e].num_in_flight += 1


@compiled
def next_change_s(q: Queue, order: Order, e: int, now: float) -> float:
    """When the order may change though nobody comes or goes; infinity if never."""
    change = q.in_flight_due_s[e, 0] if q.engine[e].num_in_flight > 0 else math.inf
    if order.guard == FIXED_THRESHOLD or order.guard == RELATIVE_AGEING:
        time = q.request[_earliest(q, order, e)].guard_key
        if time > now:
            change = min(change, time)
    return change


@compiled
def wants_scores(q: Queue, order: Order, e: int) -> bool:
    """Whether a prompt could be handed over now."""
    return (order.uses_ranker and q.engine[e].num_waiting > 0 and q.engine[e].num_in_flight < MAX_IN_FLIGHT
            and q.engine[e].to_score != EMPTY)


@compiled
def head(q: Queue, order: Order, e: int, now: float, step: int) -> int:
    """Who runs next at engine `e`, where someone waits."""
    if q.engine[e].lane != EMPTY:
        return q.engine[e].lane
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
    return due if order.guard == UNIBOOST or q.request[due].guard_key <= now else chosen


@compiled
def admit(q: Queue, order: Order, e: int, i: int) -> None:
    """The request `i`, just given by `head`, leaves the queue and is charged to those it passes."""
    if q.request[i].preempted:
        q.engine[e].lane = pop(i, q.request.lane_key, q.request.lane_child, q.request.lane_sibling)
        q.request[i].preempted = False
    elif order.guard == OVERTAKING_BUDGET:
        _charge(q, e, i, _tokens(q, e, i))
    q.request[i].waiting = False
    _account(q, e, i, -1)


@compiled
def preempt(q: Queue, order: Order, e: int, i: int) -> None:
    """A running request waits again, before all that were never admitted."""
    unknown = order.uses_ranker and not q.request[i].scored
    q.request[i].lane_key = q.engine[e].median if unknown else q.request[i].key
    q.request[i].waiting = q.request[i].preempted = True
    _account(q, e, i, 1)
    q.request[i].lane_child = EMPTY
    q.engine[e].lane = meld(q.engine[e].lane, i, q.request.lane_key, q.request.lane_child,
                            q.request.lane_sibling)


@compiled
def finish(q: Queue, order: Order, e: int, i: int, output_tokens: int) -> None:
    """Correct what the request was charged to the tokens it made."""
    if order.guard == OVERTAKING_BUDGET:
        _charge(q, e, i, output_tokens - q.request[i].charge)


# --- Order and scores ---------------------------------------------------------------------------------------


@compiled
def _tokens(q: Queue, e: int, i: int) -> float:
    return q.request[i].expected if q.request[i].scored else q.engine[e].median


@compiled
def _account(q: Queue, e: int, i: int, sign: int) -> None:
    q.engine[e].num_waiting += sign
    if q.request[i].scored:
        q.engine[e].expected_waiting += sign * q.request[i].expected
    else:
        q.engine[e].num_unscored += sign


@compiled
def _score(q: Queue, order: Order, e: int, i: int) -> None:
    """Request `i` gets its score, if it has one, waiting or not."""
    if math.isnan(q.request[i].expected):
        return
    if q.request[i].waiting:
        _account(q, e, i, -1)
    q.request[i].scored = True
    _add_to_median(q, e, q.request[i].expected)
    if not q.request[i].waiting:
        return
    _account(q, e, i, 1)
    if order.uses_ranker and not q.request[i].preempted:
        q.engine[e].keyed = meld(q.engine[e].keyed, i, q.request.key, q.request.child, q.request.sibling)
        if order.guard in (RELATIVE_AGEING, UNIBOOST):
            _watch(q, order, e, i)


@compiled
def _add_to_median(q: Queue, e: int, value: float) -> None:
    ranked, recent = q.ranked[e], q.recent[e]
    size = min(q.engine[e].num_scores, MEDIAN_WINDOW)
    slot = q.engine[e].num_scores % MEDIAN_WINDOW
    if size == MEDIAN_WINDOW:
        gone = np.searchsorted(ranked, recent[slot])
        ranked[gone : size - 1] = ranked[gone + 1 : size]
        size -= 1
    recent[slot] = value
    place = np.searchsorted(ranked[:size], value, side="right")
    for k in range(size, place, -1):
        ranked[k] = ranked[k - 1]
    ranked[place] = value
    q.engine[e].num_scores += 1
    q.engine[e].median = ranked[(size + 1) // 2]


@compiled
def _shortest(q: Queue, order: Order, e: int) -> int:
    while q.engine[e].keyed != EMPTY and not q.request[q.engine[e].keyed].waiting:
        q.engine[e].keyed = pop(q.engine[e].keyed, q.request.key, q.request.child, q.request.sibling)
    keyed = q.engine[e].keyed
    if not order.uses_ranker:
        return keyed
    unscored = _oldest_unscored(q, e)
    if unscored == EMPTY:
        return keyed
    if keyed == EMPTY or (q.engine[e].median, unscored) < (q.request[keyed].key, keyed):
        return unscored
    return keyed


@compiled
def _oldest(q: Queue, e: int) -> int:
    """The oldest waiting request; the newest arrival if none waits."""
    while not q.request[q.engine[e].oldest].waiting and q.request[q.engine[e].oldest].after != EMPTY:
        q.engine[e].oldest = q.request[q.engine[e].oldest].after
    return q.engine[e].oldest


@compiled
def _oldest_unscored(q: Queue, e: int) -> int:
    i = q.engine[e].unscored
    while i != EMPTY and (q.request[i].scored or not q.request[i].waiting) and q.request[i].after != EMPTY:
        i = q.request[i].after
    q.engine[e].unscored = i  # the newest stays, so that the chain goes on from there
    return i if i != EMPTY and q.request[i].waiting and not q.request[i].scored else EMPTY


# --- Guards -------------------------------------------------------------------------------------------------


@compiled
def _guard_push(q: Queue, heap: int, i: int) -> int:
    return meld(heap, i, q.request.guard_key, q.request.guard_child, q.request.guard_sibling)


@compiled
def _guard_pop(q: Queue, heap: int) -> int:
    return pop(heap, q.request.guard_key, q.request.guard_child, q.request.guard_sibling)


@compiled
def _watch(q: Queue, order: Order, e: int, i: int) -> None:
    """Put a waiting request where the guard will look for it."""
    if order.guard == NO_GUARD:
        return
    if order.guard == OVERTAKING_BUDGET:
        # Nothing is charged to the newest yet.
        q.request[i].guard_key = q.engine[e].total_charge + q.request[i].budget
    elif order.guard == IDLE_QUANTUM:
        q.request[i].guard_key = q.request[i].arrival_step + order.a
    elif order.guard == FIXED_THRESHOLD:
        q.request[i].guard_key = q.request[i].seen_s + order.a
        return  # the oldest is the first, and known
    elif order.guard == RELATIVE_AGEING:
        q.request[i].guard_key = q.request[i].seen_s + order.a * _tokens(q, e, i)
    else:
        q.request[i].guard_key = q.request[i].seen_s + order.a * math.log(_tokens(q, e, i))
    if q.request[i].scored or order.guard in (OVERTAKING_BUDGET, IDLE_QUANTUM):
        q.engine[e].later = _guard_push(q, q.engine[e].later, i)
    else:
        q.request[i].unscored_key = q.request[i].guard_key
        q.engine[e].unscored_later = meld(q.engine[e].unscored_later, i, q.request.unscored_key,
                                          q.request.unscored_child, q.request.unscored_sibling)


@compiled
def _earliest(q: Queue, order: Order, e: int) -> int:
    """The waiting request whose time comes first."""
    if order.guard == FIXED_THRESHOLD:
        return _oldest(q, e)
    while q.engine[e].later != EMPTY and not q.request[q.engine[e].later].waiting:
        q.engine[e].later = _guard_pop(q, q.engine[e].later)
    scored, unscored = q.engine[e].later, q.engine[e].unscored_later
    while unscored != EMPTY and (q.request[unscored].scored or not q.request[unscored].waiting):
        unscored = pop(unscored, q.request.unscored_key, q.request.unscored_child, q.request.unscored_sibling)
    q.engine[e].unscored_later = unscored
    if scored == EMPTY or unscored == EMPTY:
        return max(scored, unscored)
    first = (q.request[unscored].guard_key, unscored) < (q.request[scored].guard_key, scored)
    return unscored if first else scored


@compiled
def _promoted(q: Queue, order: Order, e: int, step: int) -> int:
    """The promoted request of the fewest expected tokens; EMPTY if none is."""
    period = order.a + order.b
    while q.engine[e].later != EMPTY and q.request[q.engine[e].later].guard_key <= step:
        i = q.engine[e].later
        q.engine[e].later = _guard_pop(q, i)
        if q.request[i].waiting:
            q.request[i].guard_key = _tokens(q, e, i)
            q.engine[e].urgent = _guard_push(q, q.engine[e].urgent, i)
    while q.engine[e].urgent != EMPTY:
        i = q.engine[e].urgent
        waited = step - q.request[i].arrival_step
        if q.request[i].waiting and waited % period >= order.a:
            return i
        q.engine[e].urgent = _guard_pop(q, i)
        if q.request[i].waiting:
            q.request[i].guard_key = q.request[i].arrival_step + waited // period * period + order.a
            q.engine[e].later = _guard_push(q, q.engine[e].later, i)
    return EMPTY


@compiled
def _overdrawn(q: Queue, e: int, i: int, tokens: float) -> int:
    """The oldest waiting request that `i` may not pass with `tokens` of work, or EMPTY."""
    looks = q.engine[e].total_charge + tokens
    while q.engine[e].later != EMPTY and q.request[q.engine[e].later].guard_key < looks:
        older = q.engine[e].later
        q.engine[e].later = _guard_pop(q, older)
        if not q.request[older].waiting:
            continue
        remaining = q.request[older].budget - _charged_beyond(q, e, older)
        if remaining < tokens:
            q.request[older].guard_key = 0.0  # equal keys: order of arrival
            q.engine[e].urgent = _guard_push(q, q.engine[e].urgent, older)
        else:
            q.request[older].guard_key = q.engine[e].total_charge + remaining
            q.engine[e].later = _guard_push(q, q.engine[e].later, older)
    while q.engine[e].urgent != EMPTY and q.engine[e].urgent < i:
        oldest = q.engine[e].urgent
        remaining = 0.0
        if q.request[oldest].waiting:
            remaining = q.request[oldest].budget - _charged_beyond(q, e, oldest)
            if remaining < tokens:
                return oldest
        q.engine[e].urgent = _guard_pop(q, oldest)
        if q.request[oldest].waiting:
            q.request[oldest].guard_key = q.engine[e].total_charge + remaining
            q.engine[e].later = _guard_push(q, q.engine[e].later, oldest)
    return EMPTY


# Charges: a Fenwick tree per engine whose element p sums a power of two of places up from p, so that both a
# charge and the sum beyond a place take O(log n). It starts at the oldest waiting request and grows with the
# queue.


@compiled
def _charge(q: Queue, e: int, i: int, tokens: float) -> None:
    q.request[i].charge += tokens
    q.engine[e].total_charge += max(0.0, tokens)
    p = q.request[i].place - q.engine[e].tree_base + 1
    while p > 0:  # else nobody waits before it
        q.trees[q.engine[e].tree_start + p] += tokens
        p -= p & -p


@compiled
def _charged_beyond(q: Queue, e: int, i: int) -> float:
    p = q.request[i].place - q.engine[e].tree_base + 2
    total = 0.0
    while p <= q.engine[e].tree_capacity:
        total += q.trees[q.engine[e].tree_start + p]
        p += p & -p
    return total


@compiled
def _rebuild_tree(q: Queue, e: int) -> None:
    """Begin at the oldest waiting request; twice the room of the queue at least."""
    i = _oldest(q, e)
    q.engine[e].tree_base = q.request[i].place
    span = q.engine[e].num_arrivals - q.request[i].place
    if q.engine[e].tree_capacity < 2 * span:
        while q.engine[e].tree_capacity < 2 * span:
            q.engine[e].tree_capacity *= 2
        q.engine[e].tree_start = q.trees_used[0]
        q.trees_used[0] += q.engine[e].tree_capacity + 1
    start, capacity = q.engine[e].tree_start, q.engine[e].tree_capacity
    q.trees[start : start + capacity + 1] = 0.0
    while i != EMPTY:
        q.trees[start + 1 + q.request[i].place - q.engine[e].tree_base] = q.request[i].charge
        i = q.request[i].after
    for p in range(capacity, 0, -1):
        q.trees[start + p - (p & -p)] += q.trees[start + p]
