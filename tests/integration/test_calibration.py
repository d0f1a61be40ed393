"""Calibration on vLLM's real scheduler: a ranker that becomes useless in mid-run, and then good again."""

import importlib
import logging
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from pars_fast.integration import scheduler as scheduler_module
from pars_fast.integration.calibration import LiveCalibration, ending_of, in_shadow_share
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.scheduler import RankedAsyncScheduler, RankedScheduler
from pars_fast.live_calibration import COHORT_SIZE, Ending, Observation
from tests.integration.engine import Engine


class Server:
    """A saturated engine: 20 requests wait before every step; `lengths` by order of arrival.

    `fields_of` gives more of a request by the length of its answer.
    """

    def __init__(self, engine: Engine, make_request: Callable[..., Request]) -> None:
        self.engine, self.make_request = engine, make_request
        self.rng = random.Random(3)
        self.lengths: list[int] = []
        self.values = engine.scheduler._counters.values
        self.fields_of: Callable[[int], dict[str, Any]] = lambda length: {}

    def serve_until(self, done: Callable[[], bool], max_steps: int = 30_000) -> None:
        for _ in range(max_steps):
            while len(self.engine.scheduler.waiting) < 20:
                self.lengths.append(self.rng.choice((1, 2, 4, 8, 16)))
                name, length = str(len(self.lengths) - 1), self.lengths[-1]
                self.engine.add([self.make_request(name, max_tokens=length, **self.fields_of(length))])
            self.engine.step()
            self.engine.scheduler._background.drain(10.0)  # else a fast test outruns the thread
            if done():
                return
        raise AssertionError("it never happened")


@pytest.fixture(params=[RankedScheduler, RankedAsyncScheduler])
def server(
    request: pytest.FixtureRequest,
    make_scheduler: Callable[..., Any],
    make_request: Callable[..., Request],
    fake_runtime: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Server:
    monkeypatch.setattr(scheduler_module, "make_runtime", lambda settings, config: fake_runtime)
    asynchronous = {"async_scheduling": True} if issubclass(request.param, AsyncScheduler) else {}
    return Server(Engine(make_scheduler(request.param, **asynchronous)), make_request)


def test_ranking_goes_off_with_shuffled_scores_and_comes_back_with_good_ones(
    server: Server, fake_runtime: Any, caplog: pytest.LogCaptureFixture
) -> None:
    values, noise = server.values, random.Random(4)
    with caplog.at_level(logging.INFO, "vllm.pars_fast"):
        fake_runtime.answer = lambda prompt: float(server.lengths[prompt[0]])
        server.serve_until(lambda: values["pars_kendall_tau"] > 0.9)
        assert values["pars_kendall_tau_low"] > 0.8
        assert (values["pars_active"], values["pars_fallback_calibration"]) == (1, 0)

        fake_runtime.answer = lambda prompt: noise.uniform(1.0, 20.0)
        server.serve_until(lambda: values["pars_active"] == 0)
        assert values["pars_fallback_calibration"] == 1

        arrived, scored = len(server.lengths), len(fake_runtime.submitted)
        server.serve_until(lambda: len(server.lengths) >= arrived + 400)
        in_the_shadow = [prompt.seq for prompt in fake_runtime.submitted[scored:]]
        assert 30 <= len(in_the_shadow) <= 60
        assert all(map(in_shadow_share, in_the_shadow))
        last = [int(request_id) for request_id in server.engine.admitted[-200:]]
        assert last == sorted(last)

        fake_runtime.answer = lambda prompt: float(server.lengths[prompt[0]])
        server.serve_until(lambda: values["pars_active"] == 1)
    said = [record.getMessage().partition(" (")[0] for record in caplog.records]
    assert said.count("pars-fast: scores do not order the answers") == 1
    assert said.count("pars-fast: scores order the answers again") == 1
    server.engine.run()
    tokens = {request_id: len(made) for request_id, made in server.engine.tokens.items()}
    assert tokens == {str(seq): length for seq, length in enumerate(server.lengths)}


def test_expected_tokens_follow_a_model_that_talks_more(server: Server, fake_runtime: Any) -> None:
    """The ranker expects a fifth of what is served; later requests are charged with what it comes to."""
    fake_runtime.answer = lambda prompt: server.lengths[prompt[0]] / 5
    scale = server.engine.scheduler._calibration
    server.serve_until(lambda: scale._scale(8 / 5) > 5.0)
    server.serve_until(lambda: len(server.lengths) % 100 == 0)
    expected = {
        entry.expected_tokens: server.lengths[entry.seq]
        for entry in server.engine.scheduler.waiting.entries.values()
        if entry.expected_tokens is not None and entry.seq > len(server.lengths) - 15
    }
    assert expected
    assert all(0.5 * length <= tokens <= 5 + 2 * length for tokens, length in expected.items())


def test_applications_whose_answers_differ_are_told_apart(server: Server, fake_runtime: Any) -> None:
    """Behind one system prompt answers are short, behind another long; the ranker, which gets neither,
    expects the same of all."""
    rng = random.Random(5)
    short, long = list(range(100, 148)), list(range(200, 264))

    def of_an_application(length: int) -> dict[str, Any]:
        return {"prompt_token_ids": [*(short if length <= 2 else long), *rng.choices(range(300, 900), k=20)]}

    server.fields_of = of_an_application
    fake_runtime.answer = lambda prompt: 10.0
    server.serve_until(lambda: server.values["pars_kendall_tau_low"] > 0.5)
    expected: dict[bool, set[float]] = {True: set(), False: set()}
    for entry in server.engine.scheduler.waiting.entries.values():
        if entry.expected_tokens is not None and entry.seq > len(server.lengths) - 15:
            expected[server.lengths[entry.seq] <= 2].add(entry.expected_tokens)
    assert max(expected[True]) < min(expected[False])


def test_applications_are_known_by_short_system_prompts(server: Server, fake_runtime: Any) -> None:
    """Too short to be left out by their ids: the ranker, which reads the chat template, says which it was."""
    fake_runtime.answer = lambda prompt: 10.0
    fake_runtime.system_prompt = lambda prompt: 1 if server.lengths[prompt.seq] <= 2 else 2
    server.serve_until(lambda: server.values["pars_kendall_tau_low"] > 0.5)
    assert server.values["pars_applications"] == 2


def test_what_applications_say_counts_before_ranking_is_given_up() -> None:
    """The ranker's own expectations are worth nothing, and of six cohorts all were scored before the first
    had ended: each is judged with what those before it say of its applications."""
    rng = random.Random(7)
    calibration = LiveCalibration(values := CounterFile(None, 0), min_tau=0.1)
    for _ in range(6):
        applications = rng.choices(("one word", "essay"), k=COHORT_SIZE)
        calibration.learn([
            Observation(rng.uniform(10, 100), None, application, ending=Ending.COMPLETE,
                        output_tokens=rng.randint(1, 3) if application == "one word" else rng.randint(50, 90))
            for application in applications
        ])  # fmt: skip
        assert calibration.ranking
    assert values.values["pars_kendall_tau_low"] > 0.4


def test_without_calibration_nobody_looks(
    server: Server, fake_runtime: Any, make_scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARS_CALIBRATION", "0")
    blind = Server(Engine(make_scheduler(RankedScheduler)), server.make_request)
    noise = random.Random(4)
    fake_runtime.answer = lambda prompt: noise.uniform(1.0, 20.0)
    blind.serve_until(lambda: len(blind.lengths) > 400)
    assert (blind.values["pars_active"], blind.values["pars_fallback_calibration"]) == (1, 0)
    assert math.isnan(blind.values["pars_kendall_tau"])


@pytest.mark.parametrize(
    ("status", "ignore_eos", "made", "ending"),
    [
        (RequestStatus.FINISHED_STOPPED, False, 3, Ending.COMPLETE),
        (RequestStatus.FINISHED_LENGTH_CAPPED, False, 5, Ending.CAPPED),
        (RequestStatus.FINISHED_LENGTH_CAPPED, True, 5, Ending.COMPLETE),
        (RequestStatus.FINISHED_LENGTH_CAPPED, True, 3, Ending.CAPPED),  # the model's context was full
        (RequestStatus.FINISHED_REPETITION, False, 3, Ending.COMPLETE),
        (RequestStatus.FINISHED_ABORTED, True, 3, Ending.CUT),
        (RequestStatus.FINISHED_ERROR, False, 3, Ending.CUT),
        (RequestStatus.RUNNING, False, 3, Ending.CUT),
    ],
)
def test_how_an_answer_ended(
    status: RequestStatus, ignore_eos: bool, made: int, ending: Ending, make_request: Callable[..., Request]
) -> None:
    request = make_request(max_tokens=5)
    request.sampling_params = SamplingParams(max_tokens=5, ignore_eos=ignore_eos)
    request.append_output_token_ids([7] * made)
    request.status = status
    assert ending_of(request) is ending


def test_an_answer_that_the_models_context_cuts_is_no_whole_one(
    server: Server, make_request: Callable[..., Request]
) -> None:
    scheduler = server.engine.scheduler
    request = make_request(num_prompt_tokens=250, max_tokens=100)
    scheduler.max_model_len = 270
    server.engine.add([request])
    server.engine.run()
    assert (request.num_output_tokens, ending_of(request)) == (20, Ending.CAPPED)


def test_what_the_fit_needs_is_imported_while_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background thread the import would hold the interpreter's lock for long, while steps wait."""
    name = "pars_fast.integration.calibration"
    for module in ("scipy.optimize", name):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys.modules["pars_fast.integration"], "calibration", None)
    importlib.import_module(name)
    assert "scipy.optimize" in sys.modules


def test_how_a_pooling_request_ended(make_request: Callable[..., Request]) -> None:
    request = make_request(pooling=True)
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert ending_of(request) is Ending.CAPPED


def test_waits_are_noted_and_the_state_is_logged_under_load(
    server: Server, fake_runtime: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fake_runtime.answer = lambda prompt: float(server.lengths[prompt[0]])
    scheduler = server.engine.scheduler
    with caplog.at_level(logging.INFO, "vllm.pars_fast"):
        server.serve_until(lambda: len(server.engine.finished) >= 100)
        assert not [record for record in caplog.records if " waiting, " in record.getMessage()]
        scheduler._status_line._due_at = 0.0  # the next line is due
        server.serve_until(lambda: len(server.engine.finished) >= 120)
    (line,) = [record.getMessage() for record in caplog.records if " waiting, " in record.getMessage()]
    assert line.startswith("pars-fast: ")
    assert ", ranked; " in line
    counts = scheduler._counters.histograms
    server.engine.step()  # where the last endings are noted
    scheduler._learning.flush()
    scheduler._background.drain(10.0)
    noted = sum(counts["pars_queue_wait_seconds"]._cells[:-1])
    assert 120 <= noted <= len(server.engine.finished)
    assert sum(counts["pars_score_latency_seconds"]._cells[:-1]) == server.values["pars_scored"]
