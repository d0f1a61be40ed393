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

An engine's next event is the end of the steps it has planned.
"""

import math
from typing import NamedTuple

import numpy as np

from pars_fast.simulation.arrays import Floats, Ints, Records, compiled
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.heaps import EMPTY, tournament
from pars_fast.simulation.queue_guards import IDLE_QUANTUM, Order
from pars_fast.simulation.queue_state import Queue
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.waiting_queue import (
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
    num_blocks: int
    enable_prefix_caching: bool


REQUEST = np.dtype([
    ("prompt_tokens", "i8"),
    ("output_tokens", "i8"),
    ("made", "i8"),  # output tokens at the last admission
    ("length", "i8"),  # tokens in the KV cache, less `decoded` while it decodes
    ("work_s", "f8"),  # what a router expects it to take
    ("kept_until", "i8"),  # blocks given out when the last of its blocks in the prefix cache is overwritten
    ("kept_blocks", "i8"),  # full blocks that it left there when it was preempted
    ("before", "i8"),  # the one admitted before it at its engine, of those that run
    ("behind", "i8"),
    ("first_scheduled_s", "f8"),  # times are NaN until they are known
    ("first_token_s", "f8"),
    ("finished_s", "f8"),
], align=True)

ENGINE = np.dtype([
    ("now_s", "f8"),  # when the planned steps begin
    ("planned_steps", "i8"),
    ("planned_s", "f8"),  # their time
    ("open_plan", "?"),  # whether an arrival ends them early
    ("asked_steps", "i8"),  # of the planned steps, those after which prompts were handed over
    ("steps", "i8"),
    ("preemptions", "i8"),
    ("free_blocks", "i8"),
    ("given_blocks", "i8"),  # given out since the start, less those that went back to the front
    ("most_given_blocks", "i8"),  # so far: what was given out once is overwritten
    ("running", "i8"),
    ("decoding", "i8"),
    ("decoded", "i8"),
    ("kv_tokens", "i8"),  # held by decoding requests
    ("work_s", "f8"),  # of the unfinished requests, as a router expects it
    ("num_prefilled", "i8"),
    ("partial", "i8"),  # the request whose prefill goes on after the planned step, or EMPTY
    ("newest", "i8"),  # the last of those that run, in order of admission
], align=True)


class Engines(NamedTuple):
    """The state."""

    engine: Records  # of ENGINE
    next_s: Floats  # tournament tree of when the planned steps end
    phases: Ints  # (engines, block_size) decoding requests by length modulo the block size
    finishes: Ints  # (engines, max_num_seqs) binary heap of finishes of decoding requests
    prefilled: Ints  # (engines, max_num_seqs) requests whose prefill ends in the planned step


def make_engines(engines: int, settings: EngineSettings) -> Engines:
    """Idle engines."""
    engine = np.recarray(engines, ENGINE)
    engine[...] = np.zeros((), ENGINE)
    engine.free_blocks, engine.partial, engine.newest = settings.num_blocks, EMPTY, EMPTY
    seats = np.zeros((2, engines, settings.max_num_seqs), np.int64)
    phases = np.zeros((engines, settings.block_size), np.int64)
    return Engines(engine, tournament(engines, np.inf), phases, seats[0], seats[1])


def make_requests(prompt_tokens: Ints, output_tokens: Ints, work_s: Floats) -> Records:
    """Requests of which nothing has been done, of REQUEST."""
    requests = np.recarray(len(prompt_tokens), REQUEST)
    requests[...] = np.zeros((), REQUEST)
    requests.prompt_tokens, requests.output_tokens, requests.work_s = prompt_tokens, output_tokens, work_s
    requests.first_scheduled_s = requests.first_token_s = requests.finished_s = np.nan
    return requests


def step_costs(step_time: StepTime) -> Costs:
    return Costs(step_time.base_s, step_time.prefill_token_s, step_time.decode_seq_s, step_time.kv_token_s)


def engine_limits(settings: EngineSettings) -> Limits:
    return Limits(settings.max_num_seqs, settings.max_num_batched_tokens, settings.block_size,
                  settings.num_blocks, settings.enable_prefix_caching)


# --- Time and blocks of steps that only decode --------------------------------------------------------------


@compiled
def _decode_s(me: Records, costs: Costs, steps: int) -> float:
    """Seconds of so many steps that only decode."""
    reads_s = costs.kv_token_s * me.kv_tokens
    first = costs.base_s + costs.decode_seq_s * me.decoding + reads_s
    return steps * first + costs.kv_token_s * me.decoding * (steps * (steps - 1) / 2)


@compiled
def _steps_until(me: Records, costs: Costs, elapsed_s: float, most: int) -> int:
    """The least number of decode steps, from 1 to `most`, that takes at least `elapsed_s`."""
    growth = costs.kv_token_s * me.decoding / 2
    linear = _decode_s(me, costs, 1) - growth
    if elapsed_s <= 0:
        return 1
    if elapsed_s == math.inf:
        return most
    root = 2 * elapsed_s / (linear + math.sqrt(linear * linear + 4 * growth * elapsed_s))
    if root >= most:
        return most
    steps = max(1, math.ceil(root))
    while steps > 1 and _decode_s(me, costs, steps - 1) >= elapsed_s:
        steps -= 1
    while steps < most and _decode_s(me, costs, steps) < elapsed_s:
        steps += 1
    return steps


@compiled
def _new_blocks(s: Engines, limits: Limits, e: int, steps: int) -> int:
    """KV blocks that the decoding requests need for so many more steps."""
    me = s.engine[e]
    size = limits.block_size
    blocks = steps // size * me.decoding
    for step in range(1, steps % size + 1):
        blocks += s.phases[e, (1 - me.decoded - step) % size]
    return blocks


@compiled
def _next_blocks(s: Engines, limits: Limits, e: int) -> int:
    """`_new_blocks` for one step."""
    me = s.engine[e]
    return s.phases[e, -me.decoded % limits.block_size]


@compiled
def _affordable_steps(s: Engines, limits: Limits, e: int, most: int) -> int:
    """How many of `most` decode steps the free blocks last for."""
    me = s.engine[e]
    free = me.free_blocks
    if me.decoding * _blocks(limits, most) <= free or _new_blocks(s, limits, e, most) <= free:
        return most  # seldom closer than the first and coarser sum
    cycles = free // me.decoding
    free -= cycles * me.decoding
    steps = cycles * limits.block_size
    while True:
        free -= s.phases[e, (-me.decoded - steps) % limits.block_size]
        if free < 0:
            return steps
        steps += 1


# --- Finishes: a binary heap of packed integers -------------------------------------------------------------


@compiled
def _push(heap: Ints, size: int, item: int) -> None:
    while size > 0 and heap[(size - 1) // 2] > item:
        heap[size] = heap[(size - 1) // 2]
        size = (size - 1) // 2
    heap[size] = item


@compiled
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


@compiled
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


@compiled
def _blocks(limits: Limits, tokens: int) -> int:
    return (tokens + limits.block_size - 1) // limits.block_size


@compiled
def _leave(me: Records, r: Records, i: int) -> None:
    """Take a request out of the chain of those that run."""
    me.running -= 1
    if r[i].before != EMPTY:
        r[r[i].before].behind = r[i].behind
    if r[i].behind != EMPTY:
        r[r[i].behind].before = r[i].before
    else:
        me.newest = r[i].before


@compiled
def _take_back(me: Records, limits: Limits, tokens: int) -> None:
    """Free a request's blocks: full ones to the end of vLLM's free queue, a part-filled one to its front."""
    me.free_blocks += _blocks(limits, tokens)
    me.given_blocks -= _blocks(limits, tokens) - tokens // limits.block_size


@compiled
def _stop_decoding(s: Engines, limits: Limits, r: Records, e: int, i: int) -> None:
    """Free the KV blocks of a decoding request; its place in `finishes` is the caller's."""
    me = s.engine[e]
    tokens = r[i].length + me.decoded
    me.decoding -= 1
    me.kv_tokens -= tokens
    s.phases[e, r[i].length % limits.block_size] -= 1
    _take_back(me, limits, tokens)


@compiled
def _give(me: Records, blocks: int) -> None:
    me.free_blocks -= blocks
    me.given_blocks += blocks
    me.most_given_blocks = max(me.most_given_blocks, me.given_blocks)


@compiled
def _preempt_newest(s: Engines, q: Queue, order: Order, limits: Limits, r: Records, e: int) -> None:
    """Its full blocks are the last in the free queue, the first of them very last; found until given out."""
    me = s.engine[e]
    i = me.newest
    tokens = r[i].length if i == me.partial else r[i].length + me.decoded
    _leave(me, r, i)
    if i == me.partial:
        me.partial = EMPTY
        _take_back(me, limits, tokens)
    else:
        _remove(s.finishes[e], me.decoding, i)
        _stop_decoding(s, limits, r, e, i)
        r[i].made = tokens - r[i].prompt_tokens + 1
    r[i].kept_until = me.given_blocks + me.free_blocks
    r[i].kept_blocks = tokens // limits.block_size if limits.enable_prefix_caching else 0
    me.preemptions += 1
    preempt(q, order, e, i)


@compiled
def _found_blocks(s: Engines, limits: Limits, r: Records, e: int, i: int, given: int) -> int:
    """Blocks of a preempted request that the prefix cache still has; one token at least is computed.

    `given` are blocks of this step that `given_blocks` does not count yet.
    """
    me = s.engine[e]
    overwritten = max(me.most_given_blocks, me.given_blocks + given)
    kept = min(r[i].kept_blocks, r[i].kept_until - overwritten)
    return max(0, min(kept, (r[i].prompt_tokens + r[i].made - 1) // limits.block_size))


@compiled
def _chunk(me: Records, limits: Limits, r: Records) -> int:
    """Tokens that the partly prefilled request prefills in the next step."""
    i = me.partial
    if i == EMPTY:
        return 0
    budget = limits.max_num_batched_tokens - me.decoding
    return min(r[i].prompt_tokens + r[i].made - r[i].length, budget)


@compiled
def _needed_blocks(s: Engines, limits: Limits, r: Records, e: int) -> int:
    """KV blocks that the running requests need for the next step."""
    me = s.engine[e]
    blocks = _next_blocks(s, limits, e)
    if me.partial != EMPTY:
        held = r[me.partial].length
        blocks += _blocks(limits, held + _chunk(me, limits, r)) - _blocks(limits, held)
    return blocks


@compiled
def plan(s: Engines, q: Queue, order: Order, costs: Costs, limits: Limits, r: Records, e: int) -> None:
    """Schedule the next step of engine `e`, or as many as only decode; sets when they end."""
    me = s.engine[e]
    now = me.now_s
    take_scores(q, order, e, now)
    may_admit = True
    while _needed_blocks(s, limits, r, e) > me.free_blocks:
        _preempt_newest(s, q, order, limits, r, e)
        may_admit = me.running == 0
    prefill_tokens = _chunk(me, limits, r)
    reads = me.kv_tokens
    decoding = me.decoding
    decode_blocks = _next_blocks(s, limits, e)  # given when the step is over
    i = me.partial
    if i != EMPTY:
        reads += r[i].length
        _give(me, _needed_blocks(s, limits, r, e) - decode_blocks)
        r[i].length += prefill_tokens
        decoding += _one_newest_token(r, i, prefill_tokens)
        if r[i].length == r[i].prompt_tokens + r[i].made:
            _note_prefilled(s, e, i)
            me.partial = EMPTY
    budget = limits.max_num_batched_tokens - me.decoding - prefill_tokens
    blocked = False
    while may_admit and budget > 0 and q.engine[e].num_waiting > 0 and me.running < limits.max_num_seqs:
        i = head(q, order, e, now, me.steps + 1)
        tokens = r[i].prompt_tokens + r[i].made
        if _blocks(limits, tokens) > me.free_blocks - decode_blocks:
            blocked = True
            break
        admit(q, order, e, i)
        _join(me, r, i, now)
        found = _found_blocks(s, limits, r, e, i, decode_blocks)
        chunk = min(tokens - found * limits.block_size, budget)
        r[i].length = found * limits.block_size + chunk
        me.given_blocks -= found
        _give(me, _blocks(limits, r[i].length))
        reads += found * limits.block_size
        budget -= chunk
        prefill_tokens += chunk
        decoding += _one_newest_token(r, i, chunk)
        if r[i].length == tokens:
            _note_prefilled(s, e, i)
        else:
            me.partial = i
    hand_over(q, order, e, now)
    me.asked_steps = 0
    me.planned_steps, me.planned_s, me.open_plan = 1, math.inf, 0
    if me.running == 0:
        me.planned_steps = 0
    elif prefill_tokens > 0:
        prefill_tokens -= decoding - me.decoding
        me.planned_s = (costs.base_s + costs.prefill_token_s * prefill_tokens
                        + costs.decode_seq_s * decoding + costs.kv_token_s * reads)
    else:
        steps = (s.finishes[e, 0] >> _REQUEST_BITS) - me.decoded
        if not may_admit or (blocked and order.guard == IDLE_QUANTUM):  # its clock is the steps
            steps = 1
        elif blocked:
            steps = _steps_until(me, costs, next_change_s(q, order, e, now) - now, steps)
        me.planned_steps = _affordable_steps(s, limits, e, steps)
        me.planned_s = _decode_s(me, costs, me.planned_steps)
        me.open_plan = me.running < limits.max_num_seqs


@compiled
def _one_newest_token(r: Records, i: int, chunk: int) -> int:
    """1 if all that a preempted request computes again is its newest token, which counts as decoding."""
    return 1 if chunk == 1 and r[i].made > 0 and r[i].length == r[i].prompt_tokens + r[i].made else 0


@compiled
def _note_prefilled(s: Engines, e: int, i: int) -> None:
    me = s.engine[e]
    s.prefilled[e, me.num_prefilled] = i
    me.num_prefilled += 1


@compiled
def _join(me: Records, r: Records, i: int, now: float) -> None:
    """Put a request at the end of the chain of those that run."""
    if math.isnan(r[i].first_scheduled_s):
        r[i].first_scheduled_s = now
    r[i].before, r[i].behind = me.newest, EMPTY
    if me.newest != EMPTY:
        r[me.newest].behind = i
    me.newest = i
    me.running += 1


@compiled
def steps_begun(me: Records, costs: Costs, at_s: float) -> int:
    """How many of the planned steps have begun by a time."""
    if me.planned_steps <= 1:
        return me.planned_steps
    return _steps_until(me, costs, at_s - me.now_s, me.planned_steps)


@compiled
def score_until(s: Engines, q: Queue, order: Order, costs: Costs, e: int, until_s: float) -> None:
    """Between those of the planned steps that have begun by a time, the ranker takes and gives."""
    if not order.uses_ranker:
        return
    me = s.engine[e]
    begun = steps_begun(me, costs, until_s)
    while True:
        step = me.asked_steps + 1
        if not wants_scores(q, order, e):
            if q.engine[e].num_in_flight == 0:
                break
            due = q.in_flight_due_s[e, 0] - me.now_s
            step = max(step, _steps_until(me, costs, due, me.planned_steps))
        if step >= begun:
            break
        time = me.now_s + _decode_s(me, costs, step)
        take_scores(q, order, e, time)
        hand_over(q, order, e, time)
        me.asked_steps = step
    me.asked_steps = max(me.asked_steps, begun - 1)


@compiled
def seen_s(me: Records, costs: Costs, at_s: float) -> float:
    """When the step ends that is being taken at a time; that time itself at an idle engine."""
    if me.planned_steps == 0:
        return at_s
    if me.planned_steps == 1:
        return me.now_s + me.planned_s
    return me.now_s + _decode_s(me, costs, steps_begun(me, costs, at_s))


@compiled
def cut_plan(me: Records, costs: Costs, at_s: float) -> None:
    """Someone arrived: the planned steps end with the one that is being taken."""
    steps = steps_begun(me, costs, at_s)
    if steps < me.planned_steps:
        me.planned_steps = steps
        me.planned_s = _decode_s(me, costs, steps)


@compiled
def commit(s: Engines, q: Queue, order: Order, costs: Costs, limits: Limits, r: Records, e: int) -> None:
    """The planned steps are over: tokens come out, requests finish."""
    me = s.engine[e]
    steps = me.planned_steps
    if steps == 0:
        return
    score_until(s, q, order, costs, e, math.inf)
    me.steps += steps
    _give(me, _next_blocks(s, limits, e) if steps == 1 else _new_blocks(s, limits, e, steps))
    me.decoded += steps
    me.kv_tokens += steps * me.decoding
    now = me.now_s + me.planned_s
    me.now_s = now
    while me.decoding > 0 and s.finishes[e, 0] >> _REQUEST_BITS == me.decoded:
        i = s.finishes[e, 0] & ((1 << _REQUEST_BITS) - 1)
        size = me.decoding - 1
        _sink(s.finishes[e], size, 0, s.finishes[e, size])
        _stop_decoding(s, limits, r, e, i)
        _end(s, q, order, r, e, i, now)
    for k in range(me.num_prefilled):
        i = s.prefilled[e, k]
        if math.isnan(r[i].first_token_s):
            r[i].first_token_s = now
        left = r[i].output_tokens - r[i].made - 1
        if left == 0:
            _take_back(me, limits, r[i].length)
            _end(s, q, order, r, e, i, now)
            continue
        me.kv_tokens += r[i].length
        r[i].length -= me.decoded
        s.phases[e, r[i].length % limits.block_size] += 1
        _push(s.finishes[e], me.decoding, ((me.decoded + left) << _REQUEST_BITS) | i)
        me.decoding += 1
    me.num_prefilled = 0


@compiled
def _end(s: Engines, q: Queue, order: Order, r: Records, e: int, i: int, now: float) -> None:
    me = s.engine[e]
    _leave(me, r, i)
    me.work_s -= r[i].work_s
    r[i].finished_s = now
    finish(q, order, e, i, r[i].output_tokens)
