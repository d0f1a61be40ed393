"""The fast simulator: what it may never do, and what it must give where the answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pars_fast.errors import ParsFastError
from pars_fast.guards import (
    FixedThreshold,
    Guard,
    IdleQuantum,
    NoGuard,
    OvertakingBudget,
    PassingLimit,
    RelativeAgeing,
    UniBoost,
)
from pars_fast.simulation.columns import Served, columns
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.fast import capacity_tok_s, simulate
from pars_fast.simulation.fleet import FAST_POLICIES
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.workload import Workload, at_load, make_workload

STEP_TIME = StepTime(0.005, prefill_token_s=4e-5, decode_seq_s=2e-5, kv_token_s=1.5e-8, source="made up")
ONE_SECOND = StepTime(1.0, prefill_token_s=0.0, decode_seq_s=0.0, kv_token_s=0.0, source="made up")
SMALL = EngineSettings(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_tokens=480)
GUARDS: list[Guard] = [
    NoGuard(), FixedThreshold(0.5), IdleQuantum(20, 5), RelativeAgeing(0.02), UniBoost(0.5),
    OvertakingBudget(0.5, 50), PassingLimit(0.5, 2),
]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrivals = rng.uniform(0, draw(st.sampled_from([0.0, 0.3, 3.0])), count)
    expected = np.where(rng.uniform(size=count) < 0.8, rng.uniform(1, 200, count), np.nan)
    return make_workload("drawn", np.round(arrivals, 1), rng.integers(1, 150, count),
                         rng.integers(1, 150, count), expected)


engines = st.builds(EngineSettings, max_num_seqs=st.integers(1, 8),
                    max_num_batched_tokens=st.integers(8, 200),
                    kv_cache_tokens=st.integers(20, 120).map(lambda blocks: 16 * blocks))


@settings(max_examples=60, deadline=None)
@given(workload=workloads(), engine=engines, policy=st.sampled_from(FAST_POLICIES),
       guard=st.sampled_from(GUARDS), delay=st.sampled_from([0.0, 0.05]))
def test_every_request_is_served_or_refused_and_never_too_fast(
        workload: Workload, engine: EngineSettings, policy: str, guard: Guard, delay: float) -> None:
    served = simulate(workload, policy, guard, engine, STEP_TIME, ranker_delay_s=delay)
    held = [engine.can_hold(int(p), int(o))
            for p, o in zip(workload.prompt_tokens, workload.output_tokens, strict=True)]
    done = np.isfinite(served.finished_s)
    assert done.tolist() == held
    assert served.refused == len(workload) - sum(held)
    first, last = served.first_token_s[done], served.finished_s[done]
    assert (served.first_scheduled_s[done] >= workload.arrival_s[done]).all()
    assert (first > served.first_scheduled_s[done]).all()
    fastest = (workload.output_tokens[done] - 1) * (STEP_TIME.base_s + STEP_TIME.decode_seq_s)
    assert (last - first >= fastest - 1e-9).all()
    again = simulate(workload, policy, guard, engine, STEP_TIME, ranker_delay_s=delay)
    np.testing.assert_array_equal(served.finished_s, again.finished_s)


def running(served: Served, at: np.ndarray) -> np.ndarray:
    """How many requests had been admitted and had not finished at each time."""
    return (np.searchsorted(np.sort(served.first_scheduled_s), at, side="right")
            - np.searchsorted(np.sort(served.finished_s), at, side="right"))


@settings(max_examples=40, deadline=None)
@given(workload=workloads(), policy=st.sampled_from(FAST_POLICIES), guard=st.sampled_from(GUARDS))
def test_no_seat_is_free_while_someone_waits(workload: Workload, policy: str, guard: Guard) -> None:
    engine = EngineSettings(max_num_seqs=3, max_num_batched_tokens=10_000)  # tokens and blocks suffice
    served = simulate(workload, policy, guard, engine, STEP_TIME)
    for i in range(len(workload)):
        starts = served.first_scheduled_s  # every step that admits someone
        waited = starts[(starts >= workload.arrival_s[i]) & (starts < served.first_scheduled_s[i])]
        assert (running(served, waited) == 3).all()
    assert running(served, served.first_scheduled_s).max() <= 3


@settings(max_examples=40, deadline=None)
@given(workload=workloads(), guard=st.sampled_from([g for g in GUARDS if not isinstance(g, IdleQuantum)]))
def test_fcfs_admits_in_order_of_arrival_under_every_guard(workload: Workload, guard: Guard) -> None:
    # But idle_quantum: there a promotion may end before that of a later arrival.
    served = simulate(workload, "fcfs", guard, SMALL, STEP_TIME)
    held = np.isfinite(served.finished_s)
    assert (np.diff(served.first_scheduled_s[held]) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(workload=workloads(), beta=st.sampled_from([0.0, 0.5, 2.0]), floor=st.sampled_from([0, 100]))
def test_nobody_is_overtaken_beyond_the_budget(workload: Workload, beta: float, floor: int) -> None:
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=10_000)
    served = simulate(workload, "oracle", OvertakingBudget(beta, floor), engine, STEP_TIME)
    start, tokens = served.first_scheduled_s, workload.output_tokens
    for i in range(len(workload)):
        ahead = tokens[:i][start[:i] > workload.arrival_s[i]].sum()  # waited when i came
        same_step = tokens[:i][start[:i] == workload.arrival_s[i]].sum()
        passed = tokens[i + 1:][start[i + 1:] < start[i]].sum()
        assert passed <= floor + beta * (ahead + same_step) + 1e-6


@settings(max_examples=40, deadline=None)
@given(workload=workloads(), beta=st.sampled_from([0.0, 0.5, 2.0]), floor=st.sampled_from([0, 3]))
def test_nobody_has_more_requests_ahead_than_the_limit(workload: Workload, beta: float, floor: int) -> None:
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=10_000)
    served = simulate(workload, "pars_fast", PassingLimit(beta, floor), engine, STEP_TIME)
    start, arrival = served.first_scheduled_s, workload.arrival_s
    met = np.array([(start[:k] >= arrival[k]).sum() for k in range(len(workload))])
    for i in range(len(workload)):
        ahead = (start[:i] >= arrival[i]).sum() + (start[i + 1:] < start[i]).sum()
        assert ahead <= floor + (1 + beta) * met[i:][arrival[i:] <= start[i]].max()


def test_one_request_alone_takes_what_its_steps_take() -> None:
    workload = make_workload("one", [2.0], [150], [3])
    engine = replace(SMALL, kv_cache_tokens=1600)
    served = simulate(workload, "fcfs", NoGuard(), engine, STEP_TIME)  # chunks of 64, 64, 22
    prefill = sum(0.005 + 4e-5 * chunk + 1.5e-8 * read for chunk, read in ((64, 0), (64, 64), (22, 128)))
    decode = sum(0.005 + 2e-5 + 1.5e-8 * read for read in (150, 151))
    assert served.first_scheduled_s[0] == 2.0
    assert served.first_token_s[0] == pytest.approx(2.0 + prefill)
    assert served.finished_s[0] == pytest.approx(2.0 + prefill + decode)
    assert served.steps == 5


def test_the_last_admitted_is_preempted_and_resumes() -> None:
    workload = make_workload("two", [0.0, 0.0], [16, 16], [40, 40])
    engine = EngineSettings(max_num_seqs=2, max_num_batched_tokens=64, kv_cache_tokens=64)
    served = simulate(workload, "fcfs", NoGuard(), engine, ONE_SECOND)
    # Both have 2 blocks of 16 tokens until they need a third, at the 17th token after the first.
    assert served.preemptions == 1
    assert served.finished_s[0] == 40
    assert served.finished_s[1] > 40 + 20  # it made 17 tokens, and then had to wait for the other's blocks


def test_shorter_expected_answers_go_first_and_a_missing_score_is_the_median() -> None:
    expected = [500.0, 10.0, math.nan, 300.0, 20.0]
    workload = make_workload("five", [0, 1.5, 1.5, 1.5, 1.5], [1] * 5, [4, 1, 1, 1, 1], expected)
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=8)
    served = simulate(workload, "pars_fast", NoGuard(), engine, ONE_SECOND)
    # Scored while the first runs; the median of 10, 20, 300 is 20, and at equal keys arrival decides.
    assert np.argsort(served.first_scheduled_s).tolist() == [0, 1, 2, 4, 3]


def test_a_late_ranker_leaves_the_order_of_arrival() -> None:
    workload = make_workload("three", [0, 1.5, 1.6], [1] * 3, [4, 1, 1], [9.0, 500.0, 10.0])
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=8)
    for delay, order in ((0.0, [0, 2, 1]), (100.0, [0, 1, 2])):
        served = simulate(workload, "pars_fast", NoGuard(), engine, ONE_SECOND, ranker_delay_s=delay)
        assert np.argsort(served.first_scheduled_s).tolist() == order


@pytest.mark.parametrize(("guard", "order"), [
    (NoGuard(), [0, 2, 3, 1]),
    (FixedThreshold(2.0), [0, 1, 2, 3]),  # the long one has waited for 3 s
    (FixedThreshold(3.5), [0, 2, 1, 3]),
    (OvertakingBudget(beta=0.0, floor_tokens=2.0), [0, 2, 1, 3]),  # one overtaking of 1 token, not two of 2
    (PassingLimit(beta=0.0, floor_requests=0.0), [0, 2, 3, 1]),  # the last one met two, so two may pass
], ids=str)
def test_guards_bound_the_order(guard: Guard, order: list[int]) -> None:
    workload = make_workload("four", [0, 1, 2, 2], [1] * 4, [4, 9, 1, 2])
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=8)
    served = simulate(workload, "oracle", guard, engine, ONE_SECOND)
    assert np.argsort(served.first_scheduled_s).tolist() == order


def test_load_1_is_what_a_closed_loop_serves() -> None:
    rng = np.random.default_rng(0)
    workload = make_workload("mix", np.arange(2000), rng.integers(1, 300, 2000), rng.geometric(1 / 50, 2000))
    engine = EngineSettings(max_num_seqs=16, max_num_batched_tokens=512)
    capacity = capacity_tok_s(workload, engine, STEP_TIME)
    assert capacity == capacity_tok_s(workload, engine, STEP_TIME)
    throughput = {load: columns(offered, simulate(offered, "fcfs", NoGuard(), engine, STEP_TIME))
                  for load in (0.5, 2.0) for offered in [at_load(workload, load, capacity)]}
    assert throughput[0.5]["throughput_to_last_arrival_tok_s"] == pytest.approx(0.5 * capacity, rel=0.05)
    assert throughput[2.0]["throughput_to_last_arrival_tok_s"] == pytest.approx(capacity, rel=0.05)


def test_what_cannot_be_is_refused() -> None:
    workload = make_workload("one", [0.0], [10], [10])
    with pytest.raises(ParsFastError, match="no policy 'sjf'; there are: fcfs"):
        simulate(workload, "sjf", NoGuard(), SMALL, STEP_TIME)
    with pytest.raises(ParsFastError, match="ranker_delay_s must be finite and >= 0, got -1"):
        simulate(workload, "pars", NoGuard(), SMALL, STEP_TIME, ranker_delay_s=-1)
    with pytest.raises(ParsFastError, match="no request fits the engine"):
        capacity_tok_s(make_workload("big", [0.0], [1000], [10]), SMALL, STEP_TIME)
