"""A waiting time in proportion to the expected answer, after which a request goes first.

Source: vLLM RFC #55265, where wait / expected length > 0.02 s/token worked and a threshold in seconds did
not (read second hand). Left open there, and chosen here: of several such requests, the one whose time was
up first goes first.
"""

from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Guard, Watch
from pars_fast.guards.deadlines import Deadlines


@dataclass(frozen=True, slots=True)
class RelativeAgeing(Guard):
    """A request that has waited for `s_per_token` seconds per expected output token goes first."""

    s_per_token: float = 0.02
    name: ClassVar[str] = "relative_ageing"

    def __post_init__(self) -> None:
        if not self.s_per_token >= 0:
            raise ValueError(f"s_per_token must be >= 0, got {self.s_per_token}")

    def watch(self) -> Watch:
        return Deadlines(lambda expected_tokens: self.s_per_token * expected_tokens)
