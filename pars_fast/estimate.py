"""What ranking would gain on requests that were served: the queue replayed with a fixed number of seats."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pars_fast.guards import Guard
from pars_fast.host_index import HostIndex
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One served request, as a policy may see it; `service_s` is from admission to its last token.

    Times are in seconds.
    """

    arrival_s: float
    service_s: float
    expected_tokens: float
    output_tokens: int
    num_prompt_tokens: int


def mean_latencies(
    requests: Sequence[FinishedRequest], policy: str, guard: Guard, seats: int
) -> tuple[float, float]:
    """(mean seconds per output token, mean end-to-end seconds) of `requests`, ascending by arrival.

    Service times stay as they were observed: the estimate moves requests in the queue, not the engine.
    """
    index = HostIndex(POLICIES[policy](), guard)
    busy: list[tuple[float, int]] = []  # heap of (finish, position)
    entries: list[Entry] = []
    latency = np.zeros(len(requests))
    while len(entries) < len(requests) or busy:
        request = requests[len(entries)] if len(entries) < len(requests) else None
        if request is not None and (not busy or request.arrival_s <= busy[0][0]):
            now = request.arrival_s
            entries.append(Entry(len(entries), 0, request, arrival_s=now))
            if index.policy.uses_ranker:
                index.set_expected_tokens(entries[-1], request.expected_tokens)
            index.add(entries[-1])
        else:
            now, position = heapq.heappop(busy)
            index.finish(entries[position], requests[position].output_tokens)
        index.begin_step(now)
        while len(index) and len(busy) < seats:
            position = index.pop().seq
            heapq.heappush(busy, (now + requests[position].service_s, position))
            latency[position] = now + requests[position].service_s - requests[position].arrival_s
    tokens = np.array([request.output_tokens for request in requests])
    return float((latency / tokens).mean()), float(latency.mean())
