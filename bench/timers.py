"""How a prepared call is timed: p20, p50, p80 in microseconds; GPU time by events, except in `host_time`."""

import time
from collections.abc import Callable

import torch
from triton.testing import do_bench

from pars_fast.bench_results import Times
from pars_fast.bench_table import quantiles_us

Call = Callable[[], object]
Timer = Callable[[Call], Times]
WARM_UP, ROUNDS = 25, 100


def gpu_time(call: Call) -> Times:
    """Triton's `do_bench`, which flushes L2 before each call."""
    p20, p50, p80 = do_bench(call, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
    return p20 * 1e3, p50 * 1e3, p80 * 1e3


def gpu_time_warm(call: Call) -> Times:
    """Calls back to back: L2 keeps what fits. One that launches slower than it runs shows its launches."""
    return event_times(lambda: None, call)


def host_time(call: Call) -> Times:
    """The host's clock, from an idle GPU to a returned call, which has to wait for its own result."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return quantiles_us(times, ns_per_unit=1)


def event_times(before: Call, call: Call) -> Times:
    """GPU time of `call` alone; `before` runs untimed ahead of each."""
    for _ in range(WARM_UP):
        before()
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUNDS)
    ]
    for start, end in events:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return quantiles_us([start.elapsed_time(end) for start, end in events], ns_per_unit=1e6)
