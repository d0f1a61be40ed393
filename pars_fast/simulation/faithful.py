"""The faithful simulator: the installed vLLM's own scheduler, on a virtual clock, without a model.

Real: vLLM's `Scheduler` with its KV block manager, chunked prefill, preemption and prefix cache, and all of
this project's integration inside it: `RankedRequestQueue`, `RankingMixin`, `RankingLoop`, policy and guard.
Made up: what the model says (every answer has its recorded length), how long a step takes (`StepTime`), and
the ranker, which gives `Workload.expected_tokens` after `ranker_delay_s`. A request that arrives during a
step is seen after it, as by EngineCore. Prompts share what the `hash_ids` of the trace say, else nothing:
then the prefix cache serves only preempted requests. It is the synchronous scheduler; AsyncScheduler, which
GPUs use, plans one step ahead.

Three policies ask for more. A length that is predicted again (`repredict_tokens`) has the relative error of
the first prediction, on what really remains. A model that is asked (`asks_model`) first serves the prompt
with a question behind it (`simulated_requests.py`); the request itself arrives when that is answered. KV
cache that is swapped (`swaps_kv`) is not computed again, but takes `SWAP_TOKEN_S` a token, both ways
together, nothing of it hidden behind other work; vLLM's token budget counts it all the same.
Source: vllm/v1/engine/core.py, vllm/v1/core/sched/scheduler.py (0.32).
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from pars_fast.errors import ParsFastError
from pars_fast.guards import Guard
from pars_fast.integration.process_runtime import ProcessRuntime
from pars_fast.integration.prompt_window import MAX_IDS
from pars_fast.integration.runtime import READY, Prompt, RankerRuntime, Scored
from pars_fast.integration.scheduler import with_ranking
from pars_fast.policies import POLICIES, Policy
from pars_fast.settings import Settings
from pars_fast.simulation.columns import Served
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.simulated_requests import (
    ESTIMATE_TOKENS,
    QUESTION_TOKENS,
    is_question,
    make_question,
    make_request,
)
from pars_fast.simulation.step_time import StepTime, step_work
from pars_fast.simulation.vllm_scheduler import make_scheduler
from pars_fast.simulation.workload import Workload

_TOKEN = 0  # what the model says
# Llama-3.1-8B: 131,072 bytes of KV cache a token in bf16, half of that in 8 bits; 25 GB/s by PCIe 4.0 x16.
SWAP_TOKEN_S = 2 * 65_536 / 25e9


def simulate(
    workload: Workload,
    policy: str | Policy,
    guard: Guard | None,
    engine: EngineSettings,
    step_time: StepTime,
    *,
    ranker_delay_s: float = 0.0,
) -> Served:
    """Serve a workload by one engine, as vLLM's scheduler and this project's queue would.

    Args:
        workload: the requests; those without expected tokens stay without a score.
        policy: a name of `POLICIES`, or one that was made with something of its own; it serves once.
        guard: bounds the order; None is the policy's own guard.
        engine: room of the engine; a request that an empty one could not hold is refused.
        step_time: how long a step takes.
        ranker_delay_s: from handing prompts over (`ProcessRuntime.max_in_flight` at once) to their scores.
    Raises: ParsFastError: if there is no such policy, or the delay is negative.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ParsFastError(f"no policy {policy!r}; there are: {', '.join(POLICIES)}")
        policy = POLICIES[policy]()
    if not ranker_delay_s >= 0:
        raise ParsFastError(f"ranker_delay_s must be >= 0, got {ranker_delay_s}")
    clock = VirtualClock()
    settings = Settings(
        guard=guard or policy.default_guard,
        trust_caller=policy.asks_model,
        calibration=False,
        log_every_s=0.0,
    )
    ranker = DelayedRanker(workload, ranker_delay_s, clock)
    scheduler_cls = type(
        "SimulatedScheduler",
        (with_ranking(Scheduler),),
        {
            "clock": clock,
            "_read_settings": lambda self: settings,
            "_make_policy": lambda self, settings: policy,
            "_make_runtime": lambda self, settings: ranker,
        },
    )
    scheduler = make_scheduler(scheduler_cls, engine)
    served = serve(
        scheduler, workload, engine, step_time, clock, ask_model=policy.asks_model, swap_kv=policy.swaps_kv
    )
    scheduler.shutdown()
    return served


class VirtualClock:
    """Seconds since the simulation began; called like `time.monotonic`."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


class DelayedRanker:
    """A `RankerRuntime` that knows its answers, by the request's number in the first token of its prompt."""

    max_in_flight = ProcessRuntime.max_in_flight
    weighs_prompts = False

    def __init__(self, workload: Workload, delay_s: float, clock: VirtualClock) -> None:
        self._workload, self._delay_s, self._clock = workload, delay_s, clock
        self._answers: deque[tuple[float, Scored]] = deque()  # (when it is known, answer), in order

    def start(self) -> RankerRuntime:
        self._answers = deque([(self._clock(), READY)])
        return self

    def submit(self, prompts: Sequence[Prompt]) -> bool:
        due = self._clock() + self._delay_s
        self._answers.extend((due, Scored(prompt.seq, self._tokens(prompt.ids))) for prompt in prompts)
        return True

    def _tokens(self, ids: Sequence[int]) -> float:
        """Expected tokens of the whole answer; `ids` are the prompt's ends, and the answer so far."""
        workload, number = self._workload, ids[0]
        expected, real = float(workload.expected_tokens[number]), int(workload.output_tokens[number])
        made = len(ids) - min(MAX_IDS, int(workload.prompt_tokens[number]))
        return made + (real - made) * expected / real

    def poll(self) -> list[Scored]:
        scored = []
        while self._answers and self._answers[0][0] <= self._clock():
            scored.append(self._answers.popleft()[1])
        return scored

    def order(self) -> None:
        """None: the order is the host's, as without a GPU."""

    def forget(self, seqs: Sequence[int]) -> None:
        pass

    def failure(self) -> str | None:
        return None

    def close(self) -> None:
        self._answers.clear()


def serve(
    scheduler: Scheduler,
    workload: Workload,
    engine: EngineSettings,
    step_time: StepTime,
    clock: VirtualClock,
    *,
    ask_model: bool = False,
    swap_kv: bool = False,
) -> Served:
    """Drive a scheduler of that engine, on that clock, until every request has finished or been refused.

    `ask_model` and `swap_kv` are as in `Policy`; a prompt beside which the question finds no room is served
    without an estimate.

    Raises: ParsFastError: if the scheduler plans nothing although requests wait.
    """
    record = _Record(workload)
    arrived, planned = 0, True
    while True:
        while arrived < len(workload) and workload.arrival_s[arrived] <= clock.time_s:
            prompt_tokens = int(workload.prompt_tokens[arrived])
            if engine.can_hold(prompt_tokens, int(workload.output_tokens[arrived])):
                asked = ask_model and engine.can_hold(prompt_tokens + QUESTION_TOKENS, ESTIMATE_TOKENS)
                make = make_question if asked else make_request
                scheduler.add_request(make(workload, arrived, engine.block_size))
            else:
                record.refused += 1
            arrived += 1
        if not scheduler.has_unfinished_requests():
            if arrived == len(workload):
                return record.served()
            clock.time_s = float(workload.arrival_s[arrived])
            continue
        output = scheduler.schedule()
        scheduler.get_grammar_bitmask(output)  # as an engine does: the moment for the bookkeeping
        if not (planned or output.total_num_scheduled_tokens):  # one such step may follow a preemption
            raise ParsFastError(f"{workload.name}: vLLM's scheduler plans nothing, and requests wait")
        planned = output.total_num_scheduled_tokens > 0
        if planned:
            for number in _step(scheduler, output, step_time, clock, record, swap_kv=swap_kv):
                scheduler.add_request(make_request(workload, number, engine.block_size, estimated=True))


def _step(
    scheduler: Scheduler,
    output: SchedulerOutput,
    step_time: StepTime,
    clock: VirtualClock,
    record: "_Record",
    *,
    swap_kv: bool,
) -> list[int]:
    """What the model would do with a plan, and how long it would take.

    Returns: the requests whose questions were answered.
    """
    requests = [scheduler.requests[request_id] for request_id in output.num_scheduled_tokens]
    recomputed = record.scheduled(output, requests, clock.time_s)
    prefill_tokens, decode_seqs, kv_tokens_read = step_work(requests, output.num_scheduled_tokens.values())
    if swap_kv:
        prefill_tokens -= recomputed
        clock.time_s += recomputed * SWAP_TOKEN_S
    clock.time_s += step_time.seconds(prefill_tokens, decode_seqs, kv_tokens_read)
    ids = list(output.num_scheduled_tokens)
    answers = [[] if request.is_prefill_chunk else [_TOKEN] for request in requests]
    positions = {request_id: position for position, request_id in enumerate(ids)}
    scheduler.update_from_output(output, ModelRunnerOutput(ids, positions, answers))
    return record.stepped(requests, clock.time_s)


class _Record:
    """When each request was scheduled first, had its first token, and its last; and what was done twice."""

    def __init__(self, workload: Workload) -> None:
        self._first_scheduled_s, self._first_token_s, self._finished_s = np.full((3, len(workload)), np.nan)
        self._waiting, self._silent = set(range(len(workload))), set(range(len(workload)))
        self._computed: dict[str, int] = {}  # the most tokens of a request that were ever in its KV cache
        self._preemptions = self._steps = self.refused = 0
        self._recomputed_tokens = self._prefix_hit_tokens = 0

    def scheduled(self, output: SchedulerOutput, requests: Sequence[Request], time_s: float) -> int:
        """Note a plan. Returns: its tokens that are computed again, after a preemption."""
        resumed = output.scheduled_cached_reqs.resumed_req_ids | {
            new.req_id for new in output.scheduled_new_reqs
        }
        recomputed = 0
        for request in requests:
            request_id = request.request_id
            now = request.num_computed_tokens
            before = now - output.num_scheduled_tokens[request_id]
            if request_id in resumed:
                self._prefix_hit_tokens += before
            most = self._computed.get(request_id, 0)
            recomputed += max(0, min(now, most) - before)
            self._computed[request_id] = max(now, most)
            if is_question(request_id):
                continue
            number = int(request_id)
            if number in self._waiting:
                self._waiting.remove(number)
                self._first_scheduled_s[number] = time_s
        self._recomputed_tokens += recomputed
        return recomputed

    def stepped(self, requests: Sequence[Request], time_s: float) -> list[int]:
        """Note what a step made. Returns: the requests whose questions it answered."""
        self._steps += 1
        answered = []
        for request in requests:
            finished = request.is_finished()
            if finished:
                self._preemptions += request.num_preemptions
                del self._computed[request.request_id]
            if is_question(request.request_id):
                answered += [request.prompt_token_ids[0]] * finished
                continue
            number = int(request.request_id)
            if number in self._silent and request.num_output_tokens:
                self._silent.remove(number)
                self._first_token_s[number] = time_s
            if finished:
                self._finished_s[number] = time_s
        return answered

    def served(self) -> Served:
        return Served(
            self._first_scheduled_s,
            self._first_token_s,
            self._finished_s,
            preemptions=self._preemptions,
            steps=self._steps,
            refused=self.refused,
            recomputed_tokens=self._recomputed_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
        )
