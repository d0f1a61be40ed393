"""One knob between order of arrival and shortest first: a request's arrival is moved by its length.

Requests run by `arrival_s + knob * ln(expected tokens)`: at 0 in order of arrival, at infinity shortest
first, and in between a request of a tenth of the length overtakes those that came at most 2.3 knobs before.

Source: UniBoost (arXiv 2606.18431), whose knob gamma goes from shortest first (0) to order of arrival
(infinity), after gamma-Boost (Yu and Scully, 2024), which serves by arrival less `(1/gamma) ln(1 / (1 -
exp(-gamma s)))` for a job of s seconds. For answers short against 1/gamma that is, up to a constant, the
order above with knob = 1/gamma, and it needs no seconds per token. UniBoost itself predicts no lengths and
preempts running requests; left out here, since vLLM's running requests are not preempted by order. Only its
abstract and project page were read, so its own boost function may differ.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Guard, Watch
from pars_fast.guards.deadlines import Deadlines


@dataclass(frozen=True, slots=True)
class UniBoost(Guard):
    """`knob`: seconds of arrival that a factor of e in the expected length is worth."""

    knob: float = 10.0
    name: ClassVar[str] = "uniboost"

    def __post_init__(self) -> None:
        if not 0 <= self.knob < math.inf:
            raise ValueError(f"knob must be finite and >= 0, got {self.knob}")

    def watch(self) -> Watch:
        return Deadlines(lambda expected_tokens: self.knob * math.log(expected_tokens), always=True)
