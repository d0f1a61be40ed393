"""The application that was served least runs next: the virtual token counter.

Source: VTC (arXiv 2401.00588), algorithm 2. A counter for each client, here an application, rises by the
prompt's tokens when a request is admitted and by 2 for every output token; the waiting request of the lowest
counter is admitted, its oldest one first. A client that comes back is lifted to the lowest counter of those
that wait, or to what the counter of the last one that left the queue has come to, so that idleness earns
nothing. Weights 1 and 2 are the paper's. A request that is preempted or skipped pays for its prompt once.

An application of which nothing is unfinished is forgotten once the lift would wipe its counter out anyway.
"""

import heapq
from collections.abc import Sequence
from typing import Any

from pars_fast.policies.applications import application_of
from pars_fast.policies.sharing import SharingPolicy

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
_SWEEP_FROM = 1024  # applications


class VirtualTokenCounter(SharingPolicy):
    """Key: the counter of the request's application, in weighted tokens."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._waiting: dict[str, set[str]] = {}  # request ids
        self._unfinished: dict[str, tuple[Any, str]] = {}  # by request id: request and application
        self._charged: set[str] = set()  # request ids
        self._lowest: list[tuple[float, str]] = []  # heap over `_waiting`; counters there may be out of date
        self._last_left: str | None = None  # the last application that left the queue
        self._sweep_at = _SWEEP_FROM

    def key_on_arrival(self, request: Any) -> float:
        application = application_of(request).id
        self._unfinished[request.request_id] = (request, application)
        if application not in self._waiting:
            counter = max(self._counters.get(application, 0.0), self._lift())
            self._counters[application] = counter
            self._waiting[application] = set()
            heapq.heappush(self._lowest, (counter, application))
        self._waiting[application].add(request.request_id)
        return self._counters[application]

    def key_now(self, request: Any, key: float) -> float:
        _, application = self._unfinished.get(request.request_id, (None, ""))
        return self._counters.get(application, key)

    def admitted(self, request: Any) -> None:
        request_id = request.request_id
        _, application = self._unfinished.get(request_id, (None, ""))
        if application in self._counters and request_id not in self._charged:
            self._charged.add(request_id)
            self._counters[application] += PROMPT_WEIGHT * request.num_prompt_tokens
        self._leave(request_id, application)

    def planned(self, requests: Sequence[Any], num_tokens: Sequence[int]) -> None:
        for request in requests:
            if not request.is_prefill_chunk:  # it makes a token
                _, application = self._unfinished.get(request.request_id, (None, ""))
                if application in self._counters:
                    self._counters[application] += OUTPUT_WEIGHT

    def ended(self, request: Any) -> None:
        known, application = self._unfinished.get(request.request_id, (None, ""))
        if known is not request:  # its id is in use again
            return
        del self._unfinished[request.request_id]
        self._charged.discard(request.request_id)
        self._leave(request.request_id, application)
        if len(self._counters) > self._sweep_at:
            self._sweep()

    def _leave(self, request_id: str, application: str) -> None:
        waiting = self._waiting.get(application)
        if waiting is not None:
            waiting.discard(request_id)
            if not waiting:
                del self._waiting[application]
                self._last_left = application

    def _lift(self) -> float:
        """The lowest counter of those that wait; if there is none, the present one of the last that left."""
        while self._lowest:
            counter, application = self._lowest[0]
            if application not in self._waiting:
                heapq.heappop(self._lowest)
            elif self._counters[application] > counter:
                heapq.heapreplace(self._lowest, (self._counters[application], application))
            else:
                return counter
        return 0.0 if self._last_left is None else self._counters[self._last_left]

    def _sweep(self) -> None:
        lift, busy = self._lift(), {application for _, application in self._unfinished.values()}
        self._counters = {
            application: counter
            for application, counter in self._counters.items()
            if counter > lift or application in busy or application == self._last_left
        }
        self._sweep_at = max(_SWEEP_FROM, 2 * len(self._counters))
