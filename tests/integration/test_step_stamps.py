"""The scheduler that writes its steps down, on a scheduler without a model."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from pars_fast.simulation.columns import Served
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.faithful import VirtualClock, make_scheduler, serve
from pars_fast.simulation.profile import STAMP, STAMPS_FILE_VARIABLE
from pars_fast.simulation.step_stamps import StampedScheduler
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.workload import make_workload

ENGINE = EngineSettings(
    max_num_seqs=4, max_num_batched_tokens=64, kv_cache_tokens=2048, block_size=32, max_model_len=512
)


def test_every_step_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work as planned, and a time for each; what it measures is not looked at, but that it is a time."""
    monkeypatch.setenv(STAMPS_FILE_VARIABLE, str(tmp_path / "stamps"))
    workload = make_workload("two", [0.0, 10.0], [100, 20], [3, 2])
    served = _serve(StampedScheduler, workload)
    assert EngineSettings(**json.loads((tmp_path / "stamps.json").read_text())) == ENGINE
    steps = list(STAMP.iter_unpack((tmp_path / "stamps").read_bytes()))
    assert [step[:3] for step in steps] == [
        (64, 0, 0), (36, 0, 64), (0, 1, 100), (0, 1, 101), (20, 0, 0), (0, 1, 20)
    ]
    assert all(0 < seconds < 60 for *_, seconds in steps)
    assert served.steps == len(steps)
    assert asdict(_serve(Scheduler, workload))["steps"] == served.steps


def _serve(scheduler_cls: type[Scheduler], workload: object) -> Served:
    scheduler = make_scheduler(scheduler_cls, ENGINE)
    return serve(scheduler, workload, ENGINE, StepTime(0.01, 0, 0, 0, "a test"), VirtualClock())  # type: ignore[arg-type]
