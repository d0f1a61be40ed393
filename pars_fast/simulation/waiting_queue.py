"""The waiting queues of many engines in flat arrays: `HostIndex` and the guards, compiled.

The order is `HostIndex`'s: preempted requests first, then the lowest key, a request without a score having
that of the running median; the guard may put another request ahead. Requests are numbered in order of
arrival, which is `seq`. Per engine there is one chain of all its arrivals (`after`), along which the oldest
waiting one and the oldest without a score move. Prompts go to the ranker as `RankingLoop` hands them over.

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

import numpy as np

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
from pars_fast.host_index import MAX_EXPECTED_TOKENS
from pars_fast.policies.prompt_size import PROMPT_MEMORY
from pars_fast.simulation.arrays import Floats, Ints, Records, compiled
from pars_fast.simulation.heaps import EMPTY, meld, pop

(NO_GUARD, FIXED_THRESHOLD, RELATIVE_AGEING, UNIBOOST, IDLE_QUANTUM, OVERTAKING_BUDGET,
 PASSING_LIMIT) = range(7)
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
    prompt_work: float  # of a prompt token in a key, in output tokens
    uses_ranker: bool  # keys come with scores; else both are known at arrival, if there are any
    charges: bool  # whether the guard counts what later arrivals take, in tokens or requests


REQUEST = np.dtype([
    ("arrival_s", "f8"),
    ("seen_s", "f8"),  # end of the step in which it arrived: the live queue's time of arrival
    ("arrival_step", "i8"),
    ("prompt_tokens", "i8"),
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
    ("budget", "f8"),  # at arrival
    ("ahead", "f8"),  # what waited ahead of it at arrival, tokens or requests
    ("higher", "i8"),  # a later arrival that met a longer queue, EMPTY while there is none
    ("lower", "i8"),  # the last arrival before it that met a longer queue
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
    ("median", "f8"),  # of scores, in tokens
    ("typical_prompt", "f8"),  # tokens, 0 before the first arrival
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


def make_queue(arrival_s: Floats, prompt_tokens: Ints, key: Floats, expected: Floats, engines: int) -> Queue:
    """Empty queues for requests with known keys and scores; both are seen only once they have come."""
    count = len(arrival_s)
    request, engine = np.recarray(count, REQUEST), np.recarray(engines, ENGINE)
    for records in (request, engine):
        records[...] = np.zeros((), records.dtype)
    for name in ("after", "to_score", "child", "sibling", "lane_child", "lane_sibling", "guard_child",
                 "guard_sibling", "unscored_child", "unscored_sibling", "higher", "lower"):
        request[name] = EMPTY
    for name in ("keyed", "lane", "later", "urgent", "unscored_later", "last", "oldest", "unscored",
                 "to_score"):
        engine[name] = EMPTY
    request.arrival_s, request.prompt_tokens, request.key = arrival_s, prompt_tokens, key
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
    requests = q.request
    here = q.engine[e]
    newest = here.last
    if newest == EMPTY:
        here.oldest = here.unscored = i
    else:
        requests[newest].after = i
    here.last = i
    requests[i].place = here.num_arrivals
    here.num_arrivals += 1
    requests[i].seen_s, requests[i].arrival_step = seen_s, step
    share = PROMPT_MEMORY if here.typical_prompt > 0 else 1.0
    here.typical_prompt += share * (requests[i].prompt_tokens - here.typical_prompt)
    requests[i].waiting = True
    here.num_waiting += 1
    here.num_unscored += 1
    if order.uses_ranker:
        requests[i].to_score = here.to_score
        here.to_score = i
    else:
        _score(q, order, e, i)
    if order.charges:
        ahead = here.num_waiting - 1.0
        if order.guard == OVERTAKING_BUDGET:
            ahead = here.expected_waiting + here.num_unscored * here.median - _tokens(q, e, i)
        requests[i].ahead = ahead
        requests[i].budget = order.b + order.a * ahead
        while newest != EMPTY and requests[newest].ahead <= ahead:
            requests[newest].higher = i
            newest = requests[newest].lower
        requests[i].lower = newest
        if requests[i].place - here.tree_base >= here.tree_capacity:
            _rebuild_tree(q, e)
    if not order.uses_ranker:
        here.keyed = meld(here.keyed, i, requests.key, requests.child, requests.sibling)
    _watch(q, order, e, i)


@compiled
def take_scores(q: Queue, order: Order, e: int, now: float) -> None:
    """A step begins: what the ranker has finished is taken."""
    here = q.engine[e]
    while here.num_in_flight > 0 and q.in_flight_due_s[e, 0] <= now:
        due = q.in_flight_due_s[e, 0]
        taken = 0
        while taken < here.num_in_flight and q.in_flight_due_s[e, taken] == due:
            _score(q, order, e, q.in_flight[e, taken])
            taken += 1
        here.num_in_flight -= taken
        for k in range(here.num_in_flight):
            q.in_flight[e, k] = q.in_flight[e, taken + k]
            q.in_flight_due_s[e, k] = q.in_flight_due_s[e, taken + k]


@compiled
def hand_over(q: Queue, order: Order, e: int, now: float) -> None:
    """A step is scheduled: if it left requests waiting, the newest go to the ranker, 8 at once at most."""
    requests = q.request
    here = q.engine[e]
    while wants_scores(q, order, e):
        i = here.to_score
        here.to_score = requests[i].to_score
        if requests[i].waiting:
            q.in_flight[e, here.num_in_flight] = i
            q.in_flight_due_s[e, here.num_in_flight] = now + order.score_delay_s
            here.num_in_flight += 1


@compiled
def next_change_s(q: Queue, order: Order, e: int, now: float) -> float:
    """When the order may change though nobody comes or goes; infinity if never."""
    requests = q.request
    here = q.engine[e]
    change = q.in_flight_due_s[e, 0] if here.num_in_flight > 0 else math.inf
    if order.guard == FIXED_THRESHOLD or order.guard == RELATIVE_AGEING:
        time = requests[_earliest(q, order, e)].guard_key
        if time > now:
            change = min(change, time)
    return change


@compiled
def wants_scores(q: Queue, order: Order, e: int) -> bool:
    """Whether a prompt could be handed over now."""
    here = q.engine[e]
    return (order.uses_ranker and here.num_waiting > 0 and here.num_in_flight < MAX_IN_FLIGHT
            and here.to_score != EMPTY)


@compiled
def head(q: Queue, order: Order, e: int, now: float, step: int) -> int:
    """Who runs next at engine `e`, where someone waits."""
    requests = q.request
    here = q.engine[e]
    if here.lane != EMPTY:
        return here.lane
    chosen = _shortest(q, order, e)
    if order.guard == NO_GUARD:
        return chosen
    if order.charges:
        while True:
            older = _overdrawn(q, order, e, chosen, _cost(q, order, e, chosen))
            if older == EMPTY:
                return chosen
            chosen = older
    if order.guard == IDLE_QUANTUM:
        promoted = _promoted(q, order, e, step)
        return chosen if promoted == EMPTY else promoted
    due = _earliest(q, order, e)
    return due if order.guard == UNIBOOST or requests[due].guard_key <= now else chosen


@compiled
def admit(q: Queue, order: Order, e: int, i: int) -> None:
    """The request `i`, just given by `head`, leaves the queue and is charged to those it passes."""
    requests = q.request
    here = q.engine[e]
    if requests[i].preempted:
        here.lane = pop(i, requests.lane_key, requests.lane_child, requests.lane_sibling)
        requests[i].preempted = False
        if order.guard == PASSING_LIMIT:
            _charge(q, e, i, 1.0)
    elif order.charges:
        _charge(q, e, i, _cost(q, order, e, i))
    requests[i].waiting = False
    _account(q, e, i, -1)


@compiled
def preempt(q: Queue, order: Order, e: int, i: int) -> None:
    """A running request waits again, before all that were never admitted."""
    requests = q.request
    here = q.engine[e]
    unknown = order.uses_ranker and not requests[i].scored
    requests[i].lane_key = _typical_key(here, order) if unknown else requests[i].key
    requests[i].waiting = requests[i].preempted = True
    _account(q, e, i, 1)
    if order.guard == PASSING_LIMIT:
        _charge(q, e, i, -1.0)
    requests[i].lane_child = EMPTY
    here.lane = meld(here.lane, i, requests.lane_key, requests.lane_child, requests.lane_sibling)


@compiled
def finish(q: Queue, order: Order, e: int, i: int, output_tokens: int) -> None:
    """Correct what the request was charged to the tokens it made."""
    requests = q.request
    if order.guard == OVERTAKING_BUDGET:
        _charge(q, e, i, output_tokens - requests[i].charge)


# --- Order and scores ---------------------------------------------------------------------------------------


@compiled
def _tokens(q: Queue, e: int, i: int) -> float:
    requests = q.request
    here = q.engine[e]
    return requests[i].expected if requests[i].scored else here.median


@compiled
def _typical_key(here: Records, order: Order) -> float:
    """Of a request without a score."""
    return math.sqrt(here.median * (here.median + order.prompt_work * here.typical_prompt))


@compiled
def _cost(q: Queue, order: Order, e: int, i: int) -> float:
    """What the admission of `i` costs those it passes."""
    return 1.0 if order.guard == PASSING_LIMIT else _tokens(q, e, i)


@compiled
def _account(q: Queue, e: int, i: int, sign: int) -> None:
    requests = q.request
    here = q.engine[e]
    here.num_waiting += sign
    if requests[i].scored:
        here.expected_waiting += sign * requests[i].expected
    else:
        here.num_unscored += sign


@compiled
def _score(q: Queue, order: Order, e: int, i: int) -> None:
    """Request `i` gets its score, if it has one, waiting or not."""
    requests = q.request
    here = q.engine[e]
    if math.isnan(requests[i].expected):
        return
    if requests[i].waiting:
        _account(q, e, i, -1)
    requests[i].scored = True
    _add_to_median(q, e, requests[i].expected)
    if not requests[i].waiting:
        return
    _account(q, e, i, 1)
    if order.uses_ranker and not requests[i].preempted:
        here.keyed = meld(here.keyed, i, requests.key, requests.child, requests.sibling)
        if order.guard in (RELATIVE_AGEING, UNIBOOST):
            _watch(q, order, e, i)


@compiled
def _add_to_median(q: Queue, e: int, value: float) -> None:
    here = q.engine[e]
    ranked, recent = q.ranked[e], q.recent[e]
    size = min(here.num_scores, MEDIAN_WINDOW)
    slot = here.num_scores % MEDIAN_WINDOW
    if size == MEDIAN_WINDOW:
        size -= 1
        for k in range(_place(ranked, size, recent[slot]), size):
            ranked[k] = ranked[k + 1]
    recent[slot] = value
    place = _place(ranked, size, value)
    for k in range(size, place, -1):
        ranked[k] = ranked[k - 1]
    ranked[place] = value
    here.num_scores += 1
    here.median = ranked[(size + 1) // 2]


@compiled
def _place(ranked: Floats, size: int, value: float) -> int:
    """How many of the first `size` ascending values are below `value`."""
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        if ranked[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _shortest(q: Queue, order: Order, e: int) -> int:
    requests = q.request
    here = q.engine[e]
    while here.keyed != EMPTY and not requests[here.keyed].waiting:
        here.keyed = pop(here.keyed, requests.key, requests.child, requests.sibling)
    keyed = here.keyed
    if not order.uses_ranker:
        return keyed
    unscored = _oldest_unscored(q, e)
    if unscored == EMPTY:
        return keyed
    if keyed == EMPTY or (_typical_key(here, order), unscored) < (requests[keyed].key, keyed):
        return unscored
    return keyed


@compiled
def _oldest(q: Queue, e: int) -> int:
    """The oldest waiting request; the newest arrival if none waits."""
    requests = q.request
    here = q.engine[e]
    while not requests[here.oldest].waiting and requests[here.oldest].after != EMPTY:
        here.oldest = requests[here.oldest].after
    return here.oldest


@compiled
def _oldest_unscored(q: Queue, e: int) -> int:
    requests = q.request
    here = q.engine[e]
    i = here.unscored
    while i != EMPTY and (requests[i].scored or not requests[i].waiting) and requests[i].after != EMPTY:
        i = requests[i].after
    here.unscored = i  # the newest stays, so that the chain goes on from there
    return i if i != EMPTY and requests[i].waiting and not requests[i].scored else EMPTY


# --- Guards -------------------------------------------------------------------------------------------------


@compiled
def _guard_push(q: Queue, heap: int, i: int) -> int:
    requests = q.request
    return meld(heap, i, requests.guard_key, requests.guard_child, requests.guard_sibling)


@compiled
def _guard_pop(q: Queue, heap: int) -> int:
    requests = q.request
    return pop(heap, requests.guard_key, requests.guard_child, requests.guard_sibling)


@compiled
def _watch(q: Queue, order: Order, e: int, i: int) -> None:
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
        requests[i].guard_key = requests[i].seen_s + order.a * _tokens(q, e, i)
    else:
        requests[i].guard_key = requests[i].seen_s + order.a * math.log(_tokens(q, e, i))
    if requests[i].scored or order.charges or order.guard == IDLE_QUANTUM:
        here.later = _guard_push(q, here.later, i)
    else:
        requests[i].unscored_key = requests[i].guard_key
        here.unscored_later = meld(here.unscored_later, i, requests.unscored_key, requests.unscored_child,
                                   requests.unscored_sibling)


@compiled
def _earliest(q: Queue, order: Order, e: int) -> int:
    """The waiting request whose time comes first."""
    requests = q.request
    here = q.engine[e]
    if order.guard == FIXED_THRESHOLD:
        return _oldest(q, e)
    while here.later != EMPTY and not requests[here.later].waiting:
        here.later = _guard_pop(q, here.later)
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
        here.later = _guard_pop(q, i)
        if requests[i].waiting:
            requests[i].guard_key = _tokens(q, e, i)
            here.urgent = _guard_push(q, here.urgent, i)
    while here.urgent != EMPTY:
        i = here.urgent
        waited = step - requests[i].arrival_step
        if requests[i].waiting and waited % period >= order.a:
            return i
        here.urgent = _guard_pop(q, i)
        if requests[i].waiting:
            requests[i].guard_key = requests[i].arrival_step + waited // period * period + order.a
            here.later = _guard_push(q, here.later, i)
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
    return budget - _charged_beyond(q, e, i)


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
        here.later = _guard_pop(q, older)
        if not requests[older].waiting:
            continue
        remaining = _remaining(q, order, e, older)
        if remaining < cost:
            requests[older].guard_key = 0.0  # equal keys: order of arrival
            here.urgent = _guard_push(q, here.urgent, older)
        else:
            requests[older].guard_key = here.total_charge + remaining
            here.later = _guard_push(q, here.later, older)
    while here.urgent != EMPTY and here.urgent < i:
        oldest = here.urgent
        remaining = 0.0
        if requests[oldest].waiting:
            remaining = _remaining(q, order, e, oldest)
            if remaining < cost:
                return oldest
        here.urgent = _guard_pop(q, oldest)
        if requests[oldest].waiting:
            requests[oldest].guard_key = here.total_charge + remaining
            here.later = _guard_push(q, here.later, oldest)
    return EMPTY


# Charges: a Fenwick tree per engine whose element p sums a power of two of places up from p, so that both a
# charge and the sum beyond a place take O(log n). It starts at the oldest waiting request and grows with the
# queue.


@compiled
def _charge(q: Queue, e: int, i: int, tokens: float) -> None:
    requests = q.request
    here = q.engine[e]
    requests[i].charge += tokens
    here.total_charge += max(0.0, tokens)
    p = requests[i].place - here.tree_base + 1
    while p > 0:  # else nobody waits before it
        q.trees[here.tree_start + p] += tokens
        p -= p & -p


@compiled
def _charged_beyond(q: Queue, e: int, i: int) -> float:
    requests = q.request
    here = q.engine[e]
    p = requests[i].place - here.tree_base + 2
    total = 0.0
    while p <= here.tree_capacity:
        total += q.trees[here.tree_start + p]
        p += p & -p
    return total


@compiled
def _rebuild_tree(q: Queue, e: int) -> None:
    """Begin at the oldest waiting request; twice the room of the queue at least."""
    requests = q.request
    here = q.engine[e]
    i = _oldest(q, e)
    here.tree_base = requests[i].place
    span = here.num_arrivals - requests[i].place
    if here.tree_capacity < 2 * span:
        while here.tree_capacity < 2 * span:
            here.tree_capacity *= 2
        here.tree_start = q.trees_used[0]
        q.trees_used[0] += here.tree_capacity + 1
    start, capacity = here.tree_start, here.tree_capacity
    q.trees[start : start + capacity + 1] = 0.0
    while i != EMPTY:
        q.trees[start + 1 + requests[i].place - here.tree_base] = requests[i].charge
        i = requests[i].after
    for p in range(capacity, 0, -1):
        q.trees[start + p - (p & -p)] += q.trees[start + p]
