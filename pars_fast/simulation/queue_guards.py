"""The guards of `pars_fast.guards` on the queues of many engines, compiled.

A guard keeps each waiting request in one of two heaps, `later` and `urgent`, which share their links:

| guard | `later`, by | `urgent`, by |
|---|---|---|
| fixed_threshold, relative_ageing, uniboost | time at which it goes first | |
| idle_quantum | step of its next promotion | promoted, by expected tokens |
| overtaking_budget, passing_limit | total charge at which to look at it | short of budget, by arrival |

The guards by time keep requests without a score in a heap of their own, `unscored_later`, since a score moves
them. Where this differs from the live guards: under idle_quantum a score that comes during a promotion counts
from the next one.
"""

import math
from typing import NamedTuple

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
from pars_fast.guards.passing_limit import GROWTH_FROM, MAX_GROWTH
from pars_fast.simulation.arrays import compiled
from pars_fast.simulation.charge_tree import charged_beyond, make_room
from pars_fast.simulation.heaps import EMPTY, meld, pop
from pars_fast.simulation.queue_state import Queue, expected_tokens, oldest_waiting

(NO_GUARD, FIXED_THRESHOLD, RELATIVE_AGEING, UNIBOOST, IDLE_QUANTUM, OVERTAKING_BUDGET,
 PASSING_LIMIT) = range(7)


class Order(NamedTuple):
    """What orders the queue. `a` and `b` are the guard's two settings, in the order of its fields."""

    guard: int
    a: float
    b: float
    score_delay_s: float  # of a ranker, from handing prompts over
    prompt_work: float  # of a prompt token in a key, in output tokens
    uses_ranker: bool  # keys come with scores; else both are known at arrival, if there are any
    charges: bool  # whether the guard counts what later arrivals take, in tokens or requests


def guard_order(guard: Guard, *, score_delay_s: float, uses_ranker: bool, prompt_work: float = 0.0) -> Order:
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
        case PassingLimit():
            kind, a, b = PASSING_LIMIT, guard.beta, guard.floor_requests
        case _:
            raise ValueError(f"the fast simulator does not know the guard {guard.name}")
    charges = kind in (OVERTAKING_BUDGET, PASSING_LIMIT)
    return Order(kind, float(a), float(b), float(score_delay_s), float(prompt_work), uses_ranker, charges)


@compiled
def passing_cost(q: Queue, order: Order, e: int, i: int) -> float:
    """What the admission of `i` costs those it passes."""
    return 1.0 if order.guard == PASSING_LIMIT else expected_tokens(q, e, i)


@compiled
def set_budget(q: Queue, order: Order, e: int, i: int, newest: int) -> None:
    """What may be charged to `i`, which has just arrived after `newest`, EMPTY for the first arrival."""
    requests = q.request
    here = q.engine[e]
    ahead = here.num_waiting - 1.0
    if order.guard == OVERTAKING_BUDGET:
        ahead = here.expected_waiting + here.num_unscored * here.median - expected_tokens(q, e, i)
    requests[i].ahead = ahead
    requests[i].budget = order.b + order.a * ahead
    while newest != EMPTY and requests[newest].ahead <= ahead:
        requests[newest].higher = i
        newest = requests[newest].lower
    requests[i].lower = newest
    make_room(q, e, i)


@compiled
def watch(q: Queue, order: Order, e: int, i: int) -> None:
    """Put a waiting request where the guard will look for it."""
    if order.guard == NO_GUARD:
        return
    requests = q.request
    here = q.engine[e]
    if order.charges:
        # Nothing is charged to the newest yet.
        requests[i].guard_key = here.total_charge + requests[i].budget
    elif order.guard == IDLE_QUANTUM:
        requests[i].guard_key = requests[i].arrival_step + order.a
    elif order.guard == FIXED_THRESHOLD:
        requests[i].guard_key = requests[i].seen_s + order.a
        return  # the oldest is the first, and known
    elif order.guard == RELATIVE_AGEING:
        requests[i].guard_key = requests[i].seen_s + order.a * expected_tokens(q, e, i)
    else:
        requests[i].guard_key = requests[i].seen_s + order.a * math.log(expected_tokens(q, e, i))
    if requests[i].scored or order.charges or order.guard == IDLE_QUANTUM:
        here.later = _push(q, here.later, i)
    else:
        requests[i].unscored_key = requests[i].guard_key
        here.unscored_later = meld(here.unscored_later, i, requests.unscored_key, requests.unscored_child,
                                   requests.unscored_sibling)


@compiled
def guarded(q: Queue, order: Order, e: int, chosen: int, now: float, step: int) -> int:
    """Who runs next, where `chosen` would without the guard."""
    if order.guard == NO_GUARD:
        return chosen
    if order.charges:
        while True:
            older = _overdrawn(q, order, e, chosen, passing_cost(q, order, e, chosen))
            if older == EMPTY:
                return chosen
            chosen = older
    if order.guard == IDLE_QUANTUM:
        promoted = _promoted(q, order, e, step)
        return chosen if promoted == EMPTY else promoted
    due = _earliest(q, order, e)
    return due if order.guard == UNIBOOST or q.request[due].guard_key <= now else chosen


@compiled
def next_due_s(q: Queue, order: Order, e: int, now: float) -> float:
    """When time alone may put another request first; infinity if it will not."""
    if order.guard == FIXED_THRESHOLD or order.guard == RELATIVE_AGEING:
        time = q.request[_earliest(q, order, e)].guard_key
        if time > now:
            return time
    return math.inf


@compiled
def _push(q: Queue, heap: int, i: int) -> int:
    requests = q.request
    return meld(heap, i, requests.guard_key, requests.guard_child, requests.guard_sibling)


@compiled
def _pop(q: Queue, heap: int) -> int:
    requests = q.request
    return pop(heap, requests.guard_key, requests.guard_child, requests.guard_sibling)


@compiled
def _earliest(q: Queue, order: Order, e: int) -> int:
    """The waiting request whose time comes first."""
    requests = q.request
    here = q.engine[e]
    if order.guard == FIXED_THRESHOLD:
        return oldest_waiting(q, e)
    while here.later != EMPTY and not requests[here.later].waiting:
        here.later = _pop(q, here.later)
    scored, unscored = here.later, here.unscored_later
    while unscored != EMPTY and (requests[unscored].scored or not requests[unscored].waiting):
        unscored = pop(unscored, requests.unscored_key, requests.unscored_child, requests.unscored_sibling)
    here.unscored_later = unscored
    if scored == EMPTY or unscored == EMPTY:
        return max(scored, unscored)
    first = (requests[unscored].guard_key, unscored) < (requests[scored].guard_key, scored)
    return unscored if first else scored


@compiled
def _promoted(q: Queue, order: Order, e: int, step: int) -> int:
    """The promoted request of the fewest expected tokens; EMPTY if none is."""
    requests = q.request
    here = q.engine[e]
    period = order.a + order.b
    while here.later != EMPTY and requests[here.later].guard_key <= step:
        i = here.later
        here.later = _pop(q, i)
        if requests[i].waiting:
            requests[i].guard_key = expected_tokens(q, e, i)
            here.urgent = _push(q, here.urgent, i)
    while here.urgent != EMPTY:
        i = here.urgent
        waited = step - requests[i].arrival_step
        if requests[i].waiting and waited % period >= order.a:
            return i
        here.urgent = _pop(q, i)
        if requests[i].waiting:
            requests[i].guard_key = requests[i].arrival_step + waited // period * period + order.a
            here.later = _push(q, here.later, i)
    return EMPTY


@compiled
def _remaining(q: Queue, order: Order, e: int, i: int) -> float:
    """What later arrivals may still take ahead of the waiting request `i`."""
    requests = q.request
    budget = requests[i].budget
    if order.guard == PASSING_LIMIT:
        met = requests[i].ahead
        longest = min(requests[_highest(q, i)].ahead, MAX_GROWTH * max(met, GROWTH_FROM))
        budget += (1 + order.a) * (longest - met)
    return budget - charged_beyond(q, e, i)


@compiled
def _highest(q: Queue, i: int) -> int:
    """Of `i` and the arrivals since, the one that met the longest queue; the path there is cut short."""
    requests = q.request
    highest = i
    while requests[highest].higher != EMPTY:
        highest = requests[highest].higher
    while requests[i].higher != EMPTY:
        following = requests[i].higher
        requests[i].higher = highest
        i = following
    return highest


@compiled
def _overdrawn(q: Queue, order: Order, e: int, i: int, cost: float) -> int:
    """The oldest waiting request that `i` may not pass at that cost, or EMPTY."""
    requests = q.request
    here = q.engine[e]
    looks = here.total_charge + cost
    while here.later != EMPTY and requests[here.later].guard_key < looks:
        older = here.later
        here.later = _pop(q, older)
        if not requests[older].waiting:
            continue
        remaining = _remaining(q, order, e, older)
        if remaining < cost:
            requests[older].guard_key = 0.0  # equal keys: order of arrival
            here.urgent = _push(q, here.urgent, older)
        else:
            requests[older].guard_key = here.total_charge + remaining
            here.later = _push(q, here.later, older)
    while here.urgent != EMPTY and here.urgent < i:
        oldest = here.urgent
        remaining = 0.0
        if requests[oldest].waiting:
            remaining = _remaining(q, order, e, oldest)
            if remaining < cost:
                return oldest
        here.urgent = _pop(q, oldest)
        if requests[oldest].waiting:
            requests[oldest].guard_key = here.total_charge + remaining
            here.later = _push(q, here.later, oldest)
    return EMPTY
