"""Running requests that yield to waiting ones: the hook of policies with `preempts`.

Called before vLLM's `schedule()`, on the scheduling thread. It names the running requests of the highest keys
while waiting requests of lower keys have no seat or no room in the KV cache, and preempts them by vLLM's own
`_preempt_request`: their blocks are freed and their tokens computed again later, less what the prefix cache
still holds. `schedule()` then admits as ever. Running requests are also sorted by key, so that vLLM, when its
blocks run out, preempts the highest as well. Source: vllm/v1/core/sched/scheduler.py (0.31, 0.32).
"""

import math
import time
from typing import Any

from vllm.v1.request import RequestStatus

from pars_fast.errors import SettingsError
from pars_fast.guards import IdleQuantum
from pars_fast.host_index import HostIndex
from pars_fast.integration.queue import RankedRequestQueue
from pars_fast.priority_class import Entry

# Not one that waits for a grammar or a KV load.
_ADMISSIBLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
_Rank = tuple[int, float, int]  # priority, key, seq


class Preemption:
    """What makes one scheduler's running requests yield.

    Raises: SettingsError: on a vLLM before 0.31, which counts seats otherwise.
    """

    def __init__(self, scheduler: Any, queue: RankedRequestQueue) -> None:
        if not hasattr(scheduler, "max_num_active_reqs"):
            raise SettingsError("this PARS_POLICY preempts running requests, which needs vLLM 0.31 or newer: "
                                "take a newer vLLM, or a policy that only orders those that wait")
        self._scheduler, self._queue = scheduler, queue
        self._keep_until: dict[int, int] = {}  # seq -> step, of running requests in their quantum

    def before_step(self) -> None:
        """Sort the running requests and preempt those that have to yield."""
        index, running = self._queue.index, self._scheduler.running
        if not (index.ranking and running):
            return
        ranked = self._rank_running()
        if len(index):
            for request in self._victims(ranked):
                self._preempt(request)

    def _rank_running(self) -> list[tuple[_Rank, Any]]:
        """The running requests that may yield, first to last; the scheduler's list is sorted likewise.

        Those that are still in their prompt stay behind the others, which make a token with a token.
        """
        entries, index = self._queue.entries, self._queue.index
        assert isinstance(index, HostIndex)  # the other one does not rank
        step = index.step
        ranks: dict[str, _Rank] = {}
        ranked, kept = [], {}
        for request in self._scheduler.running:
            entry = entries.get(request.request_id)
            if entry is None:
                continue
            rank = (entry.priority, index.key_now(entry), entry.seq)
            ranks[request.request_id] = rank
            if isinstance(index.guard, IdleQuantum):
                until = self._quantum(index.guard, entry, request, step)
                if step < until:
                    kept[entry.seq] = until
                    continue
            ranked.append((rank, request))
        self._keep_until = kept
        last = (0, 0.0, 0)
        self._scheduler.running.sort(key=lambda r: (r.is_prefill_chunk, ranks.get(r.request_id, last)))
        ranked.sort(key=lambda item: item[0])
        return ranked

    def _quantum(self, guard: IdleQuantum, entry: Entry, request: Any, step: int) -> int:
        """The step until which a running request may not be preempted; its steps of waiting count anew.

        A step of the quantum is one that makes a token: the engine that LTR was written for computed a whole
        prompt in one step, and a quantum of parts of a long prompt would end before any answer.
        """
        waited, entry.arrival_step = step - entry.arrival_step, step
        until = self._keep_until.get(entry.seq, 0)
        if waited >= guard.idle_steps or (step < until and request.is_prefill_chunk):
            return step + guard.quantum_steps
        return until

    def _victims(self, ranked: list[tuple[_Rank, Any]]) -> list[Any]:
        """Whom to preempt, so that the front of the queue has room; the queue is left as it was."""
        scheduler = self._scheduler
        seats = scheduler.max_num_active_reqs - len(scheduler.running)
        seats -= scheduler.num_waiting_for_streaming_input
        blocks = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        tokens = scheduler.max_num_scheduled_tokens  # what one step can begin
        victims: list[Any] = []
        with self._queue.looking_ahead() as ahead:
            for entry, promoted in ahead:
                request = entry.payload
                if request.status not in _ADMISSIBLE:
                    continue
                needed = self._blocks(request.num_tokens)
                yielding = self._yielding(ranked, _rank(entry, promoted), 1 - seats, needed - blocks)
                if yielding is None:
                    break
                victims += yielding
                seats += len(yielding) - 1
                blocks += sum(self._blocks(victim.num_computed_tokens) for victim in yielding) - needed
                tokens -= request.num_tokens
                if tokens <= 0:
                    break
        return victims

    def _yielding(
        self, ranked: list[tuple[_Rank, Any]], waiting: tuple[int, float], seats: int, blocks: int
    ) -> list[Any] | None:
        """Those at the end of `ranked`, taken from it, that leave so many seats and blocks; None if they
        would not do, or run ahead of the waiting request. Equal ones do not change places."""
        count = freed = 0
        while count < seats or freed < blocks:
            if count == len(ranked):
                return None
            rank, request = ranked[-1 - count]
            if rank[:2] <= waiting or not self._scheduler._request_blocks_can_be_freed(request):
                return None
            count += 1
            freed += self._blocks(request.num_computed_tokens)
        chosen = [request for _, request in ranked[len(ranked) - count :]]
        del ranked[len(ranked) - count :]
        return chosen

    def _preempt(self, request: Any) -> None:
        """As in `schedule()`; should it be resumed in the same step, its worker must see it as new."""
        scheduler = self._scheduler
        drop = scheduler.requires_kv_delivery
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=drop)
        scheduler.running.remove(request)  # last: if the other fails at once, the request runs on
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._scheduler.block_size)


def _rank(waiting: Entry, promoted: bool) -> tuple[int, float]:
    """Nobody yields to a request without a score, unless the guard put it first."""
    if promoted:
        return waiting.priority, -math.inf
    return waiting.priority, math.inf if waiting.key is None else waiting.key
