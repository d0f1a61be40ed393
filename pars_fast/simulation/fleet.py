"""Up to a hundred thousand data-parallel engines behind one router; a single engine is a fleet of one.

Routers: `round_robin`; `least_loaded`, by vLLM's own measure for data-parallel engines, waiting + running
and a penalty on waiting where the KV cache is more than half full (0.32, vllm/v1/engine/core_client.py);
`predicted_work`, by the seconds that the unfinished requests of an engine are expected to take of a full
batch. Ties go to the first engine. A router sees an engine as it is at the end of the last step that was
over when the request arrived; a request stays where it was sent.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numba import njit

import pars_fast.guards.passing_limit as passing_limit_module
import pars_fast.policies.prompt_size as prompt_size_module
import pars_fast.simulation.arrays as arrays_module
import pars_fast.simulation.charge_tree as charge_tree_module
import pars_fast.simulation.engines as engines_module
import pars_fast.simulation.heaps as heaps_module
import pars_fast.simulation.queue_guards as queue_guards_module
import pars_fast.simulation.queue_state as queue_state_module
import pars_fast.simulation.waiting_queue as waiting_queue_module
from pars_fast.errors import ParsFastError
from pars_fast.guards import Guard
from pars_fast.policies import POLICIES, SharingPolicy, prompt_work
from pars_fast.simulation.arrays import Flags, Floats, Records, compiled
from pars_fast.simulation.columns import Served
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.engines import (
    Costs,
    Engines,
    Limits,
    commit,
    cut_plan,
    engine_limits,
    make_engines,
    make_requests,
    plan,
    score_until,
    seen_s,
    step_costs,
    steps_begun,
)
from pars_fast.simulation.heaps import least, set_value, tournament
from pars_fast.simulation.queue_guards import Order, guard_order
from pars_fast.simulation.queue_state import INITIAL_MEDIAN, Queue, make_queue
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.waiting_queue import arrive
from pars_fast.simulation.workload import Workload

Router = Literal["round_robin", "least_loaded", "predicted_work"]
ROUTERS: tuple[Router, ...] = get_args(Router)
_ROUND_ROBIN, _LEAST_LOADED, _PREDICTED_WORK = range(3)
MAX_ENGINES = 100_000
FAST_POLICIES = [
    name for name, policy in POLICIES.items()
    if prompt_work(policy) is not None
    and not (policy.preempts or policy.asks_model or issubclass(policy, SharingPolicy))
]


def simulate_fleet(
    workload: Workload,
    policy: str,
    guard: Guard | None,
    engine: EngineSettings,
    step_time: StepTime,
    *,
    engines: int = 1,
    router: Router = "round_robin",
    ranker_delay_s: float = 0.0,
) -> Served:
    """Serve a workload on `engines` equal engines, each with a queue, a guard and a ranker of its own.

    Args:
        workload: the requests; those that an empty engine could not hold are refused.
        policy: a name of `pars_fast.policies.POLICIES`, the order of each queue.
        guard: bounds the order; None is the policy's own guard.
        router: who gets a request; by predicted work, one without a score counts as one of the median score,
            and scores are there at once.
        ranker_delay_s: from handing prompts over (`MAX_IN_FLIGHT` at once) to having their scores.
    Raises: ParsFastError: if there is no such policy or router, or a number is out of range.
    """
    _check(policy, router, engines, ranker_delay_s)
    held = fits(workload, engine)
    first_scheduled_s, first_token_s, finished_s = times = np.full((3, len(workload)), np.nan)
    preemptions = steps = 0
    if held.any():
        chosen = workload if held.all() else workload.take(np.flatnonzero(held))
        rules = POLICIES[policy]
        lengths = chosen.output_tokens.astype(np.float64)
        expected = lengths if rules.knows_lengths else chosen.expected_tokens
        order = guard_order(guard or rules.default_guard, score_delay_s=ranker_delay_s,
                            uses_ranker=rules.uses_ranker, prompt_work=prompt_work(rules) or 0.0)
        known = expected if rules.uses_ranker or rules.knows_lengths else np.full(len(chosen), np.nan)
        queue = make_queue(chosen.arrival_s, chosen.prompt_tokens, _keys(chosen, policy), known, engines)
        requests = make_requests(chosen.prompt_tokens, chosen.output_tokens,
                                 _work_s(chosen, expected, engine, step_time))
        state = make_engines(engines, engine)
        _SERVE(state, queue, order, step_costs(step_time), engine_limits(engine), requests,
               ROUTERS.index(router), tournament(engines, 0.0))
        times[:, held] = requests.first_scheduled_s, requests.first_token_s, requests.finished_s
        preemptions, steps = int(state.engine.preemptions.sum()), int(state.engine.steps.sum())
    refused = int((~held).sum())
    return Served(first_scheduled_s, first_token_s, finished_s, preemptions, steps, refused)


def fits(workload: Workload, engine: EngineSettings) -> Flags:
    """Which requests an empty engine can hold, (N,) bool; `EngineSettings.can_hold` for all of them."""
    tokens = workload.prompt_tokens + workload.output_tokens
    held: Flags = tokens <= min(engine.max_model_len, engine.num_blocks * engine.block_size)
    return held


def _check(policy: str, router: str, engines: int, ranker_delay_s: float) -> None:
    if policy not in POLICIES:
        raise ParsFastError(f"no policy {policy!r}; there are: {', '.join(POLICIES)}")
    if policy not in FAST_POLICIES:
        raise ParsFastError(f"{policy} preempts, or goes by more than an expected length: "
                            "take --engine faithful")
    if router not in ROUTERS:
        raise ParsFastError(f"no router {router!r}; there are: {', '.join(ROUTERS)}")
    if not 1 <= engines <= MAX_ENGINES:
        raise ParsFastError(f"engines must be from 1 to {MAX_ENGINES:,}, got {engines}")
    if not 0 <= ranker_delay_s < np.inf:
        raise ParsFastError(f"ranker_delay_s must be finite and >= 0, got {ranker_delay_s}")


def _keys(workload: Workload, policy: str) -> Floats:
    """What each policy's key is of a request with vLLM's lengths and the ranker's expectation."""
    match policy:
        case "fcfs" | "priority":
            return np.zeros(len(workload))
        case "prompt_length":
            return workload.prompt_tokens.astype(np.float64)
        case "oracle":
            return workload.output_tokens.astype(np.float64)
    expected = workload.expected_tokens
    work = prompt_work(POLICIES[policy]) or 0.0
    return np.sqrt(expected * (expected + work * workload.prompt_tokens))


def _work_s(workload: Workload, expected: Floats, engine: EngineSettings, step_time: StepTime) -> Floats:
    """Seconds of a full batch's time that each request is expected to take."""
    known = expected[~np.isnan(expected)]
    tokens = np.where(np.isnan(expected), np.median(known) if len(known) else INITIAL_MEDIAN, expected)
    token_s = step_time.base_s / engine.max_num_seqs + step_time.decode_seq_s
    kv_s = step_time.kv_token_s * (workload.prompt_tokens + tokens / 2)
    return workload.prompt_tokens * step_time.prefill_token_s + tokens * (token_s + kv_s)


@compiled
def _advance(s: Engines, q: Queue, order: Order, costs: Costs, limits: Limits, r: Records, e: int,
             router: int, load: Floats) -> None:
    me = s.engine[e]
    commit(s, q, order, costs, limits, r, e)
    plan(s, q, order, costs, limits, r, e)
    set_value(s.next_s, e, me.now_s + me.planned_s)
    _set_load(s, q, limits, e, router, load)


@compiled
def _set_load(s: Engines, q: Queue, limits: Limits, e: int, router: int, load: Floats) -> None:
    me, here = s.engine[e], q.engine[e]
    if router == _LEAST_LOADED:
        waiting, used = here.num_waiting, 1.0 - me.free_blocks / limits.num_blocks
        set_value(load, e, waiting + me.running + 6.0 * waiting * max(0.0, used - 0.5))
    elif router == _PREDICTED_WORK:
        set_value(load, e, me.work_s)


def _compiled(sources: int) -> Callable[..., None]:
    """The loop over events. Numba keeps compiled code by this file alone and by what a function closes over,
    so a checksum of all files whose code or constants are compiled into it stands there too."""

    @njit(cache=True, error_model="numpy", _nrt=False)  # as `compiled`
    def serve(s: Engines, q: Queue, order: Order, costs: Costs, limits: Limits, r: Records, router: int,
              load: Floats) -> None:
        _ = sources
        for i in range(len(q.request)):
            now = q.request[i].arrival_s
            while s.next_s[1] < now:
                _advance(s, q, order, costs, limits, r, least(s.next_s), router, load)
            e = i % len(s.engine) if router == _ROUND_ROBIN else least(load)
            me = s.engine[e]
            score_until(s, q, order, costs, e, now)
            step = me.steps + steps_begun(me, costs, now)
            arrive(q, order, e, i, seen_s(me, costs, now), step)
            me.work_s += r[i].work_s
            if me.planned_steps == 0:  # idle; it wakes when all who come at this moment are there
                me.now_s = now
                me.planned_s = 0.0
                set_value(s.next_s, e, now)
            elif me.open_plan:
                cut_plan(me, costs, now)
                set_value(s.next_s, e, me.now_s + me.planned_s)
            _set_load(s, q, limits, e, router, load)
        while s.next_s[1] < np.inf:
            _advance(s, q, order, costs, limits, r, least(s.next_s), router, load)

    return serve


_SOURCES = (
    arrays_module, charge_tree_module, engines_module, heaps_module, passing_limit_module, prompt_size_module,
    queue_guards_module, queue_state_module, waiting_queue_module,
)
_SERVE = _compiled(zlib.crc32(b"".join(Path(source.__file__ or "").read_bytes() for source in _SOURCES)))
