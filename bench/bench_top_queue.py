"""A step's worth of queue work: 16 keyed requests arrive, and the 16 that run next leave."""

import random

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.top_queues import QUEUES, TopQueue

COUNT = 16
ROUNDS = 200
BYTES = 2 * COUNT * 16  # a key and a seq of each that comes and each that leaves, 8 bytes both


def fill(queue: TopQueue, waiting: int, rng: random.Random) -> None:
    queue.add([rng.lognormvariate(5.0, 1.0) for _ in range(waiting)])


@pytest.mark.parametrize("provider", list(QUEUES))
@pytest.mark.parametrize("waiting", [100, 1_000, 10_000, 100_000])
def bench_top_queue(benchmark: BenchmarkFixture, waiting: int, provider: str) -> None:
    rng = random.Random(0)
    queue = QUEUES[provider](waiting + COUNT)
    fill(queue, waiting, rng)

    def arrivals() -> tuple[tuple[list[float]], dict[str, object]]:
        return ([rng.lognormvariate(5.0, 1.0) for _ in range(COUNT)],), {}

    def step(keys: list[float]) -> None:
        queue.add(keys)
        queue.take(COUNT)

    benchmark.pedantic(step, setup=arrivals, rounds=ROUNDS)
    benchmark.extra_info |= {
        "op": "queue_top16",
        "provider": provider,
        "baseline": "stock",
        "shape": {"waiting": waiting},
        "bytes_moved": BYTES,
    }
