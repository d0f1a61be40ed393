"""The ranking loop with a ranker in memory and a clock that the test moves."""

import logging
import math
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import pytest
from vllm.v1.request import Request

from pars_fast.guards import OvertakingBudget
from pars_fast.host_index import HostIndex
from pars_fast.integration.background import Background
from pars_fast.integration.calibration import SHADOW_SHARE, LiveCalibration, in_shadow_share
from pars_fast.integration.learning import Learning
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.prompt_window import MAX_IDS
from pars_fast.integration.queue import RankedRequestQueue
from pars_fast.integration.ranking_loop import MAX_RESTART_DELAY_S, START_DEADLINE_S, RankingLoop
from pars_fast.integration.runtime import Prompt
from pars_fast.live_calibration import TokenScale
from pars_fast.policies import POLICIES

STALE_AFTER_S = 5.0


class Bench:
    """A loop with everything around it. `step` is one scheduling step that admits nothing by itself."""

    def __init__(
        self,
        runtime: Any,
        make_request: Callable[..., Request],
        *,
        shadow: bool = False,
        trust_caller: bool = False,
    ) -> None:
        self.now = 1000.0
        self.runtime = runtime
        self.queue = RankedRequestQueue(
            HostIndex(POLICIES["pars_fast"](), OvertakingBudget(0.0, math.inf)), trust_caller=trust_caller
        )
        self.counters = CounterFile(None, 0).values
        file = CounterFile(None, 0)
        file.values = self.counters
        self.make_request = make_request
        self.calibration = LiveCalibration(file, min_tau=0.1)
        self._file, self._shadow = file, shadow
        self.loop = self.make_loop()

    def make_loop(self) -> RankingLoop:
        """A loop whose ranker starts now."""
        wait = self._file.histograms["pars_queue_wait_seconds"]
        learning = Learning(self.calibration, wait, None, None, Background("test", max_jobs=100))
        return RankingLoop(
            self.queue,
            self.runtime,
            self._file,
            self.calibration,
            learning,
            stale_after_s=STALE_AFTER_S,
            shadow=self._shadow,
            clock=lambda: self.now,
        )

    def step(self, *, left_waiting: bool = True, seconds: float = 0.01) -> None:
        self.loop.before_step()
        self.loop.after_step(left_waiting=left_waiting)
        self.now += seconds

    def add(self, count: int = 1, **fields: Any) -> list[Request]:
        requests = [self.make_request(**fields) for _ in range(count)]
        for request in requests:
            self.queue.add_request(request)
        return requests

    def fallbacks(self, reason: str) -> float:
        return self.counters[f"pars_fallback_{reason}"]

    def expected(self, request: Request) -> float | None:
        return self.queue.entries[request.request_id].expected_tokens


@pytest.fixture
def bench(fake_runtime: Any, make_request: Callable[..., Request]) -> Bench:
    return Bench(fake_runtime, make_request)


def descending(prompt: tuple[int, list[int]]) -> float:
    """Later requests are shorter, so that a ranked order is the reverse of arrival."""
    return 1000.0 - prompt[0]


def test_nothing_is_scored_while_nothing_is_left_waiting(bench: Bench) -> None:
    for _ in range(20):
        bench.add()
        bench.loop.before_step()
        bench.queue.pop_request()
        bench.loop.after_step(left_waiting=False)
    assert bench.runtime.submitted == []
    assert bench.counters["pars_submitted"] == 0
    assert not bench.queue.arrivals  # and nothing piles up


def test_scores_are_applied(bench: Bench) -> None:
    bench.runtime.answer = descending
    requests = bench.add(5)
    bench.step()
    bench.step()
    assert list(bench.queue) == requests[::-1]
    assert bench.counters["pars_submitted"] == bench.counters["pars_scored"] == 5


def test_nothing_is_submitted_before_the_ranker_is_ready(bench: Bench) -> None:
    bench.runtime.ready_on_start = False
    bench.runtime.start()
    bench.add(3)
    bench.step()
    assert bench.runtime.submitted == []
    bench.runtime.become_ready()
    bench.step()
    assert len(bench.runtime.submitted) == 3


def test_few_prompts_are_in_flight_at_once_newest_first(bench: Bench) -> None:
    requests = bench.add(3 * bench.runtime.max_in_flight)
    for _ in range(3):
        bench.step()
        assert len(bench.runtime.pending) == bench.runtime.max_in_flight
    for _ in range(4):
        bench.runtime.score(descending)
        bench.step()
    assert [prompt.seq for prompt in bench.runtime.submitted] == list(reversed(range(len(requests))))
    assert None not in [bench.expected(request) for request in requests]


def test_a_request_admitted_meanwhile_is_not_scored(bench: Bench) -> None:
    admitted, waiting = bench.add(2)
    assert bench.queue.pop_request() is admitted
    bench.step()
    assert [prompt.ids for prompt in bench.runtime.submitted] == [waiting.prompt_token_ids]


@pytest.mark.parametrize("answer", [math.nan, math.inf, -math.inf])
def test_a_prompt_that_cannot_be_scored_is_counted_and_keeps_the_median(bench: Bench, answer: float) -> None:
    bad, good = bench.add(2)
    bench.runtime.answer = lambda prompt: answer if prompt[0] == 0 else 40.0
    bench.step()
    bench.step()
    assert bench.expected(bad) is None
    assert bench.expected(good) == 40.0
    assert (bench.fallbacks("prompt"), bench.counters["pars_scored"]) == (1, 1)
    bench.step()
    assert len(bench.runtime.submitted) == 2  # not tried again


@pytest.mark.parametrize("ids", [None, []], ids=["no ids", "empty"])
def test_a_prompt_without_ids_is_counted(bench: Bench, ids: list[int] | None) -> None:
    (request,) = bench.add()
    request.prompt_token_ids = ids  # embeddings only
    bench.add()
    bench.step()
    assert [prompt.seq for prompt in bench.runtime.submitted] == [1]
    assert bench.fallbacks("prompt") == 1
    assert len(bench.queue) == 2


def test_of_a_prompt_of_100k_tokens_only_the_ends_are_handed_over(bench: Bench) -> None:
    bench.add(prompt_token_ids=list(range(100_000)))
    bench.step()
    assert bench.runtime.submitted == [Prompt(0, [*range(256), *range(99_744, 100_000)], 100_000)]


def test_an_abort_with_a_score_in_flight_does_not_touch_the_next_request_of_that_id(bench: Bench) -> None:
    (request,) = bench.add(request_id="again")
    bench.step()
    bench.queue.remove_requests([request])
    bench.queue.finish("again")
    (successor,) = bench.add(request_id="again")
    bench.runtime.score(lambda prompt: 7.0)
    bench.step()
    assert bench.expected(successor) is None
    bench.runtime.score(lambda prompt: 9.0)
    bench.step()
    assert bench.expected(successor) == 9.0
    assert len(bench.queue) == 1


def test_an_answer_to_a_question_nobody_asked_is_dropped(bench: Bench) -> None:
    (request,) = bench.add()
    bench.step()
    bench.runtime.pending.append(Prompt(12345, [1], 1))
    bench.runtime.score(lambda prompt: 7.0)
    bench.step()
    assert bench.expected(request) == 7.0
    assert bench.counters["pars_scored"] == 1


def test_a_failure_falls_back_to_arrival_order_once_said_and_counted(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.runtime.answer = descending
    requests = bench.add(4)
    bench.step()
    bench.step()
    assert list(bench.queue) == requests[::-1]
    bench.runtime.answer = None
    requests += bench.add(2)
    bench.step()
    with caplog.at_level(logging.INFO, "vllm.pars_fast"):
        bench.runtime.reason = "the ranker process ended with code -9"
        bench.step()
        assert list(bench.queue) == requests
        assert bench.fallbacks("ranker") == 1
        bench.step(seconds=1.1)  # the restart is due
        bench.runtime.answer = descending
        for _ in range(4):
            bench.step()
    assert bench.runtime.starts == 2
    assert list(bench.queue) == requests[::-1]  # the two in flight were asked again
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [
        "pars-fast: the ranker process ended with code -9; the queue is in arrival order until it is back"
    ]
    assert caplog.records[-1].getMessage() == "pars-fast: the ranker is back"


def test_restarts_come_at_growing_intervals(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A ranker that never comes up is started after 1, 2, 4, ... seconds, at most a minute apart."""
    bench.runtime.ready_on_start = False
    bench.runtime.start()
    bench.add()
    started_at = []
    for _ in range(40_000):
        before = bench.runtime.starts
        bench.runtime.reason = "no checkpoint"
        bench.step()
        if bench.runtime.starts > before:
            started_at.append(bench.now)
    gaps = [round(later - earlier) for earlier, later in pairwise(started_at)]
    assert gaps[:5] == [2, 4, 8, 16, 32]
    assert set(gaps[5:]) == {MAX_RESTART_DELAY_S}
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1
    assert len(bench.queue) == 1


def test_a_ranker_that_never_comes_up_is_tried_for_weeks(bench: Bench) -> None:
    bench.runtime.ready_on_start = False
    bench.runtime.start()
    for _ in range(5_000):
        bench.runtime.reason = "no checkpoint"
        bench.step(seconds=MAX_RESTART_DELAY_S)
    assert bench.fallbacks("ranker") > 2_000


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("no new thread")])
def test_a_system_without_room_for_the_ranker_is_asked_again(
    error: Exception, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine starts and serves meanwhile."""
    tries = []

    def fail() -> None:
        tries.append(bench.now)
        raise error

    bench.runtime.answer = descending
    with monkeypatch.context() as patch:
        patch.setattr(bench.runtime, "start", fail)
        bench.loop = bench.make_loop()
        requests = bench.add(4)
        for _ in range(10):
            bench.step(seconds=1.0)
        assert list(bench.queue) == requests
    assert len(tries) == bench.fallbacks("ranker") == 4  # after 0, 1, 3, and 7 s
    assert f"pars-fast: the ranker cannot be started: {error}; the queue is in arrival order" in caplog.text
    for _ in range(9):
        bench.step(seconds=1.0)
    assert list(bench.queue) == requests[::-1]


def test_a_ranker_may_be_started_in_the_place_of_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a GPU refuses the kernels: the loop goes on with what was started."""
    requests = bench.add(4)
    bench.runtime.ready_on_start = False
    bench.loop = bench.make_loop()
    bench.runtime.reason = "a kernel hung"
    bench.step(seconds=2.0)
    other = type(bench.runtime)(descending)
    monkeypatch.setattr(bench.runtime, "start", other.start)
    for _ in range(3):
        bench.step()
    assert list(bench.queue) == requests[::-1]
    assert (other.starts, bench.runtime.submitted, bench.fallbacks("ranker")) == (1, [], 1)
    assert "goes on without its GPU's kernels, on the CPU" in caplog.text
    bench.loop.close()
    assert other.closed


def test_a_prompt_that_kills_every_ranker_does_not_make_it_restart_ever_faster(bench: Bench) -> None:
    """Coming up is no recovery: only a score is."""
    bench.add()
    while bench.now < 1060.0:
        bench.step(seconds=0.05)
        if bench.runtime.pending:
            bench.runtime.reason = "the ranker process ended with code -11"
    assert 5 <= bench.fallbacks("ranker") <= 7  # after 1, 2, 4, ... seconds


def test_a_ranker_that_dies_while_idle_is_noticed(bench: Bench) -> None:
    """It holds no prompt then, so nobody would hear its silence."""
    bench.step()
    bench.runtime.accepts, bench.runtime.reason = False, "the ranker process ended with code -9"
    requests = bench.add(3)
    bench.step()
    assert bench.fallbacks("ranker") == 1
    bench.runtime.accepts, bench.runtime.answer = True, descending
    bench.step(seconds=1.1)
    for _ in range(3):
        bench.step()
    assert list(bench.queue) == requests[::-1]


def test_a_silent_ranker_counts_as_hung(bench: Bench) -> None:
    bench.step(seconds=100.0)  # silence without work is no hang
    requests = bench.add(3)
    bench.step(seconds=STALE_AFTER_S - 0.1)
    bench.step(seconds=0.2)
    assert bench.fallbacks("ranker") == 0
    bench.step()
    assert bench.fallbacks("ranker") == 1
    assert list(bench.queue) == requests
    bench.step(seconds=1.1)
    bench.step()  # the restart
    bench.step()
    assert bench.runtime.starts == 2
    assert [prompt.seq for prompt in bench.runtime.pending] == [0, 1, 2]


def test_a_slow_ranker_that_still_answers_is_not_hung(bench: Bench) -> None:
    for _ in range(10):
        bench.add(2)
        bench.step(seconds=STALE_AFTER_S - 0.1)
        bench.runtime.score(descending)
    assert bench.fallbacks("ranker") == 0


def test_a_clock_that_steps_back_costs_nothing(bench: Bench) -> None:
    bench.runtime.answer = descending
    requests = bench.add(3)
    bench.step()
    bench.now -= 3600.0
    for _ in range(3):
        bench.step()
    assert list(bench.queue) == requests[::-1]
    assert bench.fallbacks("ranker") == 0


def test_a_ranker_that_hangs_while_it_loads_is_started_anew(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.runtime.ready_on_start = False
    bench.loop = bench.make_loop()
    requests = bench.add(4)
    bench.step(seconds=START_DEADLINE_S)
    bench.step(seconds=0.1)
    assert bench.fallbacks("ranker") == 0
    bench.step(seconds=1.1)
    assert bench.fallbacks("ranker") == 1
    assert "the ranker was not ready 300 s after its start; the queue is in arrival order" in caplog.text
    bench.runtime.ready_on_start, bench.runtime.answer = True, descending
    starts = bench.runtime.starts
    for _ in range(4):
        bench.step()
    assert bench.runtime.starts == starts + 1
    assert list(bench.queue) == requests[::-1]


def test_a_ranker_that_loads_slowly_is_left_to_it(bench: Bench) -> None:
    bench.runtime.ready_on_start, bench.runtime.answer = False, descending
    bench.loop = bench.make_loop()
    starts = bench.runtime.starts
    requests = bench.add(4)
    bench.step(seconds=120.0)
    bench.step(seconds=120.0)
    bench.runtime.become_ready()
    bench.step(seconds=START_DEADLINE_S)  # what it has loaded in time, it has for good
    for _ in range(3):
        bench.step()
    assert (bench.runtime.starts, bench.fallbacks("ranker")) == (starts, 0)
    assert list(bench.queue) == requests[::-1]


def test_while_scores_are_of_no_use_a_share_is_scored_and_the_order_is_that_of_arrival(bench: Bench) -> None:
    """Nothing is lost by it: when scores are of use again, those passed over get theirs."""
    bench.runtime.answer = descending
    bench.calibration.ranking = False
    requests = bench.add(40)
    for _ in range(10):
        bench.step()
    shadow = [seq for seq in reversed(range(40)) if in_shadow_share(seq)]
    assert [prompt.seq for prompt in bench.runtime.submitted] == shadow
    assert 0 < len(shadow) < 20
    assert list(bench.queue) == requests
    bench.calibration.ranking = True
    newer = bench.add(2)
    for _ in range(10):
        bench.step()
    passed_over = [seq for seq in reversed(range(40)) if not in_shadow_share(seq)]
    assert [prompt.seq for prompt in bench.runtime.submitted[len(shadow) :]] == [41, 40, *passed_over]
    assert list(bench.queue) == [*reversed(newer), *reversed(requests)]


@pytest.mark.parametrize("period", [2, 3, 5, 8, 13, 16, 21, 100, 1000])
def test_clients_that_take_turns_all_have_their_share_in_the_shadow(period: int) -> None:
    """Each of `period` clients sends every so-manieth request; a fixed stride would see some of them only."""
    shares = [
        sum(in_shadow_share(seq) for seq in range(client, 200 * period, period)) / 200
        for client in range(min(period, 20))
    ]
    assert all(0.4 / SHADOW_SHARE < share < 1.9 / SHADOW_SHARE for share in shares)


def test_a_refused_hand_over_loses_nothing(bench: Bench) -> None:
    bench.runtime.accepts = False
    requests = bench.add(3)
    bench.step()
    bench.step()
    assert [entry.payload for entry in bench.queue.arrivals] == requests
    assert (bench.counters["pars_submitted"], bench.fallbacks("ranker")) == (0, 0)
    bench.runtime.accepts = True
    bench.step()
    assert [prompt.seq for prompt in bench.runtime.submitted] == [2, 1, 0]


def test_nothing_piles_up_while_the_ranker_is_away(bench: Bench) -> None:
    """A saturated server whose ranker never starts keeps no finished request."""
    bench.runtime.ready_on_start = False
    bench.runtime.start()
    bench.add(5)
    for _ in range(200):
        bench.add()
        bench.queue.finish(bench.queue.pop_request().request_id)
        bench.step()
    assert len(bench.queue.arrivals) <= 2 * len(bench.queue) == 10


@pytest.mark.parametrize("ranking", [True, False], ids=["ranked", "in arrival order"])
def test_what_has_left_is_forgotten_wherever_it_stood(bench: Bench, ranking: bool) -> None:
    """An old request that stays must not keep alive all that arrived after it."""
    bench.runtime.ready_on_start = not ranking  # no scores: all stay among the arrivals, or are passed over
    bench.loop = bench.make_loop()
    bench.calibration.ranking = ranking
    oldest = bench.add(5)
    for _ in range(200):
        for request in bench.add(5):
            bench.queue.remove_requests([request])
        bench.step()
    held = [*bench.queue.arrivals, *bench.loop._passed_over]
    assert len(held) <= 4 * len(bench.queue) == 20
    assert list(bench.queue) == oldest


def test_shadow_scores_but_keeps_arrival_order(
    fake_runtime: Any, make_request: Callable[..., Request]
) -> None:
    bench = Bench(fake_runtime, make_request, shadow=True)
    fake_runtime.answer = descending
    requests = bench.add(4)
    for _ in range(3):
        bench.step()
    assert bench.counters["pars_scored"] == 4
    assert list(bench.queue) == requests


def test_a_device_forgets_scored_requests_that_finished(bench: Bench) -> None:
    """Those only: with nothing to score it would never get round to forgetting. Late scores included."""
    unscored, scored, late = bench.add(3)
    bench.queue.remove_requests([unscored])
    bench.queue.finish(unscored.request_id)
    bench.step()
    assert bench.runtime.forgotten == []
    bench.queue.remove_requests([late])
    bench.queue.finish(late.request_id)
    bench.runtime.score(descending)
    bench.step()
    bench.queue.finish(scored.request_id)
    bench.step()
    assert bench.runtime.forgotten == [2, 1]
    assert not bench.loop._known


def test_a_device_is_not_told_of_requests_that_it_never_saw(
    fake_runtime: Any, make_request: Callable[..., Request]
) -> None:
    """With estimates of the callers' alone it scores nothing, and would keep what it is told for ever."""
    bench = Bench(fake_runtime, make_request, trust_caller=True)
    for _ in range(20):
        (request,) = bench.add(pars_score=7)
        bench.queue.remove_requests([request])
        bench.step()
    assert fake_runtime.submitted == fake_runtime.forgotten == bench.queue.finished == []


def test_a_new_device_order_does_not_part_what_is_shown_from_what_is_popped(bench: Bench) -> None:
    """A step may end with a request shown and not taken; the hint that comes next need not agree."""
    assert isinstance(bench.queue.index, HostIndex)
    bench.queue.index._device_order_min_waiting = 1
    bench.runtime.answer = descending
    bench.add(3)
    bench.step()
    bench.step()
    (nameless,) = bench.add()
    bench.runtime.answer = lambda prompt: math.nan  # a message that changes no key
    bench.step()
    bench.queue.peek_request()
    bench.runtime.device_order = [0, 1, 2]
    bench.step()
    assert bench.queue.peek_request() is bench.queue.pop_request()
    assert bench.expected(nameless) is None


def test_a_length_is_predicted_again_from_prompt_and_answer(bench: Bench) -> None:
    bench.runtime.answer = lambda prompt: float(len(prompt.ids))
    (request,) = bench.add(num_prompt_tokens=10)
    (longer,) = bench.add(num_prompt_tokens=MAX_IDS + 5)
    bench.step()  # the ranker is ready
    bench.step()
    request.append_output_token_ids([1] * 50)
    longer.append_output_token_ids([1] * 50)
    entries = [bench.queue.entries[each.request_id] for each in (request, longer)]
    bench.runtime.answer = None
    bench.loop.predict_again(entries)
    bench.loop.predict_again(entries)  # it is asked already
    asked = [Prompt(0, [*request.prompt_token_ids, *[1] * 50], request.num_prompt_tokens)]
    ends = [*longer.prompt_token_ids[:256], *longer.prompt_token_ids[-256:]]
    asked.append(Prompt(1, [*ends, *[1] * 50], longer.num_prompt_tokens))
    assert bench.runtime.submitted[2:] == asked
    assert bench.expected(request) == 10
    bench.runtime.answer = lambda prompt: float(len(prompt.ids))
    bench.step()
    assert (bench.expected(request), bench.expected(longer)) == (60, MAX_IDS + 50)
    assert bench.counters["pars_submitted"] == bench.counters["pars_scored"] == 4


def test_close_ends_the_ranker(bench: Bench) -> None:
    bench.loop.close()
    assert bench.runtime.closed


@pytest.mark.parametrize(("policy", "holds"), [("pars", True), ("pars_fast", False)])
def test_a_device_order_of_prompts_and_answers_is_dropped_on_another_scale(
    bench: Bench, policy: str, holds: bool
) -> None:
    index = bench.queue.index
    assert isinstance(index, HostIndex)
    index.set_policy(POLICIES[policy]())
    index._device_order_min_waiting = 1
    bench.runtime.answer = lambda prompt: 10.0
    bench.runtime.device_order = [1, 0]
    for scale, kept in ((TokenScale(), True), (TokenScale((1.0, 2.0), (3.0, 9.0)), holds)):
        bench.calibration._scale = scale
        bench.add(2)
        bench.step()
        bench.step()
        assert index._hint.tolist() == ([1, 0] if kept else [])


@pytest.mark.parametrize("policy", ["pars", "pars_fast"])
def test_a_device_order_is_dropped_where_applications_differ(bench: Bench, policy: str) -> None:
    index = bench.queue.index
    assert isinstance(index, HostIndex)
    index.set_policy(POLICIES[policy]())
    index._device_order_min_waiting = 1
    bench.runtime.answer = lambda prompt: 10.0
    bench.runtime.device_order = [1, 0]
    apart: dict[Hashable, float] = {None: 0.5, 7: 2.0}
    for factors, kept in (({}, True), (apart, False)):
        bench.calibration._factors = factors
        bench.add(2)
        bench.step()
        bench.step()
        assert index._hint.tolist() == ([1, 0] if kept else [])


@pytest.mark.parametrize("weighs_prompts", [True, False])
def test_the_prefix_cache_is_asked_only_for_a_ranker_that_weighs_prompts(
    bench: Bench, weighs_prompts: bool
) -> None:
    asked: list[Request] = []

    def cached_tokens(request: Any) -> int:
        asked.append(request)
        return 4

    bench.runtime.weighs_prompts = weighs_prompts
    bench.queue.index.policy.cached_tokens = cached_tokens
    requests = bench.add(3, num_prompt_tokens=10)
    bench.step()
    assert [prompt.num_tokens for prompt in bench.runtime.submitted] == [6 if weighs_prompts else 10] * 3
    assert asked == (requests[::-1] if weighs_prompts else [])
