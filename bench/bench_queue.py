"""Operations of the waiting queue alone: `HostIndex` with all requests scored, against stock vLLM's deque.

`device_order` is the same index, going by the order that a GPU has computed and sent. To take it over is in
the time of the pops of a step, to compute it is not: where it falls under `pars_fast`, a GPU's order pays.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pars_fast.host_index import DEVICE_ORDER_MIN_WAITING, HostIndex
from pars_fast.policies import POLICIES
from pars_fast.priority_class import Entry
from pars_fast.slot_table import K_ORDER

BATCH = 16  # operations a round, since one takes hardly longer than reading the clock
ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Queue:
    """What all queues can do; `make` gives the item that arrives as number `seq`, `begin_step` comes before
    the pops of a step, and before that, untimed, `prepare_step`."""

    make: Callable[[int], Any]
    begin_step: Callable[[], None]
    add: Callable[[Any], None]
    pop: Callable[[], Any]
    abort: Callable[[Any], None]
    size: Callable[[], int]
    prepare_step: Callable[[], None] = lambda: None


def host_index(device_order_min_waiting: int = DEVICE_ORDER_MIN_WAITING) -> tuple[Queue, HostIndex]:
    guard = POLICIES["pars_fast"].default_guard
    index = HostIndex(POLICIES["pars"](), guard, device_order_min_waiting=device_order_min_waiting)
    index.room = BATCH
    steps = itertools.count()
    rng = random.Random(0)

    def make(seq: int) -> Entry:
        entry = Entry(seq, 0, None)
        index.set_expected_tokens(entry, rng.lognormvariate(5.0, 1.0))
        return entry

    def begin_step() -> None:
        index.begin_step(float(next(steps)))

    return Queue(make, begin_step, index.add, index.pop, index.remove, index.__len__), index


def device_order() -> Queue:
    """Its `add` and `abort` also keep what stands in for the device, and are not to be timed."""
    module = pytest.importorskip("sortedcontainers", reason="pip install 'pars-fast[bench]'")
    queue, index = host_index(device_order_min_waiting=1)
    device = module.SortedKeyList(key=lambda entry: (entry.expected_tokens, entry.seq))
    popped: list[Entry] = []
    first: list[int] = []

    def add(entry: Entry) -> None:
        queue.add(entry)
        device.add(entry)

    def abort(entry: Entry) -> None:
        queue.abort(entry)
        device.remove(entry)

    def pop() -> Entry:
        popped.append(queue.pop())
        return popped[-1]

    def prepare_step() -> None:
        for entry in popped:
            device.remove(entry)
        popped.clear()
        first[:] = [entry.seq for entry in device[:K_ORDER]]

    def begin_step() -> None:
        index.set_device_order(first)
        queue.begin_step()

    return Queue(queue.make, begin_step, add, pop, abort, queue.size, prepare_step)


def stock_queue() -> Queue:
    module = pytest.importorskip("vllm.v1.core.sched.request_queue", reason="the stock queue is vLLM's")
    queue = module.FCFSRequestQueue()

    def abort(item: Entry) -> None:
        queue.remove_requests([item])  # how Scheduler.finish_requests takes a waiting request out

    def make(seq: int) -> Entry:
        return Entry(seq, 0, None)

    return Queue(make, lambda: None, queue.add_request, queue.pop_request, abort, queue.__len__)


QUEUES = {"stock": stock_queue, "pars_fast": lambda: host_index()[0], "device_order": device_order}


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
        self.queue.prepare_step()

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


@pytest.mark.parametrize(
    ("operation", "provider"),
    [(operation, provider) for operation in ("add", "abort") for provider in ("stock", "pars_fast")]
    + [("pop", provider) for provider in QUEUES],
)
@pytest.mark.parametrize("waiting", [100, 1_000, 10_000, 100_000])
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
