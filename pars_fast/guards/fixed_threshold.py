"""A fixed waiting time, after which a request goes first, in order of arrival: the guard of PARS.

Source: PARS (arXiv 2510.03243), which boosts a request that has waited for more than a threshold. Left open
there, and chosen here: the order of several such requests is that of arrival. Two minutes are reported
second hand.
"""

from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Guard, Watch
from pars_fast.guards.deadlines import Deadlines


@dataclass(frozen=True, slots=True)
class FixedThreshold(Guard):
    """A request that has waited for at least `seconds` goes first."""

    seconds: float = 120.0
    name: ClassVar[str] = "fixed_threshold"

    def __post_init__(self) -> None:
        if not self.seconds >= 0:
            raise ValueError(f"seconds must be >= 0, got {self.seconds}")

    def watch(self) -> Watch:
        return Deadlines(lambda expected_tokens: self.seconds)
