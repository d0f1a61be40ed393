"""Drives vLLM's real scheduler; only the model's output is made up.

How a step is driven follows vLLM's own tests/v1/core: `schedule`, a made-up token for every request whose
prompt is done, `update_from_output`.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from pars_fast.integration.scheduler import RankedAsyncScheduler, RankedScheduler

MakeRequest = Callable[..., Request]
MakeScheduler = Callable[..., Any]
TOKEN = 7

both_schedulers = pytest.mark.parametrize("scheduler_cls", [RankedScheduler, RankedAsyncScheduler])


class Engine:
    """Drives a scheduler as EngineCore does; an async one runs a step ahead of its output.

    `admitted` lists request ids in the order of their first admission, `tokens` what each was given,
    `steps` what every step scheduled.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.ahead = 1 if isinstance(scheduler, AsyncScheduler) else 0
        self.in_flight: deque[SchedulerOutput] = deque()
        self.admitted: list[str] = []
        self.tokens: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.steps: list[dict[str, int]] = []
        self.preemptions = 0

    def add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.scheduler.get_grammar_bitmask(output)
        self.in_flight.append(output)
        self.admitted += [request.req_id for request in output.scheduled_new_reqs]
        self.steps.append(dict(output.num_scheduled_tokens))
        self.preemptions += len(output.preempted_req_ids or ())
        while len(self.in_flight) > (self.ahead if output.total_num_scheduled_tokens else 0):
            self._finish_step(self.in_flight.popleft())

    def run(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_requests() and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.get_num_unfinished_requests()} requests never finished")

    def _finish_step(self, output: SchedulerOutput) -> None:
        ids = list(output.num_scheduled_tokens)
        outputs = self.scheduler.update_from_output(output, self._made_up(ids, output))
        for engine_outputs in outputs.values():
            for one in engine_outputs.outputs:
                self.tokens.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.finished.add(one.request_id)

    def _made_up(self, ids: list[str], output: SchedulerOutput) -> ModelRunnerOutput:
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled = [
            [TOKEN] if self._prompt_done(i, computed[i] + output.num_scheduled_tokens[i]) else [] for i in ids
        ]
        return ModelRunnerOutput(ids, {request_id: index for index, request_id in enumerate(ids)}, sampled)

    def _prompt_done(self, request_id: str, computed: int) -> bool:
        request = self.scheduler.requests.get(request_id)
        return request is not None and computed >= request.num_tokens
