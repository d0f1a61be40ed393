"""Operations of the waiting queue alone: `HostIndex` with all requests scored, against stock vLLM's deque."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pars_fast.host_index import HostIndex
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry

BATCH = 16  # operations a round, since one takes hardly longer than reading the clock
ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Queue:
    """What both queues can do; `make` gives the item that arrives as number `seq`, `begin_step` comes before
    the pops of a step."""

    make: Callable[[int], Any]
    begin_step: Callable[[], None]
    add: Callable[[Any], None]
    pop: Callable[[], Any]
    abort: Callable[[Any], None]
    size: Callable[[], int]


def host_index() -> Queue:
    index = HostIndex(POLICIES["pars"](), POLICIES["pars_fast"].default_guard)
    index.room = BATCH
    steps = itertools.count()
    rng = random.Random(0)

    def make(seq: int) -> Entry:
        entry = Entry(seq, 0, None)
        index.set_expected_tokens(entry, rng.lognormvariate(5.0, 1.0))
        return entry

    def begin_step() -> None:
        index.begin_step(float(next(steps)))

    return Queue(make, begin_step, index.add, index.pop, index.remove, index.__len__)


def stock_queue() -> Queue:
    module = pytest.importorskip("vllm.v1.core.sched.request_queue", reason="the stock queue is vLLM's")
    queue = module.FCFSRequestQueue()

    def abort(item: Entry) -> None:
        queue.remove_requests([item])  # how Scheduler.finish_requests takes a waiting request out

    def make(seq: int) -> Entry:
        return Entry(seq, 0, None)

    return Queue(make, lambda: None, queue.add_request, queue.pop_request, abort, queue.__len__)


QUEUES = {"stock": stock_queue, "pars_fast": host_index}


class QueueWorkload:
    """A queue that holds `size` items before each timed batch: `add`, `pop` or `abort`."""

    def __init__(self, queue: Queue, size: int) -> None:
        self.queue, self.size = queue, size
        self.waiting: dict[Any, None] = {}  # a set that keeps its order, for the seed's sake
        self._random = random.Random(1)
        self._made = 0
        self._came: list[Any] = []
        self._left: list[Any] = []

    def prepare(self) -> None:
        """Back to `size` items, with a batch that may arrive and a batch that may be aborted at hand."""
        self.waiting |= dict.fromkeys(self._came)
        for item in self._left:
            del self.waiting[item]
        for item in self._sample(max(0, len(self.waiting) - self.size)):
            self.queue.abort(item)
            del self.waiting[item]
        for item in self._make(self.size - len(self.waiting)):
            self.queue.add(item)
            self.waiting[item] = None
        self._came, self._left = [], []
        self._arriving, self._leaving = self._make(BATCH), self._sample(BATCH)

    def add(self) -> None:
        for item in self._arriving:
            self.queue.add(item)
        self._came = self._arriving

    def pop(self) -> None:
        self.queue.begin_step()
        self._left = [self.queue.pop() for _ in range(BATCH)]

    def abort(self) -> None:
        for item in self._leaving:
            self.queue.abort(item)
        self._left = self._leaving

    def _make(self, count: int) -> list[Any]:
        items = [self.queue.make(self._made + i) for i in range(count)]
        self._made += len(items)
        return items

    def _sample(self, count: int) -> list[Any]:
        return self._random.sample(list(self.waiting), count)


@pytest.mark.parametrize("provider", list(QUEUES))
@pytest.mark.parametrize("waiting", [100, 1_000, 10_000])
@pytest.mark.parametrize("operation", ["add", "pop", "abort"])
def bench_queue(benchmark: BenchmarkFixture, operation: str, waiting: int, provider: str) -> None:
    workload = QueueWorkload(QUEUES[provider](), waiting)
    benchmark.pedantic(getattr(workload, operation), setup=workload.prepare, rounds=ROUNDS, warmup_rounds=10)
    benchmark.extra_info |= {
        "op": f"queue_{operation}",
        "provider": provider,
        "baseline": "stock",
        "operations": BATCH,
        "shape": {"waiting": waiting},
    }
