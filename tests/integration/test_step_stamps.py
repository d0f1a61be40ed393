"""The scheduler that writes its steps down, on a scheduler without a model."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from pars_fast.simulation import step_stamps
from pars_fast.simulation.columns import Served
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.faithful import VirtualClock, serve
from pars_fast.simulation.step_log import STEP_LOG_VARIABLE, StepLog
from pars_fast.simulation.step_stamps import StampedScheduler
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.vllm_scheduler import make_scheduler
from pars_fast.simulation.workload import make_workload

ENGINE = EngineSettings(
    max_num_seqs=4, max_num_batched_tokens=64, kv_cache_tokens=2048, block_size=32, max_model_len=512
)


def test_every_step_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work as planned, and a time for each; what it measures is not looked at, but that it is a time."""
    log = StepLog(tmp_path / "steps")
    monkeypatch.setenv(STEP_LOG_VARIABLE, str(log.path))
    workload = make_workload("two", [0.0, 10.0], [100, 20], [3, 2])
    served = _serve(StampedScheduler, workload)
    assert log.engine == ENGINE
    steps = log.steps(0)
    assert steps[:, :3].tolist() == [
        [64, 0, 0], [36, 0, 64], [0, 1, 100], [0, 1, 101], [20, 0, 0], [0, 1, 20]
    ]
    assert ((steps[:, 3] > 0) & (steps[:, 3] < 60)).all()
    assert served.steps == len(steps)
    assert asdict(_serve(Scheduler, workload))["steps"] == served.steps


def test_a_step_lasts_from_the_end_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its plan where nothing was left to do, even if it was planned while another ran."""
    planned_or_done = iter([1.0, 3.0, 3.5, 4.0, 6.0, 7.0, 50.0, 50.5])
    something_left = iter([True, True, False, False])

    log = StepLog(tmp_path / "steps")
    monkeypatch.setenv(STEP_LOG_VARIABLE, str(log.path))
    monkeypatch.setattr(step_stamps, "time", SimpleNamespace(perf_counter=lambda: next(planned_or_done)))
    scheduler = make_scheduler(StampedScheduler, ENGINE)
    scheduler.requests["a"] = SimpleNamespace(num_computed_tokens=8, num_output_tokens=0,
                                              is_prefill_chunk=True)
    for name, made_up in {
        "schedule": lambda self: SimpleNamespace(num_scheduled_tokens={"a": 8}),
        "update_from_output": lambda self: None,
        "has_unfinished_requests": lambda self: next(something_left),
    }.items():
        monkeypatch.setattr(Scheduler, name, made_up)
    plan, done = scheduler.schedule, scheduler.update_from_output
    for call in (plan, done, plan, plan, done, done, plan, done):
        call()
    assert log.steps(0)[:, 3].tolist() == [2.0, 3.0, 1.0, 0.5]


def _serve(scheduler_cls: type[Scheduler], workload: object) -> Served:
    scheduler = make_scheduler(scheduler_cls, ENGINE)
    return serve(scheduler, workload, ENGINE, StepTime(0.01, 0, 0, 0, "a test"), VirtualClock())  # type: ignore[arg-type]
