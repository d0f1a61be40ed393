"""Justitia and VTC on vLLM's own requests, and the demand that Justitia predicts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pars_fast.errors import DataError, SettingsError
from pars_fast.host_index import HostIndex
from pars_fast.policies import Policy
from pars_fast.policies.applications import Application, application_of
from pars_fast.policies.demand import (
    ConstantDemand,
    MlpDemand,
    Network,
    fit_demand,
    load_demand,
    token_time,
)
from pars_fast.policies.justitia import Justitia
from pars_fast.policies.vtc import VirtualTokenCounter
from pars_fast.priority_class import Entry
from pars_fast.settings import Settings

pytest.importorskip("vllm")
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request


def request(
    number: int, app: Any = None, kind: Any = None, *, prompt_tokens: int = 10, max_tokens: int = 50
) -> Request:
    extra = {name: value for name, value in (("pars_app", app), ("pars_app_type", kind)) if value is not None}
    params = SamplingParams(max_tokens=max_tokens, extra_args=extra or None)
    return Request(f"request-{number}", [number] * prompt_tokens, params, None, arrival_time=float(number))


class Queue:
    """An index with a policy, fed with requests in order of arrival."""

    def __init__(self, policy: Policy) -> None:
        self.index = HostIndex(policy)
        self.seq = 0

    def add(self, *requests: Request) -> None:
        for waiting in requests:
            self.index.add(Entry(self.seq, waiting.priority, waiting))
            self.seq += 1

    def pop(self) -> Request:
        return self.index.pop().payload

    def order(self) -> list[str]:
        return [self.pop().request_id.removeprefix("request-") for _ in range(len(self.index))]


def step(policy: Any, *running: Request) -> None:
    """A step that decodes all of `running`."""
    policy.planned(running, [1] * len(running))


# --- Which application --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "kind", "expected"),
    [
        ("job", "map", Application("job", "map")),
        (17, None, Application("17", "")),
        (None, "map", Application("request request-3", "map")),
        (["job"], 4, Application("request request-3", "")),
        (True, None, Application("request request-3", "")),
    ],
)
def test_the_application_is_read_from_the_request(app: Any, kind: Any, expected: Application) -> None:
    assert application_of(request(3, app, kind)) == expected


def test_a_request_without_sampling_params_is_its_own_application() -> None:
    pooling = request(3)
    pooling.sampling_params = None
    assert application_of(pooling) == Application("request request-3", "")


# --- Justitia -----------------------------------------------------------------------------------------------


class ByType:
    def __call__(self, application: Application, prompt_tokens: int) -> float:
        return float(application.type)


def test_applications_run_one_after_another_by_virtual_finish() -> None:
    queue = Queue(Justitia(ByType()))
    queue.add(
        request(0, "long", "900"),
        request(1, "short", "30"),
        request(2, "long", "900"),
        request(3, "short", "30"),
        request(4, "middle", "100"),
    )
    assert queue.order() == ["1", "3", "4", "0", "2"]


def test_an_application_that_waited_is_not_passed_for_ever() -> None:
    """Virtual time goes on with what is served, so that a later short one comes behind an old long one."""
    policy = Justitia(ByType())
    queue = Queue(policy)
    queue.add(request(0, "long", "100"))
    running = request(1, "other", "1000", prompt_tokens=180)
    queue.add(running)
    running.num_computed_tokens = 180
    step(policy, running)  # 90 for each of the two
    queue.add(request(2, "short", "20"))
    assert queue.order() == ["0", "2", "1"]


def test_an_application_that_has_had_its_share_joins_anew() -> None:
    policy = Justitia(ByType())
    queue = Queue(policy)
    first = request(0, "app", "50")
    queue.add(first)
    first.num_computed_tokens = 60
    step(policy, first)
    queue.add(request(1, "other", "40"), request(2, "app", "50"))
    assert queue.order() == ["0", "1", "2"]


def run_to_its_end(policy: Justitia, served: Request, tokens: int) -> None:
    """A request that makes so many tokens, each in a step of its own."""
    for _ in range(tokens):
        served.num_computed_tokens = served.num_tokens
        step(policy, served)
        served.append_output_token_ids(1)
    policy.ended(served)


def test_an_end_changes_nothing_where_the_demand_was_right() -> None:
    """What runs first is done early, and shares the ideal with the others for as long as it would have."""
    policy = Justitia(ByType())
    first, second = request(0, "first", "750"), request(1, "second", "750")  # 10 * 30 + 30^2 / 2
    keys = [policy.key_on_arrival(each) for each in (first, second)]
    run_to_its_end(policy, first, 30)
    served = sum(10 + made for made in range(30))
    assert policy._share.virtual_time == pytest.approx(served / 2)
    assert policy.key_on_arrival(request(2, "third", "100")) == pytest.approx(served / 2 + 100)
    assert policy.key_on_arrival(request(3, "second", "750")) == keys[1] == 750


def test_a_demand_that_was_too_large_is_not_served_in_the_ideal() -> None:
    """Else those that are done would slow down virtual time, and whoever comes next would pass the others."""

    def virtual_time(said: str) -> float:
        policy = Justitia(ByType())
        policy.key_on_arrival(request(0, "waits", "1e6"))
        for number in range(1, 50):
            short = request(number, str(number), said)
            policy.key_on_arrival(short)
            run_to_its_end(policy, short, 20)
        return policy._share.virtual_time

    right = 10 * 20 + 20 * 20 / 2
    assert virtual_time("1e5") == pytest.approx(virtual_time(str(right)))


def test_an_application_between_two_stages_keeps_its_finish_time() -> None:
    policy = Justitia(ByType())
    policy.key_on_arrival(request(0, "other", "5000"))
    first = request(1, "stages", "1000")
    key = policy.key_on_arrival(first)
    run_to_its_end(policy, first, 5)
    for number in range(2, 20):
        passing = request(number, f"passing {number}", "50")
        policy.key_on_arrival(passing)
        run_to_its_end(policy, passing, 5)
    assert 10 * 5 + 5 * 5 / 2 < policy._share.virtual_time < key  # it has had what it cost
    assert policy.key_on_arrival(request(30, "stages", "1000")) == key


def test_applications_that_have_ended_are_forgotten() -> None:
    """Those of an engine that is never idle, whatever was said of them; of one that is, all."""
    policy = Justitia(ByType())
    last = request(0, "0", "1e15")
    policy.key_on_arrival(last)
    for number in range(1, 6000):
        following = request(number, str(number), "1e15")
        policy.key_on_arrival(following)
        policy.ended(last)
        last = following
    assert (len(policy._busy), len(policy._unfinished)) == (1, 1)
    assert len(policy._share) == 1
    assert len(policy._paused) == 4096
    policy.ended(last)
    assert len(policy._share) == len(policy._busy) == len(policy._paused) == len(policy._unfinished) == 0


def test_the_end_of_a_request_that_never_arrived_is_passed_over() -> None:
    policy = Justitia(ByType())
    policy.key_on_arrival(request(0, "app", "50"))
    policy.ended(request(1, "app", "50"))
    policy.ended(request(0, "app", "50"))  # another one of that id
    assert policy._busy["app"].unfinished == 1


# --- VTC ----------------------------------------------------------------------------------------------------


def test_the_least_served_application_runs_next_oldest_first() -> None:
    queue = Queue(VirtualTokenCounter())
    queue.add(
        request(0, "a", prompt_tokens=10),
        request(1, "a"),
        request(2, "a"),
        request(3, "b", prompt_tokens=25),
        request(4, "b"),
        request(5, "c", prompt_tokens=1),
    )
    # counters a, b, c: 10; 25; 1; then a again at 10, 20, 30, and b last
    assert queue.order() == ["0", "3", "5", "1", "2", "4"]


def test_output_tokens_count_twice() -> None:
    policy = VirtualTokenCounter()
    queue = Queue(policy)
    queue.add(
        request(0, "a", prompt_tokens=10), request(1, "b", prompt_tokens=13), request(2, "a"), request(3, "b")
    )
    first, second = queue.pop(), queue.pop()
    assert (first.request_id, second.request_id) == ("request-0", "request-1")
    step(policy, first)
    assert queue.index.head().payload.request_id == "request-2"  # a has 12, b 13
    step(policy, first)
    queue.index.begin_step(0.0)
    assert queue.order() == ["3", "2"]  # a has 14


def test_idleness_earns_nothing() -> None:
    policy = VirtualTokenCounter()
    queue = Queue(policy)
    queue.add(request(0, "a", prompt_tokens=100), request(1, "a"), request(2, "a"))
    queue.pop()
    queue.add(request(3, "late", prompt_tokens=5), request(4, "late"))  # lifted to 100
    assert queue.order() == ["1", "3", "4", "2"]


def test_the_last_one_that_left_the_queue_is_looked_up_as_it_is_now() -> None:
    """It went on decoding after it had left, and whoever comes then is lifted to all that it has got."""
    policy = VirtualTokenCounter()
    queue = Queue(policy)
    queue.add(request(0, "a", prompt_tokens=10))
    running = queue.pop()
    step(policy, *[running] * 5)
    assert policy.key_on_arrival(request(1, "b")) == 10 + 5 * 2


def test_the_last_one_that_left_the_queue_is_not_forgotten() -> None:
    policy = VirtualTokenCounter()
    for number in range(2000):
        served = request(number)
        policy.key_on_arrival(served)
        policy.admitted(served)
        step(policy, served)
        policy.ended(served)
    assert len(policy._counters) < 2000
    assert policy.key_on_arrival(request(2000)) == 2000 * (10 + 2)


def test_a_preempted_request_pays_for_its_prompt_once() -> None:
    policy = VirtualTokenCounter()
    queue = Queue(policy)
    queue.add(
        request(0, "a", prompt_tokens=10), request(1, "b", prompt_tokens=15), request(2, "a"), request(3, "b")
    )
    entry = queue.index.pop()
    entry.lane = 0
    queue.index.put_back(entry)
    assert queue.order() == ["0", "1", "2", "3"]


def test_an_id_that_is_used_again_is_a_new_request() -> None:
    policy = VirtualTokenCounter()
    old, new = request(0, "a"), request(0, "b")
    policy.key_on_arrival(old)
    policy.key_on_arrival(new)
    policy.ended(old)
    policy.admitted(new)
    assert policy.key_now(new, 0.0) == 10.0


def test_applications_that_are_done_are_forgotten() -> None:
    policy = VirtualTokenCounter()
    for number in range(5000):
        served = request(number)
        policy.key_on_arrival(served)
        policy.admitted(served)
        policy.ended(served)
    assert len(policy._counters) <= 1025
    assert not policy._unfinished
    assert not policy._charged
    assert not policy._waiting


APPS = st.sampled_from("abcd")


@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("arrive"), APPS, st.integers(1, 40)),
            st.tuples(st.just("admit"), st.none(), st.none()),
            st.tuples(st.just("step"), st.none(), st.none()),
        )
    )
)
def test_vtc_is_the_papers_algorithm(actions: list[tuple[str, Any, Any]]) -> None:
    """Algorithm 2 of the paper, with lists: lift, lowest counter first, charges of 1 and 2."""
    policy = VirtualTokenCounter()
    queue = Queue(policy)
    counters: dict[str, float] = {}
    waiting: list[tuple[str, Request]] = []
    running: list[tuple[str, Request]] = []
    last_left: str | None = None
    for number, (action, app, prompt_tokens) in enumerate(actions):
        if action == "arrive":
            if app not in (name for name, _ in waiting):
                idle = 0.0 if last_left is None else counters[last_left]
                lift = min((counters[name] for name, _ in waiting), default=idle)
                counters[app] = max(counters.get(app, 0.0), lift)
            waiting.append((app, request(number, app, prompt_tokens=prompt_tokens)))
            queue.add(waiting[-1][1])
            assert policy.key_now(waiting[-1][1], 0.0) == counters[app]
        elif action == "step":
            queue.index.begin_step(0.0)
            for name, _ in running:
                counters[name] += 2.0
            step(policy, *(served for _, served in running))
        elif waiting:
            queue.index.begin_step(0.0)
            chosen = min(waiting, key=lambda pair: counters[pair[0]])  # the oldest of equals
            assert queue.pop() is chosen[1]
            waiting.remove(chosen)
            running.append(chosen)
            counters[chosen[0]] += chosen[1].num_prompt_tokens
            if chosen[0] not in (name for name, _ in waiting):
                last_left = chosen[0]


# --- Demand -------------------------------------------------------------------------------------------------


def test_token_time_is_what_the_cache_holds_step_by_step() -> None:
    held = sum(30 + made for made in range(40))
    assert float(token_time(30, 40)) == pytest.approx(held, rel=0.02)


@pytest.fixture(scope="module")
def demand() -> MlpDemand:
    """Two types: one costs as its prompt, one the same whatever its prompt."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, 2000, 400)
    types = ["grows" if number % 2 else "constant" for number in range(400)]
    costs = np.where(np.arange(400) % 2, prompts * 100.0, 5000.0) * rng.lognormal(0, 0.2, 400)
    return fit_demand([*types, *["seldom"] * 5], [*prompts, *[50] * 5], [*costs, *[1e5] * 5])


def test_each_type_learns_its_own_demand(demand: MlpDemand) -> None:
    assert sorted(demand.networks) == ["", "constant", "grows"]  # 5 applications are too few
    for prompt in (50, 300, 1500):
        assert demand(Application("a", "grows"), prompt) == pytest.approx(prompt * 100, rel=0.3)
        assert demand(Application("a", "constant"), prompt) == pytest.approx(5000, rel=0.3)
    assert demand(Application("a", "unheard of"), 300) == demand.networks[""](300)


def test_no_prompt_makes_it_say_nonsense(demand: MlpDemand) -> None:
    for prompt in (0, 1, 10**7):
        assert 0 < demand(Application("a", "grows"), prompt) < math.inf


def test_the_file_holds_all_of_it(demand: MlpDemand, tmp_path: Path) -> None:
    demand.save(tmp_path / "demand.json")
    assert load_demand(tmp_path / "demand.json") == demand
    policy = Settings.from_environ(
        {"PARS_POLICY": "justitia", "PARS_DEMAND": str(tmp_path / "demand.json")}
    ).make_policy()
    key = policy.key_on_arrival(request(0, "app", "grows", prompt_tokens=200))  # type: ignore[arg-type]
    assert key == demand(Application("app", "grows"), 200)


def test_without_a_file_an_application_is_one_request() -> None:
    policy = Settings(policy="justitia").make_policy()
    key = policy.key_on_arrival(request(0, prompt_tokens=7))  # type: ignore[arg-type]
    assert key == ConstantDemand()(Application("", ""), 7) == 7 * 256 + 256**2 / 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"demand": {}}',
        '{"demand": {"": {}}}',
        json.dumps(
            {
                "demand": {
                    "": {"weights": [[[1.0, 2.0]]], "biases": [[0.0]], "centre": "x", "spread": 1, "scale": 1}
                }
            }
        ),
        json.dumps(
            {
                "demand": {
                    "chat": {"weights": [[[1.0]]], "biases": [[0.0]], "centre": 0, "spread": 1, "scale": 1}
                }
            }
        ),
    ],
)
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "demand.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"demand\.json: not a file that `pars-fast fairness demand` wrote"):
        load_demand(path)
    with pytest.raises(SettingsError, match="PARS_DEMAND"):
        Settings.from_environ({"PARS_DEMAND": str(path)})


def test_a_network_is_layers_with_relu() -> None:
    network = Network([[[1.0, -1.0]], [[2.0], [3.0]]], [[0.0, 0.0], [0.5]], centre=0.0, spread=1.0, scale=2.0)
    assert network(10) == pytest.approx(2 * math.exp(2 * math.log(10) + 0.5))
