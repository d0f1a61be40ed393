"""What a simulation gives back, and the row made from it (`docs/design.md`: always the same columns)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pars_fast.demo.records import throughput_until
from pars_fast.simulation.workload import Workload


@dataclass(frozen=True, slots=True)
class Served:
    """What became of N requests; times are (N,) float64 seconds, NaN for a refused request.

    `refused` counts requests that no empty engine could hold: prompt and answer beyond the KV cache or the
    model's longest sequence. `preemptions` and `steps` are of all engines. `recomputed_tokens` were computed
    before, and lost by a preemption; `prefix_hit_tokens` were found in the prefix cache by a request that
    began or resumed; None where they were not counted.
    """

    first_scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finished_s: NDArray[np.float64]
    preemptions: int
    steps: int
    refused: int
    recomputed_tokens: int | None = None
    prefix_hit_tokens: int | None = None


def columns(workload: Workload, served: Served) -> dict[str, Any]:
    """The row of one run in tables and JSON; latencies over completed requests, in seconds.

    Throughput is up to the last arrival, the makespan beside it; a wait is the time to the first token, as in
    the demo.
    """
    done = np.isfinite(served.finished_s)
    arrival, tokens = workload.arrival_s[done], workload.output_tokens[done]
    first, finished = served.first_token_s[done], served.finished_s[done]
    end_to_end, ttft = finished - arrival, first - arrival
    longer = tokens > 1
    per_token_after_first = (finished - first)[longer] / (tokens[longer] - 1)
    last_arrival = float(workload.arrival_s[-1])
    return {
        "requests": len(workload),
        "completed": int(done.sum()),
        "refused": served.refused,
        **_summary("latency_per_token_s", end_to_end / tokens),
        **_summary("ttft_s", ttft),
        **_summary("tpot_s", per_token_after_first),
        **_summary("e2e_s", end_to_end),
        "max_wait_s": _rounded(ttft.max()) if len(ttft) else None,
        "throughput_tok_s": throughput_until(first, finished, tokens, last_arrival),
        "makespan_s": _rounded(finished.max()) if len(finished) else None,
        "preemptions": served.preemptions,
        "recomputed_tokens": served.recomputed_tokens,
        "prefix_hit_tokens": served.prefix_hit_tokens,
        "steps": served.steps,
    }


def _summary(name: str, values: NDArray[np.float64]) -> dict[str, float | None]:
    if not len(values):
        return {f"{statistic}_{name}": None for statistic in ("mean", "p50", "p90", "p99")}
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {f"mean_{name}": _rounded(float(values.mean())), f"p50_{name}": _rounded(p50),
            f"p90_{name}": _rounded(p90), f"p99_{name}": _rounded(p99)}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
