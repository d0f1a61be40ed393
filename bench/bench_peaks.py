"""The machine's peaks, against which every row is held: a copy past the caches, and an fp32 matmul."""

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pars_fast.bench_results import PEAK_COPY, PEAK_MATMUL

COPY_BYTES = 1 << 28
MATMUL_SIZE = 2048
ROUNDS = 15


def bench_copy(benchmark: BenchmarkFixture) -> None:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    benchmark.extra_info |= {
        "op": PEAK_COPY,
        "provider": "torch",
        "shape": {"bytes": COPY_BYTES},
        "bytes_moved": 2 * COPY_BYTES,  # read and written
    }
    benchmark.pedantic(target.copy_, args=(source,), rounds=ROUNDS, warmup_rounds=2)


def bench_matmul(benchmark: BenchmarkFixture) -> None:
    a, b = torch.rand(2, MATMUL_SIZE, MATMUL_SIZE).unbind()
    benchmark.extra_info |= {
        "op": PEAK_MATMUL,
        "provider": "torch",
        "shape": {"size": MATMUL_SIZE},
        "flops": 2 * MATMUL_SIZE**3,
    }
    benchmark.pedantic(torch.mm, args=(a, b), rounds=ROUNDS, warmup_rounds=2)
