"""A scheduler that changes its policy between drained runs, so that the demo starts one server for all.

Only the demo has this switch: the policy's name is read from the file that PARS_DEMO_POLICY_FILE names,
when a request finds the engine empty. Every step is written down, so that the simulator can serve a run again
with the times that its steps had.
"""

import os
from dataclasses import replace
from pathlib import Path

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from pars_fast.demo.scheduler_switch import POLICY_FILE_VARIABLE, parse_policy
from pars_fast.integration.overhead import OverheadMedian
from pars_fast.integration.preemption import Preemption
from pars_fast.integration.scheduler import with_ranking
from pars_fast.simulation.step_stamps import StampedScheduler


class _PolicySwitch(StampedScheduler):
    """Mixed into a ranked scheduler, which then runs under whichever policy the file names."""

    def add_request(self, request: Request) -> None:
        if not self.requests and not self._failed:  # after that there is no order to change
            name, guard = parse_policy(Path(os.environ[POLICY_FILE_VARIABLE]).read_text().strip())
            policy = self._make_policy(replace(self._settings, policy=name))
            self._preemption = Preemption(self, self.waiting) if policy.preempts else None
            self.waiting.index.set_policy(policy, guard or self._settings.guard_of(policy))
            self._overhead = OverheadMedian()
        super().add_request(request)


class SwitchableScheduler(_PolicySwitch, with_ranking(Scheduler)):  # type: ignore[misc]
    """On vLLM's scheduler, which engines on a CPU run."""


class SwitchableAsyncScheduler(_PolicySwitch, with_ranking(AsyncScheduler)):  # type: ignore[misc]
    """On the one that plans a step ahead, which engines on a GPU run."""
