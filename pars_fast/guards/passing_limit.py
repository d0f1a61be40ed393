"""A limit on how many requests may pass: counted against the longest queue since, whatever their lengths.

While request i waits, at most

    (1 + beta) * (most requests that waited before any arrival since i, i itself included) + floor

requests go ahead of it, those that were there before it and those that came later together. In order of
arrival the unluckiest of these arrivals has that queue ahead of it, so the longest wait of a rush is about
(1 + beta) times that of arrival order, if those who pass take no longer than others; they pass because they
are expected to take less. So the number of later arrivals that may still leave the queue before i is

    floor + (1 + beta) * longest queue since - requests before it at its arrival - later arrivals that left

Nobody passes a request for which this is below 1: the oldest such request runs instead. Against the
overtaking budget: it counts requests, not output tokens, because where prompts are long the output is the
smaller part of the work (`docs/simulator.md`), and because a count is exact whatever the scores; and its
limit grows while the queue does, because those who come later in a rush wait longer in any order. It reads no
clock.

So that a request is served even if the queue grows for ever, the longest queue counts up to 16 times the one
that the request met, itself taken for 256 at least (`docs/wait_bound.md`).

A request that is aborted while it waits counts as having gone ahead of those before it.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import REQUESTS, Guard, Limit

MAX_GROWTH = 16
GROWTH_FROM = 256  # requests


@dataclass(frozen=True, slots=True)
class PassingLimit(Guard):
    """`beta`: passing tolerated per request of the longest queue, a ratio; `floor_requests`: in any case."""

    beta: float = 0.5
    floor_requests: float = 0.0
    name: ClassVar[str] = "passing_limit"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be finite and >= 0, got {self.beta}")
        if not self.floor_requests >= 0:
            raise ValueError(f"floor_requests must be >= 0, got {self.floor_requests}")

    def limit(self) -> Limit:
        return Limit(REQUESTS, 1.0 + self.beta, self.floor_requests, MAX_GROWTH, GROWTH_FROM)
