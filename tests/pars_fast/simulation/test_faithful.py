"""The faithful simulator on small cuts: nothing is lost, and FCFS is stock vLLM step for step."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="the faithful simulator is vLLM's scheduler")

from vllm.v1.core.sched.scheduler import Scheduler

from pars_fast.errors import ParsFastError
from pars_fast.guards import GUARDS, FixedThreshold, NoGuard, OvertakingBudget
from pars_fast.integration.queue import RankedRequestQueue
from pars_fast.integration.scheduler import with_ranking
from pars_fast.policies import POLICIES
from pars_fast.settings import Settings
from pars_fast.simulation import faithful
from pars_fast.simulation.columns import Served, columns
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.faithful import VirtualClock, serve, simulate
from pars_fast.simulation.simulated_requests import ESTIMATE_TOKENS
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.vllm_scheduler import make_scheduler
from pars_fast.simulation.workload import Workload, make_workload, with_noisy_scores, with_unscored

STEP = StepTime(0.01, 1e-5, 1e-4, 1e-7, "a test")
ENGINE = EngineSettings(
    max_num_seqs=8, max_num_batched_tokens=128, kv_cache_tokens=4096, block_size=32, max_model_len=2048
)
TIGHT = replace(ENGINE, kv_cache_tokens=1024)  # running requests are preempted


def overload(count: int = 120, *, seed: int = 0, tau: float = 1.0) -> Workload:
    """Prompts longer than a step holds, a few answers much longer than the rest, arriving twice too fast."""
    rng = np.random.default_rng(seed)
    outputs = np.minimum(rng.lognormal(3, 1.2, count).astype(int) + 1, 500)
    arrivals = np.sort(rng.uniform(0, 0.5 * outputs.sum() * 0.012 / ENGINE.max_num_seqs, count))
    workload = make_workload("overload", arrivals, rng.integers(1, 300, count), outputs)
    return with_noisy_scores(workload, tau, seed=seed)


class Recorder(Scheduler):  # type: ignore[misc]
    """Stock vLLM's scheduler, with a note of every plan and every token."""

    plans: list[dict[str, int]]
    answers: dict[str, int]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        self.plans.append(dict(output.num_scheduled_tokens))
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)
        for engine_outputs in outputs.values():
            for output in engine_outputs.outputs:
                self.answers[output.request_id] = self.answers.get(output.request_id, 0) + len(
                    output.new_token_ids
                )
        return outputs


def recorded(workload: Workload, engine: EngineSettings, *, ranked: bool, **settings: Any) -> Any:
    """(served, plans, answers, scheduler) of stock vLLM, or of the ranked one under `settings`."""
    clock = VirtualClock()
    fields: dict[str, Any] = {"plans": [], "answers": {}}
    bases: tuple[type, ...] = (Recorder,)
    if ranked:
        bases = (with_ranking(Recorder),)
        ranker = faithful.DelayedRanker(workload, 0.0, clock)
        fields |= {
            "clock": clock,
            "_read_settings": lambda self: Settings(**settings),
            "_make_runtime": lambda self, settings: ranker,
        }
    scheduler = make_scheduler(type("Recorded", bases, fields), engine)
    served = serve(scheduler, workload, engine, STEP, clock)
    return served, scheduler.plans, scheduler.answers, scheduler


def assert_all_served(workload: Workload, served: Served) -> None:
    assert served.refused == 0
    assert (served.first_scheduled_s >= workload.arrival_s).all()
    assert (served.first_token_s > served.first_scheduled_s).all()
    longer = workload.output_tokens > 1
    assert (served.finished_s[longer] > served.first_token_s[longer]).all()
    assert (served.finished_s[~longer] == served.first_token_s[~longer]).all()


@pytest.mark.parametrize("engine", [ENGINE, TIGHT], ids=["roomy", "tight"])
def test_fcfs_is_stock_vllm_step_for_step(engine: EngineSettings) -> None:
    workload = overload()
    stock, stock_plans, stock_answers, _ = recorded(workload, engine, ranked=False)
    served, plans, answers, scheduler = recorded(workload, engine, ranked=True, policy="fcfs")
    assert isinstance(scheduler.waiting, RankedRequestQueue)
    assert plans == stock_plans
    assert answers == stock_answers
    assert (served.preemptions, served.steps) == (stock.preemptions, stock.steps)
    np.testing.assert_array_equal(served.finished_s, stock.finished_s)
    np.testing.assert_array_equal(served.first_token_s, stock.first_token_s)
    assert (served.preemptions > 0) == (engine is TIGHT)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_once_and_in_full(policy: str) -> None:
    workload = with_unscored(overload(tau=0.5), 0.3, seed=1)
    served, plans, answers, _ = recorded(workload, TIGHT, ranked=True, policy=policy)
    assert_all_served(workload, served)
    assert served.preemptions > 0
    assert answers == {str(i): tokens for i, tokens in enumerate(workload.output_tokens)}
    assert max(sum(plan.values()) for plan in plans) <= TIGHT.max_num_batched_tokens
    assert max(len(plan) for plan in plans) <= TIGHT.max_num_seqs


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("policy", ["oracle", "pars_fast", "prompt_length"])
def test_each_guard_goes_with_each_policy(policy: str, guard: str) -> None:
    workload = overload(60)
    assert_all_served(workload, simulate(workload, policy, GUARDS[guard](), ENGINE, STEP))


def test_the_same_twice_gives_the_same() -> None:
    workload = overload(tau=0.4)
    runs = [simulate(workload, "pars_fast", None, TIGHT, STEP, ranker_delay_s=0.05) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].finished_s, runs[1].finished_s)
    assert (runs[0].steps, runs[0].preemptions) == (runs[1].steps, runs[1].preemptions)


def test_knowing_lengths_pays_at_overload() -> None:
    workload = overload()
    e2e = {
        policy: columns(workload, simulate(workload, policy, NoGuard(), ENGINE, STEP))["mean_e2e_s"]
        for policy in ("fcfs", "oracle", "pars_fast")
    }
    assert e2e["oracle"] < 0.7 * e2e["fcfs"]
    assert e2e["pars_fast"] < 0.8 * e2e["fcfs"]  # perfect scores, but each comes a step late


def test_a_slower_ranker_gains_less() -> None:
    workload = overload()
    e2e = [
        columns(workload, simulate(workload, "pars_fast", NoGuard(), ENGINE, STEP, ranker_delay_s=delay))
        ["mean_e2e_s"]
        for delay in (0.0, 1.0, 1e6)
    ]
    fcfs = columns(workload, simulate(workload, "fcfs", None, ENGINE, STEP))["mean_e2e_s"]
    assert e2e[0] < e2e[1] < e2e[2] == fcfs


def test_a_request_without_a_score_counts_as_typical() -> None:
    workload = with_unscored(overload(), 1.0, seed=0)
    fcfs = simulate(workload, "fcfs", None, ENGINE, STEP)
    np.testing.assert_array_equal(
        simulate(workload, "pars_fast", NoGuard(), ENGINE, STEP).finished_s, fcfs.finished_s
    )


def test_nobody_is_overtaken_by_more_than_the_budget() -> None:
    """The promise, from outside: admissions of later arrivals, by the lengths that the oracle knows."""
    workload = overload(150, seed=3)
    guard = OvertakingBudget(beta=0.5, floor_tokens=100.0)
    first = simulate(workload, "oracle", guard, ENGINE, STEP).first_scheduled_s
    unguarded = simulate(workload, "oracle", NoGuard(), ENGINE, STEP).first_scheduled_s
    worst = []
    for number in range(len(workload)):
        waits = first[:number] > workload.arrival_s[number]
        ahead = workload.output_tokens[:number][waits].sum()
        budget = guard.floor_tokens + guard.beta * ahead
        overtook = first[number + 1 :] < first[number]
        assert workload.output_tokens[number + 1 :][overtook].sum() <= budget
        overtakes = unguarded[number + 1 :] < unguarded[number]
        worst.append(workload.output_tokens[number + 1 :][overtakes].sum() - budget)
    assert max(worst) > 0  # without the guard somebody is


def test_a_fixed_threshold_of_nothing_is_fcfs() -> None:
    workload = overload(60)
    fcfs = simulate(workload, "fcfs", None, ENGINE, STEP)
    served = simulate(workload, "pars", FixedThreshold(0.0), ENGINE, STEP)
    np.testing.assert_array_equal(served.finished_s, fcfs.finished_s)


def test_a_request_beyond_the_engine_is_refused_alone() -> None:
    """One fits to the last token; more than the longest sequence, or than the KV cache, does not."""
    engine = replace(ENGINE, kv_cache_tokens=1000, max_model_len=512)  # 31 blocks of 32
    prompts = [10, 500, 500, 505, 10]
    outputs = [5, 12, 13, 500, 600]
    workload = make_workload("too long", np.arange(5) * 0.001, prompts, outputs)
    for policy in ("fcfs", "pars_fast"):
        served = simulate(workload, policy, None, engine, STEP)
        assert served.refused == 3
        assert np.isfinite(served.finished_s).tolist() == [True, True, False, False, False]
    small = replace(ENGINE, kv_cache_tokens=96)
    served = simulate(make_workload("kv", [0, 0, 0], [90, 90, 90], [6, 7, 1]), "fcfs", None, small, STEP)
    assert np.isfinite(served.finished_s).tolist() == [True, False, True]


def test_times_of_one_request() -> None:
    """A prompt of 300 tokens in steps of at most 128, then a token a step; each reads what came before."""
    workload = make_workload("one", [5.0], [300], [3])
    served = simulate(workload, "fcfs", None, ENGINE, STEP)
    prefill = STEP.seconds(128, 0, 0) + STEP.seconds(128, 0, 128) + STEP.seconds(44, 0, 256)
    decode = STEP.seconds(0, 1, 300) + STEP.seconds(0, 1, 301)
    assert served.first_scheduled_s[0] == 5.0
    assert served.first_token_s[0] == pytest.approx(5 + prefill)
    assert served.finished_s[0] == pytest.approx(5 + prefill + decode)
    assert served.steps == 5


def long_and_short() -> tuple[Workload, EngineSettings]:
    """One seat; while a long request runs, a short one comes, and a longer one before: both long ones have
    scores, since the first left the second waiting."""
    prompts, answers = [100, 100, 20], [200, 250, 3]
    workload = make_workload("three", [0.0, 0.0, 0.3], prompts, answers, answers)
    return workload, replace(ENGINE, max_num_seqs=1)


@pytest.mark.parametrize("policy", ["srpt", "ltr", "elis", "alise"])
def test_what_a_preemption_loses_is_counted(policy: str) -> None:
    workload, engine = long_and_short()
    served = simulate(workload, policy, None, engine, STEP)
    assert served.finished_s[2] < served.finished_s[0]
    assert served.preemptions == 1
    blocks, rest = served.prefix_hit_tokens, served.recomputed_tokens
    assert blocks is not None
    assert rest is not None
    assert blocks % ENGINE.block_size == 0
    assert 0 < rest < ENGINE.block_size  # what no full block held
    assert 100 < blocks + rest < 160
    cold = simulate(workload, policy, None, replace(engine, enable_prefix_caching=False), STEP)
    assert (cold.preemptions, cold.prefix_hit_tokens, cold.recomputed_tokens) == (1, 0, blocks + rest)
    waits = simulate(workload, "fcfs", None, engine, STEP)
    assert (waits.preemptions, waits.recomputed_tokens, waits.prefix_hit_tokens) == (0, 0, 0)


def test_a_swapped_cache_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, engine = long_and_short()
    ends = []
    for seconds in (0.0, 1.0):
        monkeypatch.setattr(faithful, "SWAP_TOKEN_S", seconds)
        served = simulate(workload, "alise", None, engine, STEP)
        ends.append(served.finished_s)
    assert ends[0][2] == ends[1][2]
    assert ends[1][0] - ends[0][0] == pytest.approx(served.recomputed_tokens)


def test_a_remaining_length_is_predicted_again_every_50_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the relative error of the first prediction, on what really remains."""
    workload = make_workload("three", [0.0, 0.0, 0.0], [300, 20, 20], [170, 120, 4], [340.0, 60.0, 4.0])
    asked: list[tuple[int, int, float]] = []
    submit = faithful.DelayedRanker.submit

    def note(self: Any, prompts: Any) -> bool:
        asked.extend((p.ids[0], len(p.ids), self._tokens(p.ids)) for p in prompts)
        return bool(submit(self, prompts))

    monkeypatch.setattr(faithful.DelayedRanker, "submit", note)
    simulate(workload, "elis", None, replace(ENGINE, max_num_seqs=2), STEP)
    again = [(length, tokens) for number, length, tokens in asked if number == 0 and length > 300]
    assert [(length - 300) // 50 for length, _ in again] == [1, 2, 3]
    for length, tokens in again:
        made = length - 300
        assert tokens == pytest.approx(made + 2 * (170 - made))


def test_a_model_that_is_asked_serves_each_prompt_twice() -> None:
    """300 tokens and an instruction in three steps, an estimate of six; then nine blocks are found again."""
    workload = make_workload("one", [0.0], [300], [3], [3.0])
    served = simulate(workload, "perception_only", None, ENGINE, STEP)
    assert served.steps == (3 + ESTIMATE_TOKENS - 1) + 3
    assert served.prefix_hit_tokens == 288
    assert served.recomputed_tokens == 0
    alone = simulate(workload, "fcfs", None, ENGINE, STEP)
    assert served.first_token_s[0] > alone.first_token_s[0] + ESTIMATE_TOKENS * STEP.base_s


def test_a_prompt_that_leaves_no_room_for_the_question_is_served_without_an_estimate() -> None:
    room = ENGINE.max_model_len
    workload = make_workload("long", [0, 0.1], [room - 10, 9], [10, 5], [1.0, 2.0])
    served = simulate(workload, "perception_only", None, ENGINE, STEP)
    assert served.refused == 0
    assert np.isfinite(served.finished_s).all()



def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    workload = make_workload("apart", [0.0, 100.0], [10, 10], [5, 5])
    served = simulate(workload, "pars_fast", None, ENGINE, STEP)
    first, second = served.finished_s - workload.arrival_s
    assert first == pytest.approx(second)


def test_errors() -> None:
    workload = overload(5)
    with pytest.raises(ParsFastError, match="no policy 'sjf'; there are: fcfs, priority, prompt_length,"):
        simulate(workload, "sjf", None, ENGINE, STEP)
    with pytest.raises(ParsFastError, match=r"ranker_delay_s must be >= 0, got -1.0"):
        simulate(workload, "fcfs", None, ENGINE, STEP, ranker_delay_s=-1.0)
    with pytest.raises(ParsFastError, match="max_num_seqs must be at least 1, got 0"):
        replace(ENGINE, max_num_seqs=0)
    with pytest.raises(ParsFastError, match=r"max_num_batched_tokens \(4\) must be at least max_num_seqs"):
        replace(ENGINE, max_num_batched_tokens=4)


def test_a_scheduler_that_plans_nothing_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineSettings, "can_hold", lambda *_: True)
    workload = make_workload("too long", [0.0], [4000], [500])
    with pytest.raises(ParsFastError, match="too long: vLLM's scheduler plans nothing, and requests wait"):
        simulate(workload, "fcfs", None, replace(ENGINE, max_model_len=8192, kv_cache_tokens=320), STEP)
