"""The fast simulator against the faithful one, which runs vLLM's own scheduler: 5 % in mean and p99."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="the faithful simulator is vLLM's scheduler")

from pars_fast.guards import FixedThreshold, Guard, NoGuard, OvertakingBudget, PassingLimit, UniBoost
from pars_fast.simulation import faithful, fast
from pars_fast.simulation.columns import columns
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_time import PROFILES
from pars_fast.simulation.workload import (
    Workload,
    at_load,
    make_workload,
    poisson,
    read_trace,
    with_burst,
    with_noisy_scores,
    with_unscored,
)

CUTS = sorted((Path(__file__).parent / "data").glob("trace_*.csv"))
STEP_TIME = PROFILES["h100_llama_3_1_8b_roofline"]  # it has all four terms
ENGINE = EngineSettings(max_num_seqs=8, max_num_batched_tokens=2048, max_model_len=131_072)
TOLERANCE = 0.05
CASES: list[tuple[str, Guard]] = [("fcfs", NoGuard()), ("oracle", OvertakingBudget(0.5, 500)),
                                  ("pars_fast", PassingLimit(0.5, 4)), ("pars", FixedThreshold(2.0))]


@pytest.fixture(autouse=True)
def plan_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the fast simulator does; on cuts as small as these a step's delay moves a mean by up to 6 %."""
    monkeypatch.setattr("pars_fast.integration.scheduler.SHORT_STEP_S", 0.0)


def assert_agreement(workload: Workload, policy: str, guard: Guard, engine: EngineSettings, *,
                     ranker_delay_s: float = 0.0) -> int:
    """Returns the preemptions of the faithful simulator."""
    served = [simulator(workload, policy, guard, engine, STEP_TIME, ranker_delay_s=ranker_delay_s)
              for simulator in (faithful.simulate, fast.simulate)]
    real, ours = (columns(workload, run) for run in served)
    for column in ("mean_latency_per_token_s", "p99_latency_per_token_s", "mean_e2e_s", "p99_e2e_s",
                   "mean_ttft_s", "p99_ttft_s"):
        assert ours[column] == pytest.approx(real[column], rel=TOLERANCE), column
    assert (ours["completed"], ours["refused"]) == (real["completed"], real["refused"])
    return served[0].preemptions


def cut(path: Path, load: float = 1.2) -> Workload:
    workload = read_trace(path)
    if workload.arrival_s[-1] == 0:
        workload = poisson(workload, seed=0)
    capacity = fast.capacity_tok_s(workload, ENGINE, STEP_TIME)
    return with_noisy_scores(at_load(workload, load, capacity), 0.5, seed=0)


@pytest.mark.parametrize("path", CUTS, ids=lambda path: path.stem.removeprefix("trace_"))
@pytest.mark.parametrize(("policy", "guard"), CASES, ids=lambda value: getattr(value, "name", value))
def test_simulators_agree_on_every_trace(path: Path, policy: str, guard: Guard) -> None:
    assert_agreement(cut(path), policy, guard, ENGINE)


def mix(count: int = 100) -> Workload:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 60, count), 400)
    return with_noisy_scores(make_workload("mix", np.sort(rng.uniform(0, 2.0, count)),
                                           rng.integers(1, 400, count), lengths), 0.5, seed=0)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "computed again"])
@pytest.mark.parametrize("policy", ["fcfs", "pars_fast"])
def test_simulators_agree_when_requests_are_preempted(policy: str, cached: bool) -> None:
    engine = replace(ENGINE, kv_cache_tokens=2048, max_num_batched_tokens=512, enable_prefix_caching=cached)
    assert assert_agreement(mix(), policy, UniBoost(0.5), engine) > 0


def test_simulators_agree_with_a_late_ranker_a_burst_and_missing_scores() -> None:
    workload = with_unscored(with_burst(mix(), 0.4, seed=0), 0.2, seed=0)
    assert_agreement(workload, "pars_fast", OvertakingBudget(0.5, 500), ENGINE, ranker_delay_s=0.1)
