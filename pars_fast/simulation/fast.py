"""The fast simulator: one engine, 10^6 requests in seconds.

What a step is and takes is in `engines.py`, the order in `waiting_queue.py`, the loop over events in
`fleet.py`.
"""

import numpy as np
from numpy.typing import NDArray

from pars_fast.errors import ParsFastError
from pars_fast.guards import Guard, NoGuard
from pars_fast.simulation.columns import Served
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.fleet import fits, simulate_fleet
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.workload import Workload

_FILLS = 40  # how many times over the mix of a closed loop fills the seats


def simulate(
    workload: Workload,
    policy: str,
    guard: Guard | None,
    engine: EngineSettings,
    step_time: StepTime,
    *,
    ranker_delay_s: float = 0.0,
) -> Served:
    """Serve a workload on one engine; arguments and errors as `simulate_fleet`."""
    return simulate_fleet(workload, policy, guard, engine, step_time, ranker_delay_s=ranker_delay_s)


def capacity_tok_s(workload: Workload, engine: EngineSettings, step_time: StepTime) -> float:
    """Output tokens/s of a full engine in arrival order on this mix: what a load of 1 offers.

    All requests wait from the start, in random order, as many times over as fills the seats 40 times. Counted
    are the answers that end between the first and the last tenth, so that filling and draining do not enter.

    Raises: ParsFastError: if no request fits the engine.
    """
    closed, finished = closed_loop(workload, engine, step_time)
    start, end = np.quantile(finished, [0.1, 0.9])
    counted = closed.output_tokens[(finished > start) & (finished <= end)]
    return float(counted.sum() / (end - start))


def closed_loop(
    workload: Workload, engine: EngineSettings, step_time: StepTime
) -> tuple[Workload, NDArray[np.float64]]:
    """The mix, waiting from the start in random order, 40 times the seats, and when each finished, in s.

    Raises: ParsFastError: if no request fits the engine.
    """
    fitting = np.flatnonzero(fits(workload, engine))
    if not len(fitting):
        raise ParsFastError(f"{workload.name}: no request fits the engine")
    rng = np.random.default_rng((0, 3))
    rounds = -(-_FILLS * engine.max_num_seqs // len(fitting))
    drawn = np.concatenate([rng.permutation(fitting) for _ in range(rounds)])
    closed = Workload(workload.name, np.zeros(len(drawn)), workload.prompt_tokens[drawn],
                      workload.output_tokens[drawn], workload.expected_tokens[drawn])
    return closed, simulate(closed, "fcfs", NoGuard(), engine, step_time).finished_s
