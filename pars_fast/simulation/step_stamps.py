"""A scheduler that writes down every step: what it planned and how long it took.

For `pars-fast profile`, which serves a model by vLLM with `--scheduler-cls` set to `StampedScheduler` and
reads the file that `STAMPS_FILE_VARIABLE` names. Runs in EngineCore; overrides `schedule` and
`update_from_output`, each around `super()`. Source: vllm/v1/core/sched/scheduler.py, 0.32.
"""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.profile import STAMP, STAMPS_FILE_VARIABLE
from pars_fast.simulation.step_time import step_work


class StampedScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not followed
    """Stock vLLM's scheduler. A step lasts until the next one is planned, or until nothing is left to do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        path = Path(os.environ[STAMPS_FILE_VARIABLE])
        config = self.scheduler_config
        engine = EngineSettings(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kv_cache_tokens=(self.cache_config.num_gpu_blocks - 1) * self.block_size,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
        )
        path.with_suffix(".json").write_bytes(msgspec.json.encode(asdict(engine)))
        self._stamps = path.open("wb", buffering=0)  # the process may be killed at any time
        self._planned_at = 0.0
        self._work: tuple[int, int, int] | None = None

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._stamp()
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        tokens = output.num_scheduled_tokens
        self._work = step_work((self.requests[name] for name in tokens), tokens.values()) if tokens else None
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)
        if not self.has_unfinished_requests():
            self._stamp()
        return outputs

    def _stamp(self) -> None:
        now = time.perf_counter()
        if self._work is not None:
            self._stamps.write(STAMP.pack(*self._work, now - self._planned_at))
        self._planned_at, self._work = now, None
