"""The waiting queue that replaces vLLM's: same interface, ordered by `HostIndex`.

Implements all of `RequestQueue` (vllm/v1/core/sched/request_queue.py, 0.32) and `__getitem__`, which
vLLM's own tests use. Lives in EngineCore, on the scheduling thread.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

from pars_fast.host_index import MAX_EXPECTED_TOKENS, Entry, HostIndex


class RankedRequestQueue(RequestQueue):
    """Waiting requests in ranked order.

    `clock` gives monotonic seconds; a simulation has its own.

    Attributes:
        index: the order itself.
        entries: by request id, every request that was added and has not been forgotten, waiting or running.
        arrivals: new entries without a key, oldest first, for whoever scores them to take.
        forgotten: entries forgotten since somebody emptied the list, for whoever learns from how they ended.
        finished: seqs of scored requests that finished or were aborted, for a device with its own order.
        timed: whether to add the time spent in `peek_request` and `pop_request` to `spent_ns`; reading the
            clock takes as long as either.
    """

    def __init__(
        self, index: HostIndex, *, trust_caller: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.index = index
        self._clock = clock
        self._trust_caller = trust_caller
        self.entries: dict[str, Entry] = {}
        self.arrivals: deque[Entry] = deque()
        self.forgotten: list[Entry] = []
        self.finished: list[int] = []
        self.timed = False
        self.spent_ns = 0
        self._step_s = 0.0
        self._next_seq = 0

    def begin_step(self) -> None:
        """A scheduling step begins, and with it what the guard takes for the present."""
        self._step_s = self._clock()
        self.index.begin_step(self._step_s)

    def add_request(self, request: Request) -> None:
        """Put in a new request, or one that comes back (a streaming session's next turn)."""
        request_id = request.request_id
        if request_id in self.entries:
            if self.entries[request_id].payload is request:
                self.prepend_request(request)
                return
            self.finish(request_id)  # an id that is used again
        entry = Entry(self._next_seq, request.priority, request, arrival_s=self._clock())
        self._next_seq += 1
        if self._trust_caller and (estimate := _callers_estimate(request)) is not None:
            self.index.set_expected_tokens(entry, estimate)
        self.entries[request_id] = entry
        self.index.add(entry)
        if entry.key is None:
            self.arrivals.append(entry)

    def pop_request(self) -> Request:
        if self.timed:
            return self._timed(self._pop)
        return self._pop()

    def peek_request(self) -> Request:
        entry = self.index.peeked
        if entry is not None:
            return entry.payload
        if self.timed:
            return self._timed(self._peek)
        return self.index.head().payload

    def prepend_request(self, request: Request) -> None:
        """Take back a request that was popped: skipped in this step, or preempted while running."""
        entry = self.entries.get(request.request_id)
        if entry is None:  # never waited here, so it comes last among its equals
            self.add_request(request)
            return
        entry.lane = 1
        if request.status == RequestStatus.PREEMPTED:
            if self.index.policy.preempts:  # then it has a place among the others, by what remains
                if entry.key is not None:
                    entry.key = self.index.key_now(entry)
            else:
                entry.lane = 0
        self.index.put_back(entry)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Raises: ValueError: if the request does not wait here."""
        entry = self.entries.get(request.request_id)
        if entry is None or not entry.waiting:
            raise ValueError(f"{request.request_id} is not in the queue")
        self.index.remove(entry)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Forget those of `requests` that wait here: vLLM asks it when they end. The others are not ours."""
        for request in requests:
            entry = self.entries.get(request.request_id)
            if entry is not None and entry.waiting:
                self.index.remove(entry)
                self.finish(request.request_id)

    def set_expected_tokens(self, entry: Entry, expected_tokens: float) -> None:
        """Give a request its score, in expected output tokens."""
        self.index.set_expected_tokens(entry, expected_tokens)

    def set_device_order(self, seqs: Sequence[int]) -> None:
        """Give the index a new hint; see `HostIndex.set_device_order`."""
        self.index.set_device_order(seqs)

    def set_ranking(self, active: bool) -> None:
        """Ranked order, or arrival order."""
        self.index.ranking = active

    def finish(self, request_id: str) -> Entry | None:
        """Forget a finished or aborted request; its charge is corrected to the tokens it really made."""
        entry = self.entries.pop(request_id, None)
        if entry is not None:
            if entry.charged_tokens is not None:
                self.index.finish(entry, entry.payload.num_output_tokens)
            if entry.expected_tokens is not None:
                self.finished.append(entry.seq)
            self.forgotten.append(entry)
        return entry

    def __bool__(self) -> bool:
        return self.index.size > 0

    def __len__(self) -> int:
        return self.index.size

    def __iter__(self) -> Iterator[Request]:
        return (entry.payload for entry in self.index)

    def __getitem__(self, position: int) -> Request:
        return list(self)[position]

    def _peek(self) -> Request:
        return self.index.head().payload

    def _pop(self) -> Request:
        entry = self.index.pop()
        if not entry.payload.num_preemptions:  # else it keeps the moment of its first admission
            entry.admitted_s = self._step_s
        return entry.payload

    def _timed(self, operation: Callable[[], Request]) -> Request:
        started = time.perf_counter_ns()
        request = operation()
        self.spent_ns += time.perf_counter_ns() - started
        return request


def _callers_estimate(request: Request) -> float | None:
    """`vllm_xargs: {"pars_score": tokens}` of a request, None if absent or no positive number."""
    extra = request.sampling_params.extra_args if request.sampling_params is not None else None
    value = extra.get("pars_score") if extra else None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(min(value, MAX_EXPECTED_TOKENS))
    return None
