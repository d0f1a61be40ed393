"""The ranked scheduler on vLLM's real one; only the model's output is made up (`engine.py`)."""

import logging
import math
import operator
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from pars_fast.arrival_index import ArrivalIndex
from pars_fast.integration import scheduler as scheduler_module
from pars_fast.integration.scheduler import RankedAsyncScheduler, RankedScheduler, RankingMixin, with_ranking
from tests.integration.engine import Engine, MakeRequest, MakeScheduler, both_schedulers


def test_with_ranking_makes_a_subclass_once() -> None:
    assert with_ranking(Scheduler) is RankedScheduler
    assert with_ranking(RankedScheduler) is RankedScheduler
    assert issubclass(RankedAsyncScheduler, AsyncScheduler)
    assert issubclass(RankedAsyncScheduler, RankingMixin)
    assert RankedScheduler.__module__ == "pars_fast.integration.scheduler"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"waiting": "ab", "kv_holding_waiting": "", "deferred_waiting": {"a"}}, True),
        ({"waiting": "ab", "kv_holding_waiting": "", "deferred_waiting": {"a", "b"}}, False),
        ({"waiting": "a", "kv_holding_waiting": "bc", "deferred_waiting": {"b", "c"}}, True),
        ({"waiting": "a", "kv_holding_waiting": "b", "deferred_waiting": {"a", "b"}}, False),
        ({"waiting": "a", "skipped_waiting": ""}, True),
        ({"waiting": "", "skipped_waiting": "bc"}, False),
    ],
)
def test_an_order_helps_no_request_that_is_deferred(state: dict[str, Any], expected: bool) -> None:
    """By what a scheduler has: from 0.31 on they are in a set, before in a queue of their own."""
    assert RankingMixin._order_can_help(SimpleNamespace(**state)) is expected  # type: ignore[arg-type]


@both_schedulers
def test_the_oracle_admits_short_ones_first(
    scheduler_cls: type, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    use_policy("oracle")
    engine = make_engine(scheduler_cls, max_num_seqs=1)
    lengths = [40, 5, 30, 1, 20, 5]
    engine.add([make_request(str(i), max_tokens=n) for i, n in enumerate(lengths)])
    engine.run()
    assert engine.admitted == ["3", "1", "5", "4", "2", "0"]
    assert {i: len(tokens) for i, tokens in engine.tokens.items()} == {
        str(i): n for i, n in enumerate(lengths)
    }


def random_workload(make_request: MakeRequest, seed: int) -> Callable[[Engine], None]:
    """60 requests that arrive over 100 steps, some of which are aborted; the same for every engine."""

    def play(engine: Engine) -> None:
        rng = random.Random(seed)
        arriving = [
            make_request(f"r{i}", num_prompt_tokens=rng.randint(1, 120), max_tokens=rng.randint(1, 60))
            for i in range(60)
        ]
        for _ in range(100):
            for _ in range(rng.choice([0, 0, 1, 3])):
                if arriving:
                    engine.add([arriving.pop()])
            if rng.random() < 0.1:
                engine.abort(f"r{rng.randrange(60)}")
            engine.step()
        engine.add(arriving)
        engine.run()

    return play


@both_schedulers
@pytest.mark.parametrize("seed", [0, 1])
def test_fcfs_is_stock_vllm_step_for_step(
    scheduler_cls: type, seed: int, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    use_policy("fcfs")
    stock_cls = scheduler_cls.__bases__[1]
    play = random_workload(make_request, seed)
    stock, ours = make_engine(stock_cls), make_engine(scheduler_cls)
    for engine in (stock, ours):
        play(engine)
    assert ours.steps == stock.steps
    assert ours.tokens == stock.tokens
    assert ours.finished == stock.finished


@both_schedulers
@pytest.mark.parametrize("policy", ["fcfs", "oracle", "pars_fast"])
def test_everyone_gets_all_tokens_when_memory_runs_out(
    scheduler_cls: type, policy: str, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """With 16 blocks for 8 seats vLLM preempts; the order may differ from stock, what is served may not."""
    runtime = use_policy(policy, PARS_GUARD_FLOOR_REQUESTS="2")
    runtime.answer = lambda prompt: 5.0 + 37 * prompt[0] % 60
    engine = make_engine(scheduler_cls, max_num_seqs=8, num_blocks=16)
    lengths = {f"r{i}": 20 + 13 * i % 70 for i in range(30)}
    engine.add([make_request(i, num_prompt_tokens=30, max_tokens=n) for i, n in lengths.items()])
    for _ in range(20):
        engine.step()
    engine.abort("r7")
    engine.abort("r29")
    engine.run()
    assert engine.preemptions > 0
    completed = {i: n for i, n in lengths.items() if i not in ("r7", "r29")}
    assert {i: len(engine.tokens[i]) for i in completed} == completed
    assert completed.keys() <= engine.finished
    assert not engine.scheduler.waiting.entries
    assert not engine.scheduler.requests


@both_schedulers
def test_pars_fast_follows_the_scores(
    scheduler_cls: type, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    runtime = use_policy("pars_fast")
    engine = make_engine(scheduler_cls, max_num_seqs=1)
    engine.add([make_request(str(i), max_tokens=10) for i in range(8)])
    for _ in range(3):
        engine.step()
    runtime.score(lambda prompt: 500.0 - prompt[0])
    engine.run()
    assert engine.admitted == ["0", *map(str, range(7, 0, -1))]
    values = engine.scheduler._counters.values
    assert values["pars_scored"] == 7
    assert values["pars_overtaken"] == 6
    assert values["pars_active"] == 1


def test_below_saturation_nothing_is_scored(
    make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    runtime = use_policy("pars_fast")
    engine = make_engine(RankedScheduler, max_num_seqs=4)
    for _ in range(10):
        engine.add([make_request(max_tokens=3) for _ in range(4)])
        engine.run()
    assert runtime.submitted == []
    assert not engine.scheduler.waiting.arrivals


def test_requests_that_wait_for_a_grammar_do_not_start_the_ranker(
    make_engine: Any, make_request: MakeRequest, use_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM pops them, skips them and puts them back, step after step: no order would help them."""
    runtime = use_policy("pars_fast")
    engine = make_engine(RankedScheduler, max_num_seqs=4)
    blocked = {"0", "2"}
    monkeypatch.setattr(
        engine.scheduler, "_handle_blocked_waiting_request", lambda request: request.request_id not in blocked
    )
    engine.add([make_request(str(i), max_tokens=5) for i in range(4)])
    for _ in range(10):
        engine.step()
    assert engine.finished == {"1", "3"}
    assert runtime.submitted == []
    blocked.clear()
    engine.run()
    assert engine.finished == {"0", "1", "2", "3"}
    assert [len(tokens) for tokens in engine.tokens.values()] == [5] * 4


@both_schedulers
@pytest.mark.parametrize(
    "hook",
    [
        "_ranking_loop.before_step", "waiting.index.begin_step",
        "_ranking_loop.after_step", "waiting.index.plan_ahead",
    ],
)
def test_a_raising_hook_falls_back_and_all_are_served(
    scheduler_cls: type,
    hook: str,
    make_engine: Any,
    make_request: MakeRequest,
    use_policy: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = use_policy("pars_fast")
    engine = make_engine(scheduler_cls, max_num_seqs=1)
    caplog.clear()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug of ours")

    *path, name = hook.split(".")
    monkeypatch.setattr(operator.attrgetter(".".join(path))(engine.scheduler), name, fail)
    engine.add([make_request(str(i), max_tokens=5) for i in range(6)])
    with caplog.at_level(logging.ERROR, "vllm.pars_fast"):
        engine.run()
    assert engine.admitted == ["0", "1", "2", "3", "4", "5"]
    assert {len(tokens) for tokens in engine.tokens.values()} == {5}
    assert engine.scheduler._counters.values["pars_fallback_error"] == 1
    assert engine.scheduler._counters.values["pars_active"] == 0
    assert [record.getMessage() for record in caplog.records] == [
        "pars-fast: ranking is switched off, the queue is in arrival order"
    ]
    assert runtime.closed
    assert not engine.scheduler.waiting.arrivals
    assert len(engine.scheduler.waiting.entries) <= 1  # the last one, until the next step
    assert isinstance(engine.scheduler.waiting.index, ArrivalIndex)  # which keeps nothing of those who left


def test_what_is_shown_goes_on_when_the_order_fails(
    make_engine: Any, make_request: MakeRequest, use_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A counter does not begin anew, and how many wait is not that of the last good step."""
    monkeypatch.setattr(scheduler_module, "UPKEEP_EVERY_STEPS", 1)
    runtime = use_policy("pars_fast")
    engine = make_engine(RankedScheduler, max_num_seqs=1)
    engine.add([make_request(str(i), max_tokens=3) for i in range(8)])
    engine.step()
    runtime.score(lambda prompt: 500.0 - prompt[0])
    values = engine.scheduler._counters.values
    while not values["pars_overtaken"]:
        engine.step()
    overtaken = values["pars_overtaken"]
    monkeypatch.setattr(engine.scheduler.waiting.index, "set_expected_tokens", lambda *_: 1 / 0)
    engine.add([make_request("late", max_tokens=3)])
    while not runtime.pending:
        engine.step()
    runtime.score(lambda prompt: 5.0)
    while engine.scheduler.has_requests():
        engine.step()
        assert values["pars_overtaken"] >= overtaken
    assert values["pars_fallback_error"] == 1
    assert (values["pars_active"], values["pars_waiting"]) == (0, 0)


@both_schedulers
def test_admissions_are_counted_that_were_really_made(
    scheduler_cls: type,
    make_engine: Any,
    make_request: MakeRequest,
    use_policy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who is planned and finds no seat, or is skipped, is not; else a counter would fall again."""
    monkeypatch.setattr(scheduler_module, "UPKEEP_EVERY_STEPS", 1)
    use_policy("oracle")
    engine = make_engine(scheduler_cls, max_num_seqs=2)
    blocked = {"38", "39"}  # the shortest, so that nobody goes ahead of them
    monkeypatch.setattr(
        engine.scheduler, "_handle_blocked_waiting_request", lambda request: request.request_id not in blocked
    )
    engine.add([make_request(str(i), max_tokens=50 - i) for i in range(40)])
    while len(engine.finished) < 40:
        engine.step()
        if len(engine.finished) == 30:
            blocked.clear()
        order = list(map(int, engine.admitted))
        waiting = set(range(40)) - set(order)
        overtakes = 0
        for number in reversed(order):
            overtakes += any(older < number for older in waiting)
            waiting.add(number)
        assert engine.scheduler._counters.values["pars_overtaken"] == overtakes
    assert engine.scheduler._counters.values["pars_overtaken"] > 30


@both_schedulers
def test_all_requests_can_be_aborted_at_once(
    scheduler_cls: type, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    runtime = use_policy("pars_fast")
    engine = make_engine(scheduler_cls, max_num_seqs=2)
    engine.add([make_request(f"r{i}") for i in range(8)])
    for _ in range(3):
        engine.step()
    aborted = engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert {request.request_id for request in aborted} == {f"r{i}" for i in range(8)}
    assert not engine.scheduler.waiting
    engine.step()
    assert not engine.scheduler.waiting.entries
    runtime.score(lambda prompt: 7.0)  # late: they are gone
    engine.add([make_request("r0", max_tokens=3)])
    engine.run()
    assert engine.finished >= {"r0"}


@pytest.mark.parametrize("answers", [True, False], ids=["scored", "ranker silent"])
def test_ten_thousand_users_hang_up(
    answers: bool, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """While they come: the two that stay are served in order, and nothing is kept of the others."""
    # Without a guard: to the passing limit, who hangs up has gone ahead, too.
    runtime = use_policy("pars_fast", PARS_STALE_AFTER_S="3600", PARS_GUARD="none")
    order = ["short", "long"] if answers else ["long", "short"]
    if answers:
        runtime.answer = lambda prompt: 1000.0 if prompt[0] == 1 else 10.0
    engine = make_engine(RankedScheduler, max_num_seqs=1)
    scheduler, rng = engine.scheduler, random.Random(0)
    engine.add([make_request("running", max_tokens=5000), make_request("long", max_tokens=5)])
    engine.step()
    under_way: list[str] = []
    for i in range(10_000):
        under_way.append(f"user {i}")
        engine.add([make_request(under_way[-1], max_tokens=5)])
        if len(under_way) > 50:
            engine.abort(under_way.pop(rng.randrange(len(under_way))))
        if i % 10 == 0:
            engine.step()
    engine.add([make_request("short", max_tokens=5)])
    for request_id in under_way:
        engine.abort(request_id)
    for _ in range(5):
        engine.step()
    waiting, loop = scheduler.waiting, scheduler._ranking_loop
    assert set(waiting.entries) == {"running", "long", "short"}
    assert [request.request_id for request in waiting] == order
    engine.abort("running")
    engine.run()
    engine.step()
    assert engine.admitted == ["running", *order]
    if not answers:
        runtime.score(lambda prompt: 7.0)  # late: they are gone
        for _ in range(scheduler_module.UPKEEP_EVERY_STEPS):
            engine.step()
    held = (waiting.entries, waiting.arrivals, waiting.finished, waiting.forgotten, loop._in_flight,
            loop._known, loop._passed_over)
    assert [len(one) for one in held] == [0] * len(held)
    assert len(waiting) == len(scheduler.requests) == 0


def test_an_id_can_be_used_again_before_the_next_step(
    make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """The step that follows hears that the first one ended, and must not take the second for it."""
    use_policy("pars_fast")
    engine = make_engine(RankedScheduler, max_num_seqs=1)
    engine.add([make_request("running", max_tokens=30), make_request("waiting", max_tokens=3)])
    engine.step()
    for request_id in ("running", "waiting"):
        engine.abort(request_id)
        engine.add([make_request(request_id, max_tokens=3)])
    engine.step()
    assert set(engine.scheduler.waiting.entries) == {"running", "waiting"}
    engine.run()
    assert engine.finished == {"running", "waiting"}
    assert not engine.scheduler.waiting.entries


def test_a_client_may_abort_what_is_not_there(make_engine: Any, use_policy: Any) -> None:
    use_policy("fcfs")
    engine = make_engine(RankedScheduler)
    assert engine.scheduler.finish_requests(["nobody"], RequestStatus.FINISHED_ABORTED) == []


@both_schedulers
def test_running_requests_can_all_be_preempted(
    scheduler_cls: type, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """`reset_prefix_cache` puts every running request back; they go before all that wait."""
    use_policy("oracle")
    engine = make_engine(scheduler_cls, max_num_seqs=2)
    engine.add([make_request(str(i), max_tokens=20) for i in range(2)])
    for _ in range(4):
        engine.step()
    engine.add([make_request(str(i), max_tokens=3) for i in range(2, 6)])
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.step()
    assert engine.steps[-1].keys() == {"0", "1"}
    engine.run()
    assert {i: len(tokens) for i, tokens in engine.tokens.items()} == {
        "0": 20,
        "1": 20,
        "2": 3,
        "3": 3,
        "4": 3,
        "5": 3,
    }


def test_a_streaming_session_outlives_its_turns(
    make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """Each turn ends with a finish reason, yet the session may still be preempted in the next one."""
    use_policy("fcfs")
    engine = make_engine(RankedScheduler, max_num_seqs=2)
    engine.add([make_request("session", max_tokens=3, resumable=True)])
    for _ in range(6):
        engine.step()
    assert engine.scheduler.requests["session"].status is RequestStatus.WAITING_FOR_STREAMING_REQ
    engine.add([make_request("session", max_tokens=3, resumable=True)])
    engine.step()
    session = engine.scheduler.requests["session"]
    assert session.status is RequestStatus.RUNNING
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    for _ in range(6):
        engine.step()
    assert len(engine.tokens["session"]) == 6
    engine.abort("session")
    engine.step()
    assert not engine.scheduler.waiting.entries


def test_the_overtaking_bound_holds(make_engine: Any, make_request: MakeRequest, use_policy: Any) -> None:
    """Counted in tokens really made, with scores that are pure noise.

    A charge is corrected when its request finishes, so the last admissions ahead of a request may turn out
    longer than expected: at most one answer a seat.
    """
    seats, longest = 4, 40
    runtime = use_policy("pars_fast", PARS_GUARD="overtaking_budget:beta=0.5,floor_tokens=100")
    rng = random.Random(5)
    runtime.answer = lambda prompt: rng.lognormvariate(3, 1)
    engine = make_engine(RankedScheduler, max_num_seqs=seats)
    lengths = {f"r{i}": rng.randint(1, longest) for i in range(150)}
    budgets: dict[str, float] = {}
    for request_id, max_tokens in lengths.items():
        engine.add([make_request(request_id, max_tokens=max_tokens)])
        queue = engine.scheduler.waiting
        budgets[request_id] = queue.index.slack(queue.entries[request_id])
        engine.step()
    engine.run()
    arrival = {request_id: position for position, request_id in enumerate(lengths)}
    for position, request_id in enumerate(engine.admitted):
        ahead = (other for other in engine.admitted[:position] if arrival[other] > arrival[request_id])
        assert sum(lengths[other] for other in ahead) <= budgets[request_id] + seats * longest
    assert engine.scheduler.waiting.index.overtakes > 0
    assert engine.scheduler.waiting.index.promotions > 0


@pytest.mark.parametrize("asked", [True, False], ids=["bitmask", "no bitmask"])
def test_books_are_kept_while_the_model_runs_or_by_the_next_step(
    asked: bool, make_engine: Any, make_request: MakeRequest, use_policy: Any, monkeypatch: Any
) -> None:
    """An engine asks for no bitmask where nothing is sampled, as of a pooling model."""
    runtime = use_policy("pars_fast")
    runtime.answer = lambda prompt: 500.0 - prompt.ids[0]
    engine = make_engine(RankedScheduler, max_num_seqs=1)
    if not asked:
        monkeypatch.setattr(engine.scheduler, "get_grammar_bitmask", lambda output: None)
    engine.add([make_request(str(i), max_tokens=3) for i in range(4)])
    engine.step()
    assert len(runtime.submitted) == (3 if asked else 0)
    engine.step()
    assert len(runtime.submitted) == 3
    engine.run()
    assert engine.finished == {str(i) for i in range(4)}
    engine.step()
    engine.step()
    assert not engine.scheduler.waiting.entries
    assert engine.admitted == ["0", "3", "2", "1"]


def test_an_error_in_the_books_costs_no_request(
    make_engine: Any, make_request: MakeRequest, use_policy: Any, monkeypatch: Any
) -> None:
    use_policy("pars_fast")
    engine = make_engine(RankedScheduler, max_num_seqs=2)
    engine.add([make_request(str(i), max_tokens=3) for i in range(6)])
    engine.step()
    monkeypatch.setattr(engine.scheduler._learning, "hand_over", lambda now_s: 1 / 0)
    engine.run()
    assert engine.finished == {str(i) for i in range(6)}
    assert engine.scheduler._counters.values["pars_fallback_error"] == 1
    engine.step()
    assert not engine.scheduler.waiting.entries


def test_counters_tell_the_overhead(make_engine: Any, make_request: MakeRequest, use_policy: Any) -> None:
    use_policy("oracle")
    engine = make_engine(RankedScheduler, max_num_seqs=2)
    engine.add([make_request(max_tokens=30) for _ in range(10)])
    engine.run()
    values = engine.scheduler._counters.values
    assert len(engine.steps) > scheduler_module.TIMED_EVERY_STEPS
    assert 0 < values["pars_step_overhead_us_p50"] < math.inf
    assert values["pars_waiting"] == 0


def test_shutdown_ends_the_ranker(make_engine: Any, use_policy: Any) -> None:
    runtime = use_policy("pars_fast")
    engine = make_engine(RankedScheduler)
    engine.scheduler.shutdown()
    assert runtime.closed


def test_a_wrong_setting_stops_the_start(
    make_scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARS_POLICY", "sjf")
    allowed = "one of fcfs, priority, prompt_length, oracle, srpt, pars, pars_fast, ltr"
    with pytest.raises(ValueError, match=f"PARS_POLICY='sjf' is not allowed: expected {allowed}"):
        make_scheduler(RankedScheduler)


@both_schedulers
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_what_a_client_calls_its_priority_counts_only_under_vllms_policy_of_that_name(
    scheduler_cls: type, policy: str, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    use_policy("oracle")
    engine = make_engine(scheduler_cls, max_num_seqs=1, policy=policy)
    lengths, priorities = [30, 20, 10], [-5, 0, -9]
    engine.add([make_request(str(i), max_tokens=lengths[i], priority=priorities[i]) for i in range(3)])
    engine.run()
    assert engine.admitted == (["2", "1", "0"] if policy == "fcfs" else ["2", "0", "1"])


def test_the_queue_is_not_called_ranked_where_the_policy_is_order_of_arrival(
    make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    use_policy("fcfs")
    engine = make_engine(RankedScheduler, max_num_seqs=1)
    engine.add([make_request(max_tokens=5) for _ in range(4)])
    engine.run()
    assert engine.scheduler._counters.values["pars_active"] == 0


@pytest.mark.parametrize("policy", ["oracle", "justitia"])
def test_without_a_ranker_nothing_piles_up_for_one(
    policy: str, make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    use_policy(policy, PARS_TRUST_CALLER="1")
    engine = make_engine(RankedScheduler, max_num_seqs=2)
    engine.add([make_request(max_tokens=3, pars_score=7) for _ in range(20)])
    engine.run()
    engine.step()
    waiting = engine.scheduler.waiting
    assert [len(kept) for kept in (waiting.finished, waiting.forgotten, waiting.arrivals)] == [0, 0, 0]


@pytest.mark.parametrize("where", ["before", "in it", "nowhere"])
def test_what_was_recorded_is_written_at_the_end_whatever_failed(
    where: str, make_engine: Any, make_request: MakeRequest, use_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_policy("oracle")
    scheduler = make_engine(RankedScheduler).scheduler
    flushed: list[float] = []
    monkeypatch.setattr(scheduler, "_recorder", SimpleNamespace(flush=flushed.append))
    if where == "before":
        scheduler._fall_back(RuntimeError("a bug of ours"))
    if where == "in it":
        monkeypatch.setattr(scheduler._learning, "flush", lambda: 1 / 0)
    scheduler.shutdown()
    assert flushed == [scheduler_module.RECORD_FLUSH_S]
    assert scheduler._failed == (where != "nowhere")


def test_a_preempted_session_whose_turn_ends_leaves_nothing_behind(
    make_engine: Any, make_request: MakeRequest, use_policy: Any
) -> None:
    """Its last output was on its way by then: vLLM puts it into the queue again, and takes it out."""
    use_policy("fcfs")
    engine = make_engine(RankedScheduler, max_num_seqs=1)
    engine.add([make_request("session", max_tokens=9, resumable=True), make_request("next", max_tokens=3)])
    for _ in range(3):
        engine.step()
    scheduler = engine.scheduler
    session = scheduler.requests["session"]
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert session.status is RequestStatus.PREEMPTED
    scheduler._handle_stopped_request(session)
    assert [request.request_id for request in scheduler.waiting].count("session") == 1
    scheduler.waiting.remove_requests([session])
    scheduler.deferred_waiting.discard(session)
    assert [request.request_id for request in scheduler.waiting] == ["next"]
    assert len(scheduler.waiting) == 1


