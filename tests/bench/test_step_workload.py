"""The scheduling step's workload on vLLM's real schedulers; what it measures is not looked at."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the step is vLLM's")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from pars_fast.cli import main
from pars_fast.errors import ParsFastError
from pars_fast.step_workload import MIN_WAITING, SCORED_A_STEP, SEATS, WARM_UP_STEPS, StepPair

WAITING = 48


@pytest.fixture(params=[Scheduler, AsyncScheduler])
def pair(request: pytest.FixtureRequest) -> Iterator[StepPair]:
    pair = StepPair(WAITING, request.param)
    yield pair
    pair.close()


def test_each_step_admits_a_full_set_and_finds_the_queue_full(pair: StepPair) -> None:
    for workload in (pair.stock, pair.ranked):
        for _ in range(10):
            workload.refill()
            assert len(workload.scheduler.waiting) == WAITING
            admitted = workload.step()
            assert len(admitted) == SEATS
            workload.forget(admitted)
            assert len(workload.scheduler.waiting) == WAITING - SEATS
            assert not workload.scheduler.running


def test_ranked_order_is_not_that_of_arrival(pair: StepPair) -> None:
    pair.run(5)
    assert pair.ranked.scheduler.waiting.index.overtakes > 0
    assert pair.ranked.scheduler.waiting.index.promotions > 0  # the guard has work, as in a server


def test_scores_are_published_while_steps_are_timed(pair: StepPair) -> None:
    before = pair.ranked.scheduler._counters.values["pars_scored"]
    pair.run(8)
    assert pair.ranked.scheduler._counters.values["pars_scored"] - before == pytest.approx(
        8 * SCORED_A_STEP, rel=0.3
    )


def test_both_get_the_same_arrivals(pair: StepPair) -> None:
    pair.run(3)
    assert pair.stock.arrived == pair.ranked.arrived == WAITING - SEATS + 2 * SEATS * (WARM_UP_STEPS + 3)


def test_steps_are_paired(pair: StepPair) -> None:
    pair.run(7)
    assert len(pair.stock_ns) == len(pair.ranked_ns) == 7
    times = asdict(pair.times())
    assert list(times) == ["waiting", "stock_us_p50", "ranked_us_p50", "added_us_p50", "added_us_p99",
                           "stock_us_p99", "ranked_us_p99",
                           "behind_model_us_p50", "behind_model_us_p99",
                           "add_added_us_p50", "abort_added_us_p50"]
    assert times["waiting"] == WAITING


def test_settings_from_outside_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARS_POLICY", "fcfs")
    pair = StepPair(WAITING)
    pair.close()
    assert pair.ranked.scheduler.waiting.index.policy.uses_ranker


def test_too_few_waiting_are_refused() -> None:
    with pytest.raises(ParsFastError, match=f"waiting must be 0 or at least {MIN_WAITING}, got 3"):
        StepPair(3)


def test_below_saturation_nothing_is_scored() -> None:
    pair = StepPair(0)
    pair.run(5)
    pair.close()
    assert not pair.ranked.scheduler.waiting
    assert pair.ranked.scheduler._counters.values["pars_submitted"] == 0
    assert len(pair.ranked_ns) == 5


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    command = ["bench", "step", "--waiting", str(WAITING), "--steps", "5", "--json", str(out)]
    assert main([*command, "--async-scheduling"]) == 0
    assert "added_us_p99: " in capsys.readouterr().out
    assert json.loads(out.read_text())["waiting"] == WAITING


def test_noise_is_of_two_stock_schedulers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Scheduler:
        raise AssertionError("a ranked scheduler")

    monkeypatch.setattr("pars_fast.step_workload.make_ranked_scheduler", fail)
    assert main(["bench", "step", "--waiting", str(WAITING), "--steps", "5", "--noise"]) == 0
    assert "added_us_p50: " in capsys.readouterr().out


def test_command_refuses_no_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
