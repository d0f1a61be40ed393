"""A scheduler that writes down every step: what it planned and how long it took.

For what asks how long the steps of a real engine are: `pars-fast profile`, and the demo's server, whose runs
the simulator serves again. The file is the one that `STEP_LOG_VARIABLE` names. Runs in EngineCore; overrides
`schedule` and `update_from_output`, each around `super()`. Source: vllm/v1/core/sched/scheduler.py, 0.32.
"""

import os
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_log import STAMP, STEP_LOG_VARIABLE
from pars_fast.simulation.step_time import step_work


class StampedScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not followed
    """vLLM's, for `--scheduler-cls`; also to be mixed into a class made from it, before that one.

    A step lasts from the end of the one before it, or from when it was planned if nothing was left to do
    then, until its tokens are taken in: the whole loop of the engine, planned ahead or not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        path = Path(os.environ[STEP_LOG_VARIABLE])
        config = self.scheduler_config
        engine = EngineSettings(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kv_cache_tokens=(self.cache_config.num_gpu_blocks - 1) * self.block_size,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            enable_prefix_caching=self.cache_config.enable_prefix_caching,
        )
        path.with_suffix(".json").write_bytes(msgspec.json.encode(asdict(engine)))
        self._step_log = path.open("wb", buffering=0)  # the process may be killed at any time
        self._in_flight: deque[tuple[tuple[int, int, int] | None, float]] = deque()  # work, when planned
        self._last_step_ended: float | None = None  # None when nothing was left to do

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        planned_at = time.perf_counter()
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        tokens = output.num_scheduled_tokens
        work = step_work((self.requests[name] for name in tokens), tokens.values()) if tokens else None
        self._in_flight.append((work, planned_at))
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)
        now = time.perf_counter()
        work, planned_at = self._in_flight.popleft()
        if work is not None:
            began = planned_at if self._last_step_ended is None else self._last_step_ended
            self._step_log.write(STAMP.pack(*work, now - began))
        self._last_step_ended = now if self.has_unfinished_requests() else None
        return outputs
