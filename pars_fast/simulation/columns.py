"""What a simulation gives back, and the row made from it (`docs/design.md`: always the same columns)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pars_fast.latency_columns import latency_columns
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
    """The row of one run in tables and JSON."""
    return {
        **latency_columns(workload.arrival_s, served.first_token_s, served.finished_s,
                          workload.output_tokens),
        "refused": served.refused,
        "preemptions": served.preemptions,
        "recomputed_tokens": served.recomputed_tokens,
        "prefix_hit_tokens": served.prefix_hit_tokens,
        "steps": served.steps,
    }
