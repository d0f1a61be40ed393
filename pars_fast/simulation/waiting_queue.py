"""The waiting queues of many engines: `HostIndex` and the guards, compiled.

The order is `HostIndex`'s: preempted requests first, then the lowest key, a request without a score having
that of the running median; the guard (`queue_guards.py`) may put another request ahead. Prompts go to the
ranker as `RankingLoop` hands them over.
"""

import math

from pars_fast.policies.prompt_size import PROMPT_MEMORY
from pars_fast.simulation.arrays import Floats, Records, compiled
from pars_fast.simulation.charge_tree import charge
from pars_fast.simulation.heaps import EMPTY, meld, pop
from pars_fast.simulation.queue_guards import (
    OVERTAKING_BUDGET,
    PASSING_LIMIT,
    RELATIVE_AGEING,
    UNIBOOST,
    Order,
    guarded,
    next_due_s,
    passing_cost,
    set_budget,
    watch,
)
from pars_fast.simulation.queue_state import MAX_IN_FLIGHT, MEDIAN_WINDOW, Queue

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
        set_budget(q, order, e, i, newest)
    if not order.uses_ranker:
        here.keyed = meld(here.keyed, i, requests.key, requests.child, requests.sibling)
    watch(q, order, e, i)


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
    """A step is scheduled: if it left requests waiting, the newest go to the ranker, a few at once."""
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
    here = q.engine[e]
    change = q.in_flight_due_s[e, 0] if here.num_in_flight > 0 else math.inf
    return min(change, next_due_s(q, order, e, now))


@compiled
def wants_scores(q: Queue, order: Order, e: int) -> bool:
    """Whether a prompt could be handed over now."""
    here = q.engine[e]
    return (order.uses_ranker and here.num_waiting > 0 and here.num_in_flight < MAX_IN_FLIGHT
            and here.to_score != EMPTY)


@compiled
def head(q: Queue, order: Order, e: int, now: float, step: int) -> int:
    """Who runs next at engine `e`, where someone waits."""
    here = q.engine[e]
    if here.lane != EMPTY:
        return here.lane
    return guarded(q, order, e, _shortest(q, order, e), now, step)


@compiled
def admit(q: Queue, order: Order, e: int, i: int) -> None:
    """The request `i`, just given by `head`, leaves the queue and is charged to those it passes."""
    requests = q.request
    here = q.engine[e]
    if requests[i].preempted:
        here.lane = pop(i, requests.lane_key, requests.lane_child, requests.lane_sibling)
        requests[i].preempted = False
        if order.guard == PASSING_LIMIT:
            charge(q, e, i, 1.0)
    elif order.charges:
        charge(q, e, i, passing_cost(q, order, e, i))
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
        charge(q, e, i, -1.0)
    requests[i].lane_child = EMPTY
    here.lane = meld(here.lane, i, requests.lane_key, requests.lane_child, requests.lane_sibling)


@compiled
def finish(q: Queue, order: Order, e: int, i: int, output_tokens: int) -> None:
    """Correct what the request was charged to the tokens it made."""
    requests = q.request
    if order.guard == OVERTAKING_BUDGET:
        charge(q, e, i, output_tokens - requests[i].charge)


# --- Order and scores ---------------------------------------------------------------------------------------


@compiled
def _typical_key(here: Records, order: Order) -> float:
    """Of a request without a score."""
    return math.sqrt(here.median * (here.median + order.prompt_work * here.typical_prompt))


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
            watch(q, order, e, i)


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
def _oldest_unscored(q: Queue, e: int) -> int:
    requests = q.request
    here = q.engine[e]
    i = here.unscored
    while i != EMPTY and (requests[i].scored or not requests[i].waiting) and requests[i].after != EMPTY:
        i = requests[i].after
    here.unscored = i  # the newest stays, so that the chain goes on from there
    return i if i != EMPTY and requests[i].waiting and not requests[i].scored else EMPTY
