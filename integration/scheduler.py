"""vLLM's scheduler with a ranked waiting queue.

Runs in EngineCore. Replaces `self.waiting` after `super().__init__` and overrides `schedule`,
`get_grammar_bitmask` and `shutdown` around `super()`; no line of vLLM's loop is copied. What can be done when
the engine asks for the bitmask, which is after it has given the step to the model, is done there, and on a
GPU costs the step nothing: the bookkeeping, and planning who runs next in the coming step. Who has
finished since the last step is what the scheduler tells the workers, `finished_req_ids`. Source:
vllm/v1/core/sched/scheduler.py and vllm/v1/engine/core.py, 0.29 to 0.32.
"""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler

from pars_fast.guards import guard_text
from pars_fast.host_index import HostIndex, warm_up
from pars_fast.integration.background import Background
from pars_fast.integration.calibration import LiveCalibration
from pars_fast.integration.learning import Learning
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.overhead import OverheadMedian
from pars_fast.integration.preemption import Preemption
from pars_fast.integration.prefix_cache import PrefixCache
from pars_fast.integration.queue import RankedRequestQueue
from pars_fast.integration.ranking_loop import RankingLoop
from pars_fast.integration.runtime import RankerRuntime
from pars_fast.integration.runtime_choice import make_policy, make_recorder, make_runtime
from pars_fast.integration.shadow import ShadowReport
from pars_fast.integration.status_line import StatusLine
from pars_fast.policies import Policy
from pars_fast.policies.fcfs import FCFS
from pars_fast.settings import Settings

logger = logging.getLogger("vllm.pars_fast")

TIMED_EVERY_STEPS = 15  # the overhead of one step in so many is measured; prime to the number below
# After a step up to this long the next one goes as was planned while the model ran; what came meanwhile, a
# request or a score, waits one step. After a longer one it is planned with: there 0.1 ms are not missed.
SHORT_STEP_S = 0.025
# Counters are shown to `/metrics` then, and when a queue has formed or gone; while nobody waits, late scores
# are taken and what was served is learnt from then, or when somebody has ended.
UPKEEP_EVERY_STEPS = 8
LEARN_S = 1.0  # at the end, for what has not been learnt yet
RECORD_FLUSH_S = 5.0  # at the end, for what is not yet written


class RankingMixin:
    """Goes before a vLLM scheduler class; see `with_ranking`.

    `clock`, `_read_settings`, `_make_policy` and `_make_runtime` are what a simulation replaces; all else is
    the same there.
    """

    waiting: RankedRequestQueue
    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings = self._read_settings()
        config = self.vllm_config  # type: ignore[attr-defined]
        policy = self._make_policy(settings)
        guard = settings.guard_of(policy)
        self.waiting = RankedRequestQueue(
            HostIndex(policy, guard, cached_tokens=self._prefix_cache()),
            use_priorities=self.policy is SchedulingPolicy.PRIORITY,  # type: ignore[attr-defined]
            trust_caller=settings.trust_caller,
            clock=self.clock,
            on_failure=self._fall_back,
        )
        engine = config.parallel_config.data_parallel_index
        self._counters = CounterFile(os.environ.get("PARS_METRICS_DIR"), engine)
        self._background = background = Background("pars-fast", max_jobs=1000)
        self._status_line = StatusLine(self._counters, background, settings.log_every_s, self.clock)
        self._calibration = LiveCalibration(
            self._counters, min_tau=settings.min_tau, enabled=settings.calibration
        )
        self._recorder = make_recorder(settings, config, self._counters)
        self._overhead = OverheadMedian()
        self._steps = 0
        self._spent_ns: int | None = None  # of a step whose overhead is taken, so far
        self._planned: SchedulerOutput | None = None  # a step that is planned and not yet in the books
        self._left_waiting = False
        self._failed = False
        self._shadow: ShadowReport | None = None
        if settings.mode == "shadow":
            self.waiting.set_ranking(False)
            self._shadow = ShadowReport(config.scheduler_config.max_num_seqs, guard, background, self.clock)
        self._learning = Learning(
            self._calibration,
            self._counters.histograms["pars_queue_wait_seconds"],
            self._shadow,
            self._recorder,
            background,
        )
        self._preemption = Preemption(self, self.waiting) if policy.preempts else None
        self._ranking_loop: RankingLoop | None = None
        if policy.uses_ranker:
            self._ranking_loop = RankingLoop(
                self.waiting,
                self._make_runtime(settings),
                self._counters,
                self._calibration,
                self._learning,
                stale_after_s=settings.stale_after_s,
                shadow=self._shadow is not None,
                clock=self.clock,
            )
        self._guarded(warm_up)
        logger.info(
            "pars-fast: waiting queue ordered by %s, guard %s, mode %s",
            settings.policy, guard_text(guard), settings.mode,
        )

    def _read_settings(self) -> Settings:
        return Settings.from_environ()

    def _make_policy(self, settings: Settings) -> Policy:
        return make_policy(settings, self.vllm_config)  # type: ignore[attr-defined]

    def _make_runtime(self, settings: Settings) -> RankerRuntime:
        return make_runtime(settings, self.vllm_config)  # type: ignore[attr-defined]

    def _prefix_cache(self) -> PrefixCache:
        return PrefixCache(self.kv_cache_manager, self.block_size)  # type: ignore[attr-defined]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._failed:
            with contextlib.suppress(Exception):
                self._forget_ended()  # else all that was ever served would be kept
            output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
            self._counters.values["pars_waiting"] = float(len(self.waiting))
            self._counters.write()
            return output
        if self._planned is not None:  # no bitmask was asked for: nothing to sample
            self._guarded(self._keep_books)
        self._steps += 1
        if self._steps % TIMED_EVERY_STEPS:
            self._guarded(self._before_step)
            return self._plan(*args, **kwargs)
        return self._timed_schedule(*args, **kwargs)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> Any:
        bitmask = super().get_grammar_bitmask(scheduler_output)  # type: ignore[misc]
        if self._planned is not None:
            self._guarded(self._keep_books, plan_ahead=True)
        return bitmask

    def _timed_schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """A step whose overhead is taken; reading the clock would double that of every step."""
        self.waiting.spent_ns, self.waiting.timed = 0, True
        started = time.perf_counter_ns()
        self._guarded(self._before_step)
        spent_ns = time.perf_counter_ns() - started
        output = self._plan(*args, **kwargs)
        self._spent_ns = spent_ns + self.waiting.spent_ns
        self.waiting.timed = False
        return output

    def _plan(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's own step; a policy that shares the engine is told of it."""
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._planned = output
        if self.waiting.index.sharing is not None:
            self._guarded(functools.partial(self._tell_planned, output))
        return output

    def _tell_planned(self, output: SchedulerOutput) -> None:
        num_tokens, requests = output.num_scheduled_tokens, self.requests  # type: ignore[attr-defined]
        sharing = self.waiting.index.sharing
        assert sharing is not None
        sharing.planned([requests[request_id] for request_id in num_tokens], list(num_tokens.values()))

    def shutdown(self) -> None:
        try:
            self._close()
        except Exception as error:
            self._fall_back(error)
        finally:
            super().shutdown()  # type: ignore[misc]

    def _close(self) -> None:
        """After a failure, too: what was learnt and recorded until then is kept."""
        try:
            loop, self._ranking_loop = self._ranking_loop, None
            if loop is not None:
                loop.close()
            self._forget_ended()
            self._learning.ended(self.waiting.forgotten, self.clock())
            self.waiting.forgotten = []
            self._learning.flush()
            self._background.drain(LEARN_S)
        finally:
            if self._recorder is not None:
                self._recorder.flush(RECORD_FLUSH_S)

    def _before_step(self) -> None:
        queue = self.waiting
        if queue.index.needs_endings:
            self._forget(self.finished_req_ids)  # type: ignore[attr-defined]
        now_s = self.clock()
        room = self.max_num_running_reqs - len(self.running)  # type: ignore[attr-defined]
        long = now_s - queue.step_s > SHORT_STEP_S
        if long and self._ranking_loop is not None:
            self._ranking_loop.before_step()
        queue.begin_step(now_s, room, plan_anew=long)
        if self._preemption is not None:
            self._predict_again()
            self._preemption.before_step()

    def _predict_again(self) -> None:
        """Hand over those that have made enough tokens since their last prediction."""
        every = self.waiting.index.policy.repredict_tokens
        if every is None or self._ranking_loop is None:
            return
        due = []
        for request in self.running:  # type: ignore[attr-defined]
            entry = self.waiting.entries.get(request.request_id)
            if entry is not None and request.num_output_tokens // every > entry.predictions:
                entry.predictions = request.num_output_tokens // every
                due.append(entry)
        self._ranking_loop.predict_again(due)

    def _keep_books(self, *, plan_ahead: bool = False) -> None:
        """Of the step that was planned last; while the model runs, if the engine asked for a bitmask.

        `plan_ahead`: there is time to find out who runs next in the coming step. Where nobody waits and
        nobody has ended, there is little to do, and that is done every few steps.
        """
        assert self._planned is not None
        started = time.perf_counter_ns() if self._spent_ns is not None else 0
        finished = self._planned.finished_req_ids
        if finished or self._left_waiting or self.waiting or self._steps % UPKEEP_EVERY_STEPS == 0:
            self._after_step(finished)
            if plan_ahead:
                self.waiting.plan_ahead()
        self._planned = None
        if self._spent_ns is not None:
            self._overhead.add(self._spent_ns + time.perf_counter_ns() - started)
            self._spent_ns = None
            self._counters.values["pars_step_overhead_us_p50"] = self._overhead.median_us()

    def _after_step(self, finished: Iterable[str]) -> None:
        queue = self.waiting
        self._forget(finished)
        if queue.forgotten:
            self._learning.ended(queue.forgotten, queue.step_s)
            queue.forgotten = []
        self._learning.hand_over(queue.step_s)
        left_waiting = self._order_can_help()
        if self._ranking_loop is not None:
            self._ranking_loop.after_step(left_waiting=left_waiting)
        else:
            queue.finished.clear()  # there is no device to be told of them
        if left_waiting:
            self._status_line.after_step()
        if self._steps % UPKEEP_EVERY_STEPS == 0 or left_waiting != self._left_waiting:
            self._left_waiting = left_waiting
            self._show_counters()

    def _show_counters(self) -> None:
        values, index = self._counters.values, self.waiting.index
        values["pars_active"] = float(index.ranking and not isinstance(index.policy, FCFS))
        values["pars_waiting"] = float(len(index))
        if isinstance(index, HostIndex):  # else what it counted stays as it was shown last
            values["pars_overtaken"] = float(index.overtakes)
            values["pars_guard_promotions"] = float(index.promotions)
        self._counters.write()

    def _order_can_help(self) -> bool:
        """Whether requests wait that an order can help: not for a grammar, an adapter or remote KV.

        Since 0.31 vLLM has a set of those, which are in either of its queues. Before, they left `waiting` for
        a second queue, in order of arrival and admitted first.
        """
        if not hasattr(self, "deferred_waiting"):
            return bool(self.waiting)
        waiting = len(self.waiting) + len(self.kv_holding_waiting)  # type: ignore[attr-defined]
        return waiting > len(self.deferred_waiting)

    def _forget_ended(self) -> None:
        """All that vLLM has named as ended, and what is not in the books yet."""
        if self._planned is not None:
            self._forget(self._planned.finished_req_ids)
            self._planned = None
        self._forget(self.finished_req_ids)  # type: ignore[attr-defined]

    def _forget(self, request_ids: Iterable[str]) -> None:
        """Those of these requests that have ended, aborted ones among them."""
        entries = self.waiting.entries
        for request_id in request_ids:
            entry = entries.get(request_id)
            if entry is not None and entry.payload.is_finished():  # else the id is in use again
                self.waiting.finish(request_id)

    def _guarded(self, hook: Callable[..., None], **arguments: bool) -> None:
        """Run one of our own hooks; if it fails, serve on in arrival order without any of them."""
        if self._failed:
            return
        try:
            hook(**arguments)
        except Exception as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        """For good: what fails once for a reason nobody foresaw is not given a second chance."""
        if self._failed:
            return
        self._failed = True
        logger.error(
            "pars-fast: ranking is switched off, the queue is in arrival order", exc_info=error
        )
        self._counters.values["pars_fallback_error"] += 1
        self._counters.values["pars_active"] = 0.0
        self._counters.write()
        self.waiting.order_by_arrival()  # a ranked index without hooks would keep all that was ever served
        self.waiting.stop_keeping()
        loop, self._ranking_loop = self._ranking_loop, None
        if loop is not None:
            with contextlib.suppress(Exception):
                loop.close()


@functools.cache
def with_ranking(scheduler_cls: type) -> type:
    """A subclass of vLLM's scheduler class whose waiting queue is ranked; a ranked class as it is."""
    if issubclass(scheduler_cls, RankingMixin):
        return scheduler_cls
    return type(f"Ranked{scheduler_cls.__name__}", (RankingMixin, scheduler_cls), {"__module__": __name__})


RankedScheduler = with_ranking(Scheduler)
RankedAsyncScheduler = with_ranking(AsyncScheduler)
