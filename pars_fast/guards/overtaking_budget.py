"""The overtaking budget: a bound on how much work may go ahead of a request, whatever the scores.

When request i arrives it gets `budget_i = floor + beta * (expected tokens waiting ahead of it)`. Every
request that arrived later and is admitted before i is charged to i. Nobody passes a request whose budget
would go below zero, so at most (1 + beta) times the work of arrival order plus a constant is ever ahead
of a request (`docs/wait_bound.md`). It counts tokens, reads no clock, and is kept on the host.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import TOKENS, Guard, Limit


@dataclass(frozen=True, slots=True)
class OvertakingBudget(Guard):
    """`beta`: extra work tolerated per token ahead at arrival, a ratio; `floor_tokens`: a fixed allowance."""

    beta: float = 0.5
    floor_tokens: float = 2000.0
    name: ClassVar[str] = "overtaking_budget"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be finite and >= 0, got {self.beta}")
        if not self.floor_tokens >= 0:
            raise ValueError(f"floor_tokens must be >= 0, got {self.floor_tokens}")

    def limit(self) -> Limit:
        return Limit(TOKENS, self.beta, self.floor_tokens)
