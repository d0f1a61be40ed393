"""The state of the waiting queues of many engines, in flat arrays.

Requests are numbered in order of arrival, which is `seq` in the live queue. Per engine there is one chain of
all its arrivals (`after`), along which the oldest waiting one and the oldest without a score move.
"""

from typing import NamedTuple

import numpy as np

from pars_fast.host_index import MAX_EXPECTED_TOKENS
from pars_fast.simulation.arrays import Floats, Ints, Records, compiled
from pars_fast.simulation.heaps import EMPTY

# As in `HostIndex` and `ProcessRuntime`; typed again, since compiled code is kept until a file listed in
# `fleet.py` changes, and the latter needs vLLM's packages.
INITIAL_MEDIAN = 128.0
MEDIAN_WINDOW = 511
MAX_IN_FLIGHT = 4

_FIRST_CAPACITY = 64  # of an engine's tree

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


@compiled
def expected_tokens(q: Queue, e: int, i: int) -> float:
    """Of the answer; the median for a request without a score."""
    return q.request[i].expected if q.request[i].scored else q.engine[e].median


@compiled
def oldest_waiting(q: Queue, e: int) -> int:
    """The newest arrival if none waits."""
    requests = q.request
    here = q.engine[e]
    while not requests[here.oldest].waiting and requests[here.oldest].after != EMPTY:
        here.oldest = requests[here.oldest].after
    return here.oldest
