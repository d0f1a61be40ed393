"""The overtaking budget: a bound on how much work may go ahead of a request, whatever the scores.

When request i arrives it gets `budget_i = floor + beta * (expected tokens waiting ahead of it)`. Every
request that arrived later and is admitted before i is charged to i. Nobody passes a request whose budget
would go below zero, so at most (1 + beta) times the work of arrival order plus a constant is ever ahead
of a request (`docs/wait_bound.md`). It counts tokens, reads no clock, and is kept on the host.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Moment, WaitingRequest
from pars_fast.guards.charges import ChargedWatch


@dataclass(frozen=True, slots=True)
class OvertakingBudget:
    """`beta`: extra work tolerated per token ahead at arrival, a ratio; `floor_tokens`: a fixed allowance."""

    beta: float = 0.5
    floor_tokens: float = 2000.0
    name: ClassVar[str] = "overtaking_budget"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be finite and >= 0, got {self.beta}")
        if not self.floor_tokens >= 0:
            raise ValueError(f"floor_tokens must be >= 0, got {self.floor_tokens}")

    def watch(self) -> "Budgets":
        return Budgets(self)


class Budgets(ChargedWatch):
    """The budgets of one priority class, in tokens."""

    def __init__(self, settings: OvertakingBudget) -> None:
        super().__init__()
        self._settings = settings

    def arrive(self, request: WaitingRequest, tokens_ahead: float, now: Moment) -> None:
        budget = self._settings.floor_tokens + self._settings.beta * tokens_ahead
        self._give(request, budget, budget)  # nothing is charged to the newest yet

    def charge(self, seq: int, tokens: float) -> None:
        self._charge(seq, tokens)

    def ahead_of(self, seq: int, tokens: float, now: Moment) -> int | None:
        """The oldest waiting request that `seq` may not pass with `tokens` of work, or None."""
        return self._overdrawn_by(seq, tokens, max(tokens, now.typical_tokens))
