"""The wait bound of docs/wait_bound.md on vLLM's own scheduler, whatever the scores.

Only the model's output and the ranker are made up. Requests come in bursts with prompts up to nearly the
whole KV cache, are preempted, aborted and of several priorities; the bound is checked for every one of them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from pars_fast.guards import OvertakingBudget, PassingLimit
from pars_fast.integration.runtime import READY, Prompt, RankerRuntime, Scored
from pars_fast.integration.scheduler import with_ranking
from pars_fast.settings import Settings
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.simulated_requests import block_hasher
from pars_fast.simulation.vllm_scheduler import make_scheduler

SEATS, LONGEST, KV_TOKENS = 4, 60, 320
ENGINE = EngineSettings(
    max_num_seqs=SEATS,
    max_num_batched_tokens=128,
    kv_cache_tokens=KV_TOKENS,
    block_size=16,
    max_model_len=320,
)
TOKEN = 0

Score = Callable[
    [random.Random, int], float
]  # of a request by its real answer, to a ranker's expected tokens
SCORES: dict[str, Score] = {
    "inverted": lambda rng, answer: 2.0 * LONGEST - answer,
    "all_shortest": lambda rng, answer: 1.0,
    "long_ones_shortest": lambda rng, answer: 1.0 if answer > LONGEST / 2 else 5000.0,
    "noise": lambda rng, answer: rng.lognormvariate(3, 2),
    "right": lambda rng, answer: float(answer),
    "absurd": lambda rng, answer: rng.choice([math.nan, math.inf, -5.0, 0.0, 1e300, 3.0]),
}


class MadeUpRanker:
    """A `RankerRuntime` whose scores are looked up by the request's number, its prompt's first token."""

    max_in_flight = 4
    weighs_prompts = False

    def __init__(self, score: Callable[[int], float], silence: float, rng: random.Random) -> None:
        self._score, self._silence, self._rng = score, silence, rng
        self._answers: list[Scored] = []

    def start(self) -> RankerRuntime:
        self._answers = [READY]
        return self

    def submit(self, prompts: Sequence[Prompt]) -> bool:
        self._answers += [Scored(prompt.seq, self._score(prompt.ids[0])) for prompt in prompts]
        return True

    def poll(self) -> list[Scored]:
        if self._rng.random() < self._silence:
            return []
        answers, self._answers = self._answers, []
        return answers

    def order(self) -> None:
        pass

    def forget(self, seqs: Sequence[int]) -> None:
        pass

    def failure(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(slots=True)
class Arrival:
    """A request, what it met, and the order of events: `admitted` and `left` are places in one count."""

    request: Request
    ahead: list[str]  # of its class, waiting when it came
    expected_ahead: float
    queue: int  # of those ahead, less the preempted ones
    came: int  # number of first admissions before it came
    left: int = 0  # number of first admissions before its own, or before its abort


class Run:
    """Serves `count` requests and keeps what the bound speaks of."""

    def __init__(
        self, seed: int, score: str, guard: OvertakingBudget | PassingLimit, *, count: int, priorities: int
    ) -> None:
        self.rng = random.Random(seed)
        self.guard, self.count, self.priorities = guard, count, priorities
        self.answers = [self._answer() for _ in range(count)]
        scores = [SCORES[score](self.rng, answer) for answer in self.answers]
        ranker = MadeUpRanker(scores.__getitem__, self.rng.choice([0.0, 0.7]), random.Random(seed))
        members = {
            "_read_settings": lambda self: Settings(policy="pars_fast", guard=guard, calibration=False),
            "_make_runtime": lambda self, settings: ranker,
        }
        ranked = type("Ranked", (with_ranking(Scheduler),), members)
        self.scheduler: Any = make_scheduler(ranked, ENGINE, "priority" if priorities > 1 else "fcfs")
        self.arrivals: dict[str, Arrival] = {}
        self.admitted: list[str] = []
        self.aborted: set[str] = set()
        self.preemptions = 0

    def _answer(self) -> int:
        return self.rng.randint(1, LONGEST if self.rng.random() < 0.4 else 6)

    def serve(self) -> None:
        idle = 0
        while len(self.arrivals) < self.count or self.scheduler.has_unfinished_requests():
            for _ in range(self.rng.choice([0, 0, 0, 1, 2, 12])):
                if len(self.arrivals) < self.count:
                    self._arrive()
            if self.rng.random() < 0.05:
                self._abort()
            if self.rng.random() < 0.02:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            if not self.scheduler.has_unfinished_requests():
                continue
            idle = 0 if self._step() else idle + 1
            assert idle < 3, "requests wait and nothing is planned"
        self.scheduler.shutdown()

    def _arrive(self) -> None:
        number = len(self.arrivals)
        answer = self.answers[number]
        longest_prompt = KV_TOKENS - LONGEST
        prompt_tokens = self.rng.choice([1, 8, 8, 40, longest_prompt // 2, longest_prompt])
        request = Request(
            str(number),
            [number] * prompt_tokens,
            SamplingParams(max_tokens=answer, ignore_eos=True),
            None,
            priority=self.rng.randrange(self.priorities),
            block_hasher=block_hasher(ENGINE.block_size),
        )
        index = self.scheduler.waiting.index
        ahead = [entry for entry in index if entry.priority == request.priority]
        expected_ahead = sum(index.expected(entry) for entry in ahead)
        self.arrivals[request.request_id] = Arrival(
            request,
            [entry.payload.request_id for entry in ahead],
            expected_ahead,
            queue=sum(entry.lane for entry in ahead),
            came=len(self.admitted),
        )
        self.scheduler.add_request(request)

    def _abort(self) -> None:
        alive = [i for i, a in self.arrivals.items() if not a.request.is_finished()]
        if alive:
            request_id = self.rng.choice(alive)
            self.aborted.add(request_id)
            if request_id not in self.admitted:
                self.arrivals[request_id].left = len(self.admitted)
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def _step(self) -> bool:
        output = self.scheduler.schedule()
        self.scheduler.get_grammar_bitmask(output)
        self.preemptions += len(output.preempted_req_ids or ())
        for new in output.scheduled_new_reqs:
            self.arrivals[new.req_id].left = len(self.admitted)
            self.admitted.append(new.req_id)
        ids = list(output.num_scheduled_tokens)
        if ids:
            requests = [self.scheduler.requests[request_id] for request_id in ids]
            tokens = [[] if request.is_prefill_chunk else [TOKEN] for request in requests]
            places = {request_id: place for place, request_id in enumerate(ids)}
            self.scheduler.update_from_output(output, ModelRunnerOutput(ids, places, tokens))
        return bool(ids)

    def check(self) -> None:
        """Every request is served in full, and the work ahead of each is bounded."""
        made = {i: arrival.request.num_output_tokens for i, arrival in self.arrivals.items()}
        for number, answer in enumerate(self.answers):
            assert made[str(number)] == answer or str(number) in self.aborted
        assert not self.scheduler.waiting
        order = {i: place for place, i in enumerate(self.arrivals)}
        for request_id, arrival in self.arrivals.items():
            priority = arrival.request.priority
            same = [i for i in self.admitted[: arrival.left] if self.arrivals[i].request.priority == priority]
            later = [i for i in same if order[i] > order[request_id]]
            if isinstance(self.guard, OvertakingBudget):
                self._check_work(self.guard, arrival, same, later, made)
            else:
                since = [a for i, a in self.arrivals.items() if order[i] >= order[request_id]]
                since = [a for a in since if a.request.priority == priority and a.came <= arrival.left]
                longest = max(a.queue for a in since)
                older = [i for i in same if i in arrival.ahead and i in self.admitted[arrival.came :]]
                limit = self.guard.floor_requests + (1 + self.guard.beta) * longest
                assert len(older) + len(later) <= limit

    def _check_work(
        self,
        guard: OvertakingBudget,
        arrival: Arrival,
        same: list[str],
        later: list[str],
        made: dict[str, int],
    ) -> None:
        unknown = SEATS * (LONGEST - 1)
        passed_by = sum(made[i] for i in later)
        tolerated = guard.floor_tokens + guard.beta * arrival.expected_ahead
        assert passed_by <= tolerated + unknown + 1e-6
        older = sum(made[i] for i in same if i in arrival.ahead)
        assert older + passed_by <= sum(made[i] for i in arrival.ahead) + tolerated + unknown + 1e-6


@pytest.mark.parametrize("score", SCORES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    beta=st.sampled_from([0.0, 0.5, 2.0]),
    floor=st.sampled_from([0, 3]),
    priorities=st.sampled_from([1, 1, 3]),
)
def test_the_passing_limit_holds_for_every_request(
    score: str, seed: int, beta: float, floor: int, priorities: int
) -> None:
    run = Run(seed, score, PassingLimit(beta, floor), count=80, priorities=priorities)
    run.serve()
    run.check()


@pytest.mark.parametrize("score", SCORES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    beta=st.sampled_from([0.0, 0.5, 2.0]),
    floor=st.sampled_from([0.0, 50.0, 500.0]),
    priorities=st.sampled_from([1, 1, 3]),
)
def test_the_bound_holds_for_every_request(
    score: str, seed: int, beta: float, floor: float, priorities: int
) -> None:
    run = Run(seed, score, OvertakingBudget(beta, floor), count=80, priorities=priorities)
    run.serve()
    run.check()


def test_what_the_bound_is_tested_on() -> None:
    """Requests are preempted, passed and promoted; without a guard the bound of one would be broken."""
    run = Run(1, "long_ones_shortest", OvertakingBudget(0.0, 50.0), count=300, priorities=1)
    run.serve()
    run.check()
    assert run.preemptions > 5
    assert run.aborted
    assert run.scheduler.waiting.index.overtakes > 5
    assert run.scheduler.waiting.index.promotions > 5

    free = Run(1, "long_ones_shortest", OvertakingBudget(0.0, math.inf), count=300, priorities=1)
    free.serve()
    free.guard = OvertakingBudget(0.0, 50.0)
    with pytest.raises(AssertionError):
        free.check()
