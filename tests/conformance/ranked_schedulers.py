"""A pytest plug-in that puts the ranked scheduler in the place of vLLM's in vLLM's own tests.

`pytest -p tests.conformance.ranked_schedulers` with CONFORMANCE_SCORES=arrival or reversed: every scheduler
that a test builds is ranked, every request has its score as soon as it is in the queue (so the load gate is
open all the time), which alone is its key, and no guard and no calibration comes between. vLLM's tests do
not ask for the grammar bitmask, where an engine's next step is planned, so that is done after each step.
CONFORMANCE_POPS names the file to which the number of requests popped from our queue is written at the end.
Unset, all stays stock.

Order of arrival is the order in which requests came to the scheduler, and under vLLM's own priority policy
that of `arrival_time`, as it is in stock vLLM.
"""

import os
import time
import weakref
from pathlib import Path

import pytest

SCORES = os.environ.get("CONFORMANCE_SCORES")
LONGEST = 32_000  # expected tokens of the first arrival when the order is reversed
STARTED = time.time()
popped = 0


def pytest_configure() -> None:
    """Before any test module imports a scheduler by its name."""
    if SCORES is None:
        return
    os.environ |= {
        "PARS_POLICY": "pars", "PARS_GUARD": "none", "PARS_CALIBRATION": "0", "PARS_LOG_EVERY_S": "0"
    }  # fmt: skip
    import vllm.v1.core.sched.async_scheduler as async_module
    import vllm.v1.core.sched.scheduler as sync_module
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.request_queue import SchedulingPolicy
    from vllm.v1.request import Request

    from pars_fast.integration import scheduler as ours
    from pars_fast.integration.queue import RankedRequestQueue

    ours.make_runtime = lambda settings, vllm_config: _NoRanker()  # type: ignore
    by_time: weakref.WeakSet[RankedRequestQueue] = weakref.WeakSet()  # arrival_time decides among equals
    mixin_init, schedule = ours.RankingMixin.__init__, ours.RankingMixin.schedule
    add_request, pop_request = RankedRequestQueue.add_request, RankedRequestQueue.pop_request

    def init(self: ours.RankingMixin, *args: object, **kwargs: object) -> None:
        mixin_init(self, *args, **kwargs)
        if self.policy is SchedulingPolicy.PRIORITY:  # type: ignore[attr-defined]
            by_time.add(self.waiting)

    def schedule_and_plan_ahead(self: ours.RankingMixin, *args: object, **kwargs: object) -> SchedulerOutput:
        output = schedule(self, *args, **kwargs)
        self._keep_books(plan_ahead=True)
        return output

    def add_scored(self: RankedRequestQueue, request: Request) -> None:
        add_request(self, request)
        entry = self.entries[request.request_id]
        if entry.key is None:
            position = _seconds(request.arrival_time) if self in by_time else float(entry.seq)
            self.set_expected_tokens(entry, 1 + position if SCORES == "arrival" else LONGEST - position)

    def pop_counted(self: RankedRequestQueue) -> Request:
        global popped
        popped += 1
        return pop_request(self)

    ours.RankingMixin.__init__ = init  # type: ignore[method-assign,assignment]
    ours.RankingMixin.schedule = schedule_and_plan_ahead  # type: ignore[method-assign]
    RankedRequestQueue.add_request = add_scored  # type: ignore[method-assign]
    RankedRequestQueue.pop_request = pop_counted  # type: ignore[method-assign]
    sync_module.Scheduler = ours.RankedScheduler
    async_module.AsyncScheduler = ours.RankedAsyncScheduler


def pytest_sessionfinish(session: pytest.Session) -> None:
    if file := os.environ.get("CONFORMANCE_POPS"):
        Path(file).write_text(str(popped))


def _seconds(arrival_time: float) -> float:
    """In the order of `arrival_time`, which tests count from 0 or read from the clock; below 30,000."""
    return arrival_time if arrival_time < 10_000 else 10_000 + min(max(arrival_time - STARTED, 0), 20_000)


class _NoRanker:
    """A runtime that is never ready: scores come from the queue's own `add_request`."""

    max_in_flight = 0
    weighs_prompts = False

    def start(self) -> "_NoRanker":
        return self

    def submit(self, prompts: object) -> bool:
        return False

    def poll(self) -> list[tuple[int, float]]:
        return []

    def order(self) -> None: ...

    def forget(self, seqs: object) -> None: ...

    def failure(self) -> None: ...

    def close(self) -> None: ...
