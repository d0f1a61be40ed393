"""The machine's peaks, against which every row is held: a copy past the caches, and a matmul in fp32 and,
where the CPU has it, in bf16."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pars_fast.bench_results import PEAK_COPY, PEAK_MATMUL
from pars_fast.bf16_products import native_bf16

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"] if native_bf16() else ["float32"])
def bench_matmul(benchmark: BenchmarkFixture, dtype: str) -> None:
    a, b = torch.rand(2, MATMUL_SIZE, MATMUL_SIZE, dtype=getattr(torch, dtype)).unbind()
    benchmark.extra_info |= {
        "op": PEAK_MATMUL,
        "provider": "torch",
        "shape": {"size": MATMUL_SIZE, "dtype": dtype},
        "flops": 2 * MATMUL_SIZE**3,
    }
    benchmark.pedantic(torch.mm, args=(a, b), rounds=ROUNDS, warmup_rounds=2)
