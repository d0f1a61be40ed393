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
  So an id that lives for ever cannot stay first.
- An application that needs less than was predicted. While nothing of it is unfinished, the ideal has it need
  what its requests have really cost: when that is served it is one less to share, and virtual time goes
  faster for the others. If it goes on, it is back at its first finish time: it may be between two stages.
- Nothing is remembered once nothing at all is unfinished: the ideal engine, too, has nothing to do.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pars_fast.policies.applications import application_of
from pars_fast.policies.demand import ConstantDemand, Demand
from pars_fast.policies.fair_share import FairShare
from pars_fast.policies.sharing import SharingPolicy

_MAX_PAUSED = 4096  # applications with nothing unfinished that are remembered, the last ones


@dataclass(slots=True)
class _Joined:
    """An application since it joined: virtual times, requests, and the cost of those that have ended."""

    at: float
    finish: float
    unfinished: int = 0
    cost: float = 0.0


class Justitia(SharingPolicy):
    """Key: virtual finish time of the request's application, in KV tokens times steps."""

    def __init__(self, demand: Demand | None = None) -> None:
        self._demand = demand or ConstantDemand()
        self._unfinished: dict[str, tuple[Any, str]] = {}  # by request id: request and application
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._share = FairShare()
        self._busy: dict[str, _Joined] = {}  # applications with unfinished requests
        self._paused: OrderedDict[str, _Joined] = OrderedDict()

    def key_on_arrival(self, request: Any) -> float:
        application = application_of(request)
        joined = self._busy.get(application.id) or self._paused.pop(application.id, None)
        if joined is None or joined.finish <= self._share.virtual_time:
            demand = self._demand(application, request.num_prompt_tokens)
            finish = self._share.join(application.id, demand)
            unfinished = 0 if joined is None else joined.unfinished
            joined = _Joined(self._share.virtual_time, finish, unfinished)
        elif not joined.unfinished:
            self._share.move(application.id, joined.finish)
        joined.unfinished += 1
        self._busy[application.id] = joined
        self._unfinished[request.request_id] = (request, application.id)
        return joined.finish

    def planned(self, requests: Sequence[Any], num_tokens: Sequence[int]) -> None:
        self._share.serve(sum(request.num_computed_tokens for request in requests))

    def ended(self, request: Any) -> None:
        known, application = self._unfinished.get(request.request_id, (None, ""))
        if known is not request:  # it never waited here, or its id is in use again
            return
        del self._unfinished[request.request_id]
        if not self._unfinished:
            self._begin_anew()
            return
        joined = self._busy[application]
        prompt, output = request.num_prompt_tokens, request.num_output_tokens
        joined.cost += prompt * output + output * output / 2
        joined.unfinished -= 1
        if not joined.unfinished:
            self._pause(application, joined)

    def _pause(self, application: str, joined: _Joined) -> None:
        self._share.move(application, min(joined.finish, joined.at + joined.cost))
        self._paused[application] = self._busy.pop(application)
        if len(self._paused) > _MAX_PAUSED:
            self._paused.popitem(last=False)
