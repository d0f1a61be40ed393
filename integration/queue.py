"""The waiting queue that replaces vLLM's: same interface, ordered by `HostIndex`.

Implements all of `RequestQueue` (vllm/v1/core/sched/request_queue.py, 0.29 to 0.32) and `__getitem__`, which
vLLM's own tests use. Lives in EngineCore, on the scheduling thread.

The order may fail, the queue may not: whatever a policy, a guard or the index raises, the queue goes on in
plain arrival order with every request that waits.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

from pars_fast.arrival_index import ArrivalIndex
from pars_fast.host_index import MAX_EXPECTED_TOKENS, HostIndex
from pars_fast.priority_class import Entry


class RankedRequestQueue(RequestQueue):
    """Waiting requests in ranked order.

    `use_priorities`: a request's `priority` comes first, as under vLLM's policy of that name; else it means
    nothing, as under vLLM's default policy. `clock` gives monotonic seconds; a simulation has its own.
    `on_failure` is told once why the order failed.

    Attributes:
        index: the order itself.
        entries: by request id, every request that was added and has not been forgotten, waiting or running.
        arrivals: new entries without a key, oldest first, for whoever scores them to take.
        forgotten: entries forgotten since somebody emptied the list, for whoever learns from how they ended.
        finished: seqs of scored requests that finished or were aborted, for a device with its own order.
        step_s: when the scheduling step began, on `clock`.
        timed: whether to add the time spent on finding out who is next to `spent_ns`.
    """

    def __init__(
        self,
        index: HostIndex,
        *,
        use_priorities: bool = True,
        trust_caller: bool = False,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self.index: HostIndex | ArrivalIndex = index
        self._clock = clock
        self._use_priorities, self._trust_caller = use_priorities, trust_caller
        self._on_failure = on_failure
        self.entries: dict[str, Entry] = {}
        self.arrivals: deque[Entry] = deque()
        self.forgotten: list[Entry] = []
        self.finished: list[int] = []
        self._keep = True
        self.timed = False
        self.spent_ns = 0
        self.step_s = 0.0
        self._next_seq = 0

    def begin_step(self, time_s: float, room: int, *, plan_anew: bool = False) -> None:
        """A scheduling step begins, at what the guard takes for the present.

        `room`: how many requests it can admit at most. `plan_anew` is as in `HostIndex.begin_step`.
        """
        self.step_s = time_s
        self.index.room = room
        try:
            self.index.begin_step(time_s, plan_anew=plan_anew)
        except Exception as error:
            self._fall_back(error)

    def plan_ahead(self) -> None:
        """The step is over; see `HostIndex.plan_ahead`."""
        try:
            self.index.plan_ahead()
        except Exception as error:
            self._fall_back(error)

    def add_request(self, request: Request) -> None:
        """Put in a new request, or one that comes back (a streaming session's next turn)."""
        request_id = request.request_id
        if request_id in self.entries:
            entry = self.entries[request_id]
            if entry.payload is request:
                if entry.waiting:  # preempted, and then its turn ended by output that was on its way
                    self.remove_request(request)
                self.prepend_request(request)
                return
            self.finish(request_id)  # an id that is used again
        entry = self._enter(request)
        try:
            if self._trust_caller and (estimate := _callers_estimate(request)) is not None:
                self.index.set_expected_tokens(entry, estimate)
            self.index.add(entry)
        except Exception as error:
            self._put_in_spite_of(error, entry)
        if entry.key is None:
            self.arrivals.append(entry)

    def pop_request(self) -> Request:
        index = self.index
        planned = index.planned
        if not planned or index.sharing is not None:
            return self._pop()
        entry = planned.pop()
        entry.waiting = False
        if entry.lane:
            entry.admitted_s = self.step_s
        return entry.payload

    def peek_request(self) -> Request:
        planned = self.index.planned
        return planned[-1].payload if planned else self._peek()

    def prepend_request(self, request: Request) -> None:
        """Take back a request that was popped: skipped in this step, or preempted while running."""
        entry = self.entries.get(request.request_id)
        if entry is None:
            if request.status != RequestStatus.PREEMPTED:  # it comes last among its equals
                self.add_request(request)
                return
            entry = self._enter(request)  # until it ran, vLLM kept it elsewhere: for a grammar or remote KV
        entry.lane = 1
        try:
            if request.status == RequestStatus.PREEMPTED:
                if isinstance(self.index, HostIndex) and self.index.policy.preempts:
                    # It has a place among the others, by what remains.
                    self.index.set_key_now(entry)
                else:
                    entry.lane = 0
            self.index.put_back(entry)
        except Exception as error:
            self._put_in_spite_of(error, entry)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Raises: ValueError: if the request does not wait here."""
        entry = self.entries.get(request.request_id)
        if entry is None or not entry.waiting:
            raise ValueError(f"{request.request_id} is not in the queue")
        try:
            self.index.remove(entry)
        except Exception as error:
            entry.waiting = False
            self._fall_back(error)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Forget those of `requests` that wait here: vLLM asks it when they end. The others are not ours."""
        for request in requests:
            entry = self.entries.get(request.request_id)
            if entry is not None and entry.waiting:
                self.remove_request(request)
                self.finish(request.request_id)

    def set_expected_tokens(self, entry: Entry, expected_tokens: float) -> None:
        """Give a request its score, in expected output tokens."""
        try:
            self.index.set_expected_tokens(entry, expected_tokens)
        except Exception as error:
            self._fall_back(error)

    def set_device_order(self, seqs: Sequence[int]) -> None:
        """Give the index a new hint; see `HostIndex.set_device_order`."""
        self.index.set_device_order(seqs)

    def set_ranking(self, active: bool) -> None:
        """Ranked order, or arrival order."""
        try:
            self.index.ranking = active
        except Exception as error:
            self._fall_back(error)

    def order_by_arrival(self) -> None:
        """Go on with a plain index of all that waits, in arrival order, for good."""
        self.index = ArrivalIndex(entry for entry in self.entries.values() if entry.waiting)

    def stop_keeping(self) -> None:
        """Nobody scores or learns any more, and there is no device: keep nothing for them."""
        self.arrivals = deque(maxlen=0)
        self._keep = False

    @contextlib.contextmanager
    def looking_ahead(self) -> Iterator[Iterator[tuple[Entry, bool]]]:
        """`HostIndex.look_ahead`. Whatever is raised meanwhile goes on, and nobody has left the queue."""
        assert isinstance(self.index, HostIndex)
        try:
            with contextlib.closing(self.index.look_ahead()) as ahead:
                yield ahead
        except Exception as error:
            self._fall_back(error)
            raise

    def finish(self, request_id: str) -> Entry | None:
        """Forget a finished or aborted request; its charge is corrected to the tokens it really made."""
        entry = self.entries.pop(request_id, None)
        if entry is not None:
            if self.index.needs_endings:
                try:
                    self.index.finish(entry, entry.payload.num_output_tokens)
                except Exception as error:
                    self._fall_back(error)
            if self._keep:
                if entry.expected_tokens is not None:
                    self.finished.append(entry.seq)
                self.forgotten.append(entry)
        return entry

    def __bool__(self) -> bool:
        return bool(self.index.planned) or len(self.index) > 0  # asked twice for each that is admitted

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Request]:
        return (entry.payload for entry in self.index)

    def __getitem__(self, position: int) -> Request:
        return list(self)[position]

    def _enter(self, request: Request) -> Entry:
        """A new entry, which does not wait yet."""
        priority = request.priority if self._use_priorities else 0
        entry = Entry(self._next_seq, priority, request, arrival_s=self._clock())
        self._next_seq += 1
        self.entries[request.request_id] = entry
        return entry

    def _peek(self) -> Request:
        started = time.perf_counter_ns() if self.timed else 0
        try:
            entry = self.index.head()
        except Exception as error:
            if not len(self.index):
                raise
            self._fall_back(error)
            entry = self.index.head()
        if self.timed:
            self.spent_ns += time.perf_counter_ns() - started
        return entry.payload

    def _pop(self) -> Request:
        request = self._peek()
        try:
            self.index.pop()
        except Exception as error:  # vLLM has seen the request and given it memory: it is the one to pop
            self._fall_back(error)
            self.index.remove(self.entries[request.request_id])
        return request

    def _put_in_spite_of(self, error: Exception, entry: Entry) -> None:
        entry.waiting = False  # nobody knows how far it came
        self._fall_back(error)
        self.index.add(entry)

    def _fall_back(self, error: Exception) -> None:
        self.order_by_arrival()
        if self._on_failure is not None:
            self._on_failure(error)


def _callers_estimate(request: Request) -> float | None:
    """`vllm_xargs: {"pars_score": tokens}` of a request, None if absent or no positive number."""
    extra = request.sampling_params.extra_args if request.sampling_params is not None else None
    value = extra.get("pars_score") if extra else None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(min(value, MAX_EXPECTED_TOKENS))
    return None
