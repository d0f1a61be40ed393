"""The GPU's peaks, against which every row is held: a copy past L2, and cuBLAS in fp16."""

from collections.abc import Iterator

import torch

from bench.gpu_cases import Case
from bench.timers import Call
from pars_fast.bench_results import PEAK_COPY, PEAK_MATMUL

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192


def cases() -> Iterator[Case]:
    yield Case(PEAK_COPY, "torch", {"bytes": COPY_BYTES}, _copy, bytes_moved=2 * COPY_BYTES)
    yield Case(PEAK_MATMUL, "torch", {"size": MATMUL_SIZE}, _matmul, flops=2 * MATMUL_SIZE**3)


def _copy() -> Call:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matmul() -> Call:
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, dtype=torch.float16, device="cuda").unbind()
    return lambda: torch.mm(a, b)
