"""What it costs in serving to order one model's queue by the lengths of another.

Held-out prompts arrive at a trace's times with one model's real answer lengths, and the fast simulator serves
them in the order of each predictor of `pars_fast.transfer.across_models`. A cell is relative to the diagonal,
where the predictor has learnt from the model that is served.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pars_fast.guards import PassingLimit, guard_text
from pars_fast.simulation.serving_gain import ORDER, PROFILE
from pars_fast.simulation.step_time import load_profile
from pars_fast.simulation.sweep import Case, make_setup, run_case
from pars_fast.simulation.workload import Workload, from_lengths
from pars_fast.transfer import ModelTransfer

_MEASURES = ("mean_latency_per_token_s", "mean_e2e_s")


@dataclass(frozen=True, slots=True)
class TransferLatency:
    """Cells are over the diagonal of their column, rows what is learnt from, columns what is served;
    geometric means over the traces. `fcfs_*` has arrival order, one entry a column."""

    per_token: list[list[float]]
    e2e: list[list[float]]
    fcfs_per_token: list[float]
    fcfs_e2e: list[float]


def transfer_latency(
    transfer: ModelTransfer, traces: Sequence[Workload], *, load: float = 1.2, requests: int = 3000,
    seed: int = 0,
) -> TransferLatency:  # fmt: skip
    """Serve every model in the order of every predictor, and in order of arrival.

    Raises: DataError: if a trace has too few requests.
    """
    count = len(transfer.models)
    log_ratio = np.zeros((len(_MEASURES), count + 1, count))  # the last row is arrival order
    for trace in traces:
        for served in range(count):
            log_times = np.log(_served(transfer, served, trace, load, requests, seed))
            log_ratio[:, :, served] += (log_times - log_times[served]).T / len(traces)
    per_token, e2e = np.exp(log_ratio)
    return TransferLatency(
        per_token[:count].tolist(), e2e[:count].tolist(), per_token[count].tolist(), e2e[count].tolist()
    )


def _served(
    transfer: ModelTransfer, served: int, trace: Workload, load: float, requests: int, seed: int
) -> NDArray[np.float64]:
    """(models + 1, measures): seconds in the order of each model's predictor, then in that of arrival."""
    step_time, engine = load_profile(PROFILE)
    model = transfer.models[served]
    workload = from_lengths(transfer.held_out, model, requests, seed=seed, arrivals=trace)
    setup = make_setup({seed: workload}, engine, step_time)
    rows = []
    for scores in transfer.scores.T:
        expected = dict(
            zip((row.prompt for row in transfer.held_out.rows), np.exp(scores).tolist(), strict=True)
        )
        scored = from_lengths(
            transfer.held_out, model, requests, seed=seed, arrivals=trace,
            scorer=lambda prompts, of=expected: [of[prompt] for prompt in prompts],
        )  # fmt: skip
        case = Case(ORDER, guard_text(PassingLimit()), load, seed)
        rows.append(run_case(replace(setup, workloads={seed: scored}), case))
    rows.append(run_case(setup, Case("fcfs", "none", load, seed)))
    return np.array([[row[measure] for measure in _MEASURES] for row in rows])
