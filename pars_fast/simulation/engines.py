"""vLLM engines in flat arrays, advanced from event to event.

One engine step is vLLM's: running requests first, in order of admission, each decoding one token or
prefilling its next chunk; the last admitted are preempted when the KV cache has no block left; then, unless
one was preempted, waiting requests are admitted while seats, the token budget and KV blocks for the whole
prompt last. A step takes

    base_s + prefill_token_s * prefill tokens + decode_seq_s * decoding requests + kv_token_s * KV tokens read

Steps that only decode change nothing but counts until a request finishes, the KV cache is full, or someone
arrives at an engine with a free seat, so that many of them are taken at once: all decoding requests have
grown by the same number of tokens, `decoded`, and a request's own length is kept relative to it. KV blocks
are needed by those whose length reaches a multiple of the block size, counted by `phases`.

Arrays are by engine, or by request where said. An engine's next event is the end of the steps it has planned.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from pars_fast.simulation.arrays import Floats, Ints
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.heaps import EMPTY, tournament
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.waiting_queue import (
    IDLE_QUANTUM,
    Order,
    Queue,
    admit,
    finish,
    hand_over,
    head,
    next_change_s,
    preempt,
    take_scores,
    wants_scores,
)

_REQUEST_BITS = 32  # a finish is (decode step << 32) | request


class Costs(NamedTuple):
    """Seconds, as in `StepTime`."""

    base_s: float
    prefill_token_s: float
    decode_seq_s: float
    kv_token_s: float


class Limits(NamedTuple):
    """As in `EngineSettings`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int


class Requests(NamedTuple):
    """By request; times are NaN until they are known."""

    prompt_tokens: Ints
    output_tokens: Ints
    made: Ints  # output tokens at the last admission
    length: Ints  # tokens in the KV cache, less `decoded` while it decodes
    work_s: Floats  # what a router expects it to take
    kept_until: Ints  # blocks given out when the last of its blocks in the prefix cache is overwritten
    kept_blocks: Ints  # full blocks that it left there when it was preempted
    before: Ints  # the one admitted before it at its engine, of those that run
    behind: Ints
    first_scheduled_s: Floats
    first_token_s: Floats
    finished_s: Floats


class Engines(NamedTuple):
    """The state."""

    now_s: Floats  # when the planned steps begin
    planned_steps: Ints
    planned_s: Floats  # their time
    next_s: Floats  # tournament tree of when they end
    open_plan: Ints  # 1 if an arrival ends them early
    steps: Ints
    preemptions: Ints
    asked_steps: Ints  # of the planned steps, those after which prompts were handed over
    free_blocks: Ints
    given_blocks: Ints  # blocks given out since the start
    running: Ints
    decoding: Ints
    decoded: Ints
    kv_tokens: Ints  # held by decoding requests
    work_s: Floats  # of the unfinished requests, as a router expects it
    phases: Ints  # (engines, block_size) decoding requests by length modulo the block size
    finishes: Ints  # (engines, max_num_seqs) binary heap of finishes of decoding requests
    prefilled: Ints  # (engines, max_num_seqs) requests whose prefill ends in the planned step
    num_prefilled: Ints
    partial: Ints  # the request whose prefill goes on after it, or EMPTY
    newest: Ints  # the last of those that run, in order of admission


def make_engines(engines: int, settings: EngineSettings) -> Engines:
    """Idle engines."""

    def ints(*shape: int) -> Ints:
        return np.zeros(shape, dtype=np.int64)

    seats = settings.max_num_seqs
    return Engines(
        now_s=np.zeros(engines), planned_steps=ints(engines), planned_s=np.zeros(engines),
        next_s=tournament(engines, np.inf), open_plan=ints(engines), steps=ints(engines),
        preemptions=ints(engines), asked_steps=ints(engines), given_blocks=ints(engines),
        free_blocks=np.full(engines, settings.num_blocks, dtype=np.int64),
        running=ints(engines), decoding=ints(engines), decoded=ints(engines), kv_tokens=ints(engines),
        work_s=np.zeros(engines), phases=ints(engines, settings.block_size), finishes=ints(engines, seats),
        prefilled=ints(engines, seats), num_prefilled=ints(engines), partial=ints(engines) + EMPTY,
        newest=ints(engines) + EMPTY,
    )


def make_requests(prompt_tokens: Ints, output_tokens: Ints, work_s: Floats) -> Requests:
    """Requests of which nothing has been done."""
    count = len(prompt_tokens)
    made, length, kept_until, kept_blocks, before, behind = np.zeros((6, count), dtype=np.int64)
    first_scheduled_s, first_token_s, finished_s = np.full((3, count), np.nan)
    return Requests(prompt_tokens, output_tokens, made, length, work_s, kept_until, kept_blocks, before,
                    behind, first_scheduled_s, first_token_s, finished_s)


def step_costs(step_time: StepTime) -> Costs:
    return Costs(step_time.base_s, step_time.prefill_token_s, step_time.decode_seq_s, step_time.kv_token_s)


def engine_limits(settings: EngineSettings) -> Limits:
    return Limits(settings.max_num_seqs, settings.max_num_batched_tokens, settings.block_size)


# --- Time and blocks of steps that only decode --------------------------------------------------------------


@njit
def _decode_s(s: Engines, costs: Costs, e: int, steps: int) -> float:
    """Seconds of so many steps that only decode."""
    first = costs.base_s + s.decoding[e] * costs.decode_seq_s + costs.kv_token_s * s.kv_tokens[e]
    return steps * first + costs.kv_token_s * s.decoding[e] * (steps * (steps - 1) / 2)


@njit
def _steps_until(s: Engines, costs: Costs, e: int, elapsed_s: float, most: int) -> int:
    """The least number of decode steps, from 1 to `most`, that takes at least `elapsed_s`."""
    growth = costs.kv_token_s * s.decoding[e] / 2
    linear = _decode_s(s, costs, e, 1) - growth
    if elapsed_s <= 0:
        return 1
    if elapsed_s == math.inf:
        return most
    root = 2 * elapsed_s / (linear + math.sqrt(linear * linear + 4 * growth * elapsed_s))
    if root >= most:
        return most
    steps = max(1, math.ceil(root))
    while steps > 1 and _decode_s(s, costs, e, steps - 1) >= elapsed_s:
        steps -= 1
    while steps < most and _decode_s(s, costs, e, steps) < elapsed_s:
        steps += 1
    return steps


@njit
def _new_blocks(s: Engines, limits: Limits, e: int, steps: int) -> int:
    """KV blocks that the decoding requests need for so many more steps."""
    size = limits.block_size
    blocks = steps // size * s.decoding[e]
    for step in range(1, steps % size + 1):
        blocks += s.phases[e, (1 - s.decoded[e] - step) % size]
    return blocks


@njit
def _affordable_steps(s: Engines, limits: Limits, e: int, most: int) -> int:
    """How many of `most` decode steps the free blocks last for."""
    free = s.free_blocks[e]
    if _new_blocks(s, limits, e, most) <= free:
        return most
    cycles = free // s.decoding[e]
    free -= cycles * s.decoding[e]
    steps = cycles * limits.block_size
    while True:
        free -= s.phases[e, (-s.decoded[e] - steps) % limits.block_size]
        if free < 0:
            return steps
        steps += 1


# --- Finishes: a binary heap of packed integers -------------------------------------------------------------


@njit
def _push(heap: Ints, size: int, item: int) -> None:
    while size > 0 and heap[(size - 1) // 2] > item:
        heap[size] = heap[(size - 1) // 2]
        size = (size - 1) // 2
    heap[size] = item


@njit
def _sink(heap: Ints, size: int, place: int, item: int) -> None:
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = item


@njit
def _remove(heap: Ints, size: int, request: int) -> None:
    """Take out the finish of a request, wherever it is."""
    place = 0
    while heap[place] & ((1 << _REQUEST_BITS) - 1) != request:
        place += 1
    last = heap[size - 1]
    while place > 0 and heap[(place - 1) // 2] > last:
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    if place < size - 1:
        _sink(heap, size - 1, place, last)


# --- One plan -----------------------------------------------------------------------------------------------


@njit
def _blocks(limits: Limits, tokens: int) -> int:
    return (tokens + limits.block_size - 1) // limits.block_size


@njit
def _leave(s: Engines, r: Requests, e: int, i: int) -> None:
    """Take a request out of the chain of those that run."""
    s.running[e] -= 1
    if r.before[i] != EMPTY:
        r.behind[r.before[i]] = r.behind[i]
    if r.behind[i] != EMPTY:
        r.before[r.behind[i]] = r.before[i]
    else:
        s.newest[e] = r.before[i]


@njit
def _stop_decoding(s: Engines, limits: Limits, r: Requests, e: int, i: int) -> None:
    """Free the KV blocks of a decoding request; its place in `finishes` is the caller's."""
    tokens = r.length[i] + s.decoded[e]
    s.decoding[e] -= 1
    s.kv_tokens[e] -= tokens
    s.phases[e, r.length[i] % limits.block_size] -= 1
    s.free_blocks[e] += _blocks(limits, tokens)


@njit
def _give(s: Engines, e: int, blocks: int) -> None:
    s.free_blocks[e] -= blocks
    s.given_blocks[e] += blocks


@njit
def _preempt_newest(s: Engines, q: Queue, limits: Limits, r: Requests, e: int) -> None:
    """Its blocks join the free ones last, the first block very last, and are found until given out."""
    i = s.newest[e]
    tokens = r.length[i] if i == s.partial[e] else r.length[i] + s.decoded[e]
    r.kept_until[i] = s.given_blocks[e] + s.free_blocks[e] + _blocks(limits, tokens)
    r.kept_blocks[i] = tokens // limits.block_size
    _leave(s, r, e, i)
    if i == s.partial[e]:
        s.partial[e] = EMPTY
        s.free_blocks[e] += _blocks(limits, tokens)
    else:
        _remove(s.finishes[e], s.decoding[e], i)
        _stop_decoding(s, limits, r, e, i)
        r.made[i] = tokens - r.prompt_tokens[i] + 1
    s.preemptions[e] += 1
    preempt(q, e, i)


@njit
def _found_blocks(s: Engines, limits: Limits, r: Requests, e: int, i: int) -> int:
    """Blocks of a preempted request that the prefix cache still has; one token at least is computed."""
    kept = min(r.kept_blocks[i], r.kept_until[i] - s.given_blocks[e])
    return max(0, min(kept, (r.prompt_tokens[i] + r.made[i] - 1) // limits.block_size))


@njit
def _chunk(s: Engines, limits: Limits, r: Requests, e: int) -> int:
    """Tokens that the partly prefilled request prefills in the next step."""
    i = s.partial[e]
    if i == EMPTY:
        return 0
    budget = limits.max_num_batched_tokens - s.decoding[e]
    return min(r.prompt_tokens[i] + r.made[i] - r.length[i], budget)


@njit
def _needed_blocks(s: Engines, limits: Limits, r: Requests, e: int) -> int:
    """KV blocks that the running requests need for the next step."""
    blocks = _new_blocks(s, limits, e, 1)
    if s.partial[e] != EMPTY:
        held = r.length[s.partial[e]]
        blocks += _blocks(limits, held + _chunk(s, limits, r, e)) - _blocks(limits, held)
    return blocks


@njit
def plan(s: Engines, q: Queue, order: Order, costs: Costs, limits: Limits, r: Requests, e: int) -> None:
    """Schedule the next step of engine `e`, or as many as only decode; sets when they end."""
    now = s.now_s[e]
    take_scores(q, order, e, now)
    may_admit = True
    while _needed_blocks(s, limits, r, e) > s.free_blocks[e]:
        _preempt_newest(s, q, limits, r, e)
        may_admit = s.running[e] == 0
    prefill_tokens = _chunk(s, limits, r, e)
    reads = s.kv_tokens[e]
    decode_blocks = _new_blocks(s, limits, e, 1)  # given when the step is over
    i = s.partial[e]
    if i != EMPTY:
        reads += r.length[i]
        _give(s, e, _needed_blocks(s, limits, r, e) - decode_blocks)
        r.length[i] += prefill_tokens
        if r.length[i] == r.prompt_tokens[i] + r.made[i]:
            _note_prefilled(s, e, i)
            s.partial[e] = EMPTY
    budget = limits.max_num_batched_tokens - s.decoding[e] - prefill_tokens
    blocked = False
    while may_admit and budget > 0 and q.waiting_of[e] > 0 and s.running[e] < limits.max_num_seqs:
        i = head(q, order, e, now, s.steps[e] + 1)
        tokens = r.prompt_tokens[i] + r.made[i]
        if _blocks(limits, tokens) > s.free_blocks[e] - decode_blocks:
            blocked = True
            break
        admit(q, order, e, i)
        _join(s, r, e, i, now)
        found = _found_blocks(s, limits, r, e, i)
        chunk = min(tokens - found * limits.block_size, budget)
        r.length[i] = found * limits.block_size + chunk
        s.given_blocks[e] -= found
        _give(s, e, _blocks(limits, r.length[i]))
        reads += found * limits.block_size
        budget -= chunk
        prefill_tokens += chunk
        if r.length[i] == tokens:
            _note_prefilled(s, e, i)
        else:
            s.partial[e] = i
    hand_over(q, order, e, now)
    s.asked_steps[e] = 0
    s.planned_steps[e], s.planned_s[e], s.open_plan[e] = 1, math.inf, 0
    if s.running[e] == 0:
        s.planned_steps[e] = 0
    elif prefill_tokens > 0:
        s.planned_s[e] = (costs.base_s + costs.prefill_token_s * prefill_tokens
                          + costs.decode_seq_s * s.decoding[e] + costs.kv_token_s * reads)
    else:
        steps = (s.finishes[e, 0] >> _REQUEST_BITS) - s.decoded[e]
        if not may_admit or (blocked and order.guard == IDLE_QUANTUM):  # its clock is the steps
            steps = 1
        elif blocked:
            steps = _steps_until(s, costs, e, next_change_s(q, order, e, now) - now, steps)
        s.planned_steps[e] = _affordable_steps(s, limits, e, steps)
        s.planned_s[e] = _decode_s(s, costs, e, s.planned_steps[e])
        s.open_plan[e] = s.running[e] < limits.max_num_seqs


@njit
def _note_prefilled(s: Engines, e: int, i: int) -> None:
    s.prefilled[e, s.num_prefilled[e]] = i
    s.num_prefilled[e] += 1


@njit
def _join(s: Engines, r: Requests, e: int, i: int, now: float) -> None:
    """Put a request at the end of the chain of those that run."""
    if math.isnan(r.first_scheduled_s[i]):
        r.first_scheduled_s[i] = now
    r.before[i], r.behind[i] = s.newest[e], EMPTY
    if s.newest[e] != EMPTY:
        r.behind[s.newest[e]] = i
    s.newest[e] = i
    s.running[e] += 1


@njit
def steps_begun(s: Engines, costs: Costs, e: int, at_s: float) -> int:
    """How many of the planned steps have begun by a time."""
    if s.planned_steps[e] <= 1:
        return s.planned_steps[e]
    return _steps_until(s, costs, e, at_s - s.now_s[e], s.planned_steps[e])


@njit
def score_until(s: Engines, q: Queue, order: Order, costs: Costs, e: int, until_s: float) -> None:
    """Between those of the planned steps that have begun by a time, the ranker takes and gives."""
    if not order.uses_ranker:
        return
    begun = steps_begun(s, costs, e, until_s)
    while True:
        step = s.asked_steps[e] + 1
        if not wants_scores(q, order, e):
            if q.in_flight_of[e] == 0:
                break
            due = q.in_flight_due_s[e, 0] - s.now_s[e]
            step = max(step, _steps_until(s, costs, e, due, s.planned_steps[e]))
        if step >= begun:
            break
        time = s.now_s[e] + _decode_s(s, costs, e, step)
        take_scores(q, order, e, time)
        hand_over(q, order, e, time)
        s.asked_steps[e] = step
    s.asked_steps[e] = max(s.asked_steps[e], begun - 1)


@njit
def cut_plan(s: Engines, costs: Costs, e: int, at_s: float) -> None:
    """Someone arrived: the planned steps end with the one that is being taken."""
    steps = steps_begun(s, costs, e, at_s)
    if steps < s.planned_steps[e]:
        s.planned_steps[e] = steps
        s.planned_s[e] = _decode_s(s, costs, e, steps)


@njit
def commit(s: Engines, q: Queue, order: Order, costs: Costs, limits: Limits, r: Requests, e: int) -> None:
    """The planned steps are over: tokens come out, requests finish."""
    steps = s.planned_steps[e]
    if steps == 0:
        return
    score_until(s, q, order, costs, e, math.inf)
    s.steps[e] += steps
    _give(s, e, _new_blocks(s, limits, e, steps))
    s.decoded[e] += steps
    s.kv_tokens[e] += steps * s.decoding[e]
    now = s.now_s[e] + s.planned_s[e]
    s.now_s[e] = now
    while s.decoding[e] > 0 and s.finishes[e, 0] >> _REQUEST_BITS == s.decoded[e]:
        i = s.finishes[e, 0] & ((1 << _REQUEST_BITS) - 1)
        size = s.decoding[e] - 1
        _sink(s.finishes[e], size, 0, s.finishes[e, size])
        _stop_decoding(s, limits, r, e, i)
        _end(s, q, order, r, e, i, now)
    for k in range(s.num_prefilled[e]):
        i = s.prefilled[e, k]
        if math.isnan(r.first_token_s[i]):
            r.first_token_s[i] = now
        left = r.output_tokens[i] - r.made[i] - 1
        if left == 0:
            s.free_blocks[e] += _blocks(limits, r.length[i])
            _end(s, q, order, r, e, i, now)
            continue
        s.kv_tokens[e] += r.length[i]
        r.length[i] -= s.decoded[e]
        s.phases[e, r.length[i] % limits.block_size] += 1
        _push(s.finishes[e], s.decoding[e], ((s.decoded[e] + left) << _REQUEST_BITS) | i)
        s.decoding[e] += 1
    s.num_prefilled[e] = 0


@njit
def _end(s: Engines, q: Queue, order: Order, r: Requests, e: int, i: int, now: float) -> None:
    _leave(s, r, e, i)
    s.work_s[e] -= r.work_s[i]
    r.finished_s[i] = now
    finish(q, order, e, i, r.output_tokens[i])
