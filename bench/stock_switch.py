"""One scheduler object that is vLLM's own or the ranked one, changed while the engine is empty.

Servers side by side on two cores were seen to differ by up to a tenth for as long as they ran, and not always
the same way. So a difference of a few per cent shows within one process only.
"""

import os
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from pars_fast.integration.scheduler import with_ranking

STOCK, RANKED = "stock", "pars_fast"
KIND_VARIABLE = "BENCH_SCHEDULER_FILE"  # the file that names which one the next requests are to meet


class RankedKind(with_ranking(Scheduler)):  # type: ignore[misc]
    """What an engine starts with; its queue, while the other is on, is kept aside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._aside = create_request_queue(self.policy)

    def add_request(self, request: Request) -> None:
        if not self.requests and _kind() == STOCK:
            self._guarded(self._forget_ended)
            _become(self, StockKind)
            return self.add_request(request)
        return super().add_request(request)


class StockKind(RankedKind):
    """vLLM's scheduler with vLLM's queue: no line of ours but the look at the file, which both take.

    A subclass of the other, with vLLM's own methods put back, since Python changes an object's class only
    where both are laid out alike.
    """

    schedule, get_grammar_bitmask = Scheduler.schedule, Scheduler.get_grammar_bitmask

    def add_request(self, request: Request) -> None:
        if not self.requests and _kind() == RANKED:
            _become(self, RankedKind)
            return self.add_request(request)
        return Scheduler.add_request(self, request)


def _kind() -> str:
    return Path(os.environ[KIND_VARIABLE]).read_text()


def _become(scheduler: Any, kind: type) -> None:
    scheduler.__class__ = kind
    scheduler.waiting, scheduler._aside = scheduler._aside, scheduler.waiting
