"""Applications in the order in which ideal fair sharing would finish them: Justitia.

Source: Justitia (arXiv 2510.17015). Cost of a request: the KV cache tokens it holds, summed over its steps,
p * d + d^2 / 2 with p prompt and d output tokens. The demand of an application, the cost of all its requests,
is predicted when its first one arrives and gives its virtual finish time (`FairShare`); whoever has the
lowest runs next, and nothing is preempted for it.

What the paper leaves open here, and how it is filled:
- The rate of service. The paper has M, the engine's KV tokens, always in use. Here each step serves what it
  really holds, so that an engine whose seats run out before its memory is shared as fairly, and virtual time
  needs no clock: a step is the unit of time.
- An application that goes on after its predicted demand is served in the ideal joins anew, behind its share.
  So an id that lives for ever cannot stay first, and nothing is remembered of applications that are done.
"""

from collections.abc import Sequence
from typing import Any

from pars_fast.policies.applications import application_of
from pars_fast.policies.demand import ConstantDemand, Demand
from pars_fast.policies.fair_share import FairShare
from pars_fast.policies.sharing import SharingPolicy


class Justitia(SharingPolicy):
    """Key: virtual finish time of the request's application, in KV tokens times steps."""

    def __init__(self, demand: Demand | None = None) -> None:
        self._demand = demand or ConstantDemand()
        self._share = FairShare()

    def key_on_arrival(self, request: Any) -> float:
        application = application_of(request)
        finish = self._share.finish_of(application.id)
        if finish is None:
            demand = self._demand(application, request.num_prompt_tokens)
            finish = self._share.join(application.id, demand)
        return finish

    def planned(self, requests: Sequence[Any], num_tokens: Sequence[int]) -> None:
        self._share.serve(sum(request.num_computed_tokens for request in requests))
