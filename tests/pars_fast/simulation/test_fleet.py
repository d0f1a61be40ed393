"""Many engines: round robin is as many engines alone, and a router that knows more serves sooner."""

import inspect
from typing import Any

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from pars_fast.errors import ParsFastError
from pars_fast.guards import NoGuard, OvertakingBudget
from pars_fast.host_index import HostIndex, RunningMedian
from pars_fast.simulation import fleet, queue_state
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.fast import simulate
from pars_fast.simulation.fleet import ROUTERS, Router, simulate_fleet
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.workload import Workload, make_workload, with_noisy_scores

STEP_TIME = StepTime(0.005, prefill_token_s=4e-5, decode_seq_s=2e-5, kv_token_s=1.5e-8, source="made up")
ENGINE = EngineSettings(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_tokens=4800)


def mix(count: int = 200, span_s: float = 10.0) -> Workload:
    rng = np.random.default_rng(0)
    workload = make_workload("mix", np.sort(rng.uniform(0, span_s, count)), rng.integers(1, 100, count),
                             rng.geometric(1 / 60, count))
    return with_noisy_scores(workload, 0.9, seed=0)


@pytest.mark.parametrize("policy", ["fcfs", "pars_fast"])
def test_round_robin_is_each_engine_alone(policy: str) -> None:
    workload, guard = mix(), OvertakingBudget(0.5, 100)
    together = simulate_fleet(workload, policy, guard, ENGINE, STEP_TIME, engines=3)
    alone = [simulate(workload.take(np.arange(e, len(workload), 3)), policy, guard, ENGINE, STEP_TIME)
             for e in range(3)]
    for e, served in enumerate(alone):
        np.testing.assert_allclose(together.finished_s[e::3], served.finished_s)
    assert together.steps == sum(served.steps for served in alone)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_served_once_whatever_the_router(router: Router) -> None:
    workload = mix()
    served = simulate_fleet(workload, "pars_fast", NoGuard(), ENGINE, STEP_TIME, engines=5, router=router)
    assert np.isfinite(served.finished_s).all()
    assert (served.first_scheduled_s >= workload.arrival_s).all()


def test_more_engines_than_requests_serve_each_at_once() -> None:
    workload = mix(20)
    served = simulate_fleet(workload, "fcfs", NoGuard(), ENGINE, STEP_TIME, engines=1000,
                            router="least_loaded")
    np.testing.assert_array_equal(served.first_scheduled_s, workload.arrival_s)


def test_routers_that_look_avoid_the_busy_engine() -> None:
    workload = make_workload("three", [0.0, 0.1, 0.5], [1, 1, 1], [100, 1, 1], [100, 1, 1])
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=64)
    waited = {}
    for router in ROUTERS:
        served = simulate_fleet(workload, "fcfs", NoGuard(), engine, STEP_TIME, engines=2, router=router)
        waited[router] = served.first_scheduled_s[2] - workload.arrival_s[2]
    assert waited["least_loaded"] == waited["predicted_work"] == 0
    assert waited["round_robin"] > 0  # it is sent where the long one runs


def test_predicted_work_sees_what_a_count_does_not() -> None:
    workload = make_workload("four", [0.0, 0.1, 0.2, 0.3], [1] * 4, [100, 20, 20, 1], [100, 20, 20, 1])
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=64)
    start = {router: simulate_fleet(workload, "fcfs", NoGuard(), engine, STEP_TIME, engines=2,
                                    router=router).first_scheduled_s[2] for router in ROUTERS}
    assert start["predicted_work"] < start["least_loaded"]  # behind 20 tokens, not behind 100


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ParsFastError, match="no router 'random'; there are: round_robin"):
        simulate_fleet(mix(), "fcfs", None, ENGINE, STEP_TIME, router="random")  # type: ignore[arg-type]
    with pytest.raises(ParsFastError, match="engines must be from 1 to 100,000, got 0"):
        simulate_fleet(mix(), "fcfs", None, ENGINE, STEP_TIME, engines=0)


def test_the_queue_has_the_numbers_of_the_live_one() -> None:
    parameters = inspect.signature(HostIndex).parameters
    assert parameters["initial_expected_tokens"].default == queue_state.INITIAL_MEDIAN
    median = inspect.signature(RunningMedian).parameters["window"].default
    assert median == queue_state.MEDIAN_WINDOW
    pytest.importorskip("zmq", reason="the live ranker is spoken to over it")
    from pars_fast.integration.process_runtime import ProcessRuntime

    assert ProcessRuntime.max_in_flight == queue_state.MAX_IN_FLIGHT


def test_a_change_of_any_compiled_function_is_seen() -> None:
    """What numba keeps would be stale if it were in a file of which no checksum is taken."""
    met: set[Any] = {fleet._SERVE}
    new = list(met)
    while new:
        function = new.pop().py_func
        called = (function.__globals__.get(name) for name in function.__code__.co_names)
        fresh = {each for each in called if isinstance(each, Dispatcher)} - met
        met |= fresh
        new += fresh
    modules = {each.py_func.__module__ for each in met}
    assert len(modules) > 5
    assert modules <= {fleet.__name__, *(source.__name__ for source in fleet._SOURCES)}
