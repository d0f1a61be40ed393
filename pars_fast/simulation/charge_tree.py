"""What later arrivals have taken ahead of each waiting request: a Fenwick tree of charges per engine.

Element p sums a power of two of places up from p, so that both a charge and the sum beyond a place take
O(log n). A tree starts at the oldest waiting request and grows with the queue.
"""

from pars_fast.simulation.arrays import compiled
from pars_fast.simulation.heaps import EMPTY
from pars_fast.simulation.queue_state import Queue, oldest_waiting


@compiled
def charge(q: Queue, e: int, i: int, cost: float) -> None:
    """Charge `cost` for the admission of `i` to those that arrived before it; less than 0 gives back."""
    requests = q.request
    here = q.engine[e]
    requests[i].charge += cost
    here.total_charge += max(0.0, cost)
    p = requests[i].place - here.tree_base + 1
    while p > 0:  # else nobody waits before it
        q.trees[here.tree_start + p] += cost
        p -= p & -p


@compiled
def charged_beyond(q: Queue, e: int, i: int) -> float:
    """What those that arrived after `i` have cost it."""
    here = q.engine[e]
    p = q.request[i].place - here.tree_base + 2
    total = 0.0
    while p <= here.tree_capacity:
        total += q.trees[here.tree_start + p]
        p += p & -p
    return total


@compiled
def make_room(q: Queue, e: int, i: int) -> None:
    """See that the tree has a place for `i`, which has just arrived.

    One that has not begins anew at the oldest waiting request, with twice the room of the queue at least.
    """
    requests = q.request
    here = q.engine[e]
    if requests[i].place - here.tree_base < here.tree_capacity:
        return
    first = oldest_waiting(q, e)
    here.tree_base = requests[first].place
    span = here.num_arrivals - requests[first].place
    if here.tree_capacity < 2 * span:
        while here.tree_capacity < 2 * span:
            here.tree_capacity *= 2
        here.tree_start = q.trees_used[0]
        q.trees_used[0] += here.tree_capacity + 1
    start, capacity = here.tree_start, here.tree_capacity
    q.trees[start : start + capacity + 1] = 0.0
    kept = first
    while kept != EMPTY:
        q.trees[start + 1 + requests[kept].place - here.tree_base] = requests[kept].charge
        kept = requests[kept].after
    for p in range(capacity, 0, -1):
        q.trees[start + p - (p & -p)] += q.trees[start + p]
