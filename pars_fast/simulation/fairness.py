"""Applications under every order: when they finish, and how much later than under ideal fair sharing.

Served by the faithful simulator, with the policies that a live queue would have. The ideal is a fluid: an
engine's service rate, in KV tokens times steps a second, divided equally among the unfinished applications at
every moment (`FairShare`). It is not attainable: no request waits for its own earlier tokens there.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pars_fast.errors import DataError
from pars_fast.policies import POLICIES, Policy
from pars_fast.policies.applications import Application
from pars_fast.policies.demand import Demand, MlpDemand, fit_demand, token_time
from pars_fast.policies.fair_share import FairShare
from pars_fast.policies.justitia import Justitia
from pars_fast.simulation.applications import Half, make_applications, read_sources
from pars_fast.simulation.columns import Served
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.fast import closed_loop
from pars_fast.simulation.step_time import StepTime, load_profile
from pars_fast.simulation.workload import Workload, at_load, poisson, read_trace, with_noisy_scores
from pars_fast.worker_pool import worker_pool

PROFILE = "h100_llama_3_1_8b"
# Small, so that a few thousand requests are a queue; memory runs out before seats do, as Justitia has it.
ROOM: dict[str, Any] = {"max_num_seqs": 64, "kv_cache_tokens": 40_000}
TAU = 0.5
TRAINED_ON = 4000  # applications
_TRAINING_SEED = 1_000_000

EXACT = "justitia, true demand"
ORDERS = ("fcfs", "vtc", "justitia", EXACT, "pars_fast", "oracle")


@dataclass(frozen=True, slots=True)
class Applications:
    """A workload by application: (A,) arrays, ascending by arrival.

    Attributes:
        names: as in `Workload.app`.
        number: (N,) int64, the application of each request, an index into the others.
        arrival_s: of the first request.
        first_prompt_tokens: of it, too.
        demand: true cost of all requests, `token_time`.
    """

    names: NDArray[np.str_]
    number: NDArray[np.int64]
    arrival_s: NDArray[np.float64]
    first_prompt_tokens: NDArray[np.int64]
    demand: NDArray[np.float64]

    @classmethod
    def of(cls, workload: Workload) -> "Applications":
        """Raises: DataError: if a request names no application."""
        if workload.app is None or not all(workload.app):
            raise DataError(f"{workload.name}: every request must name its application, in the column app")
        names, first, number = np.unique(workload.app, return_index=True, return_inverse=True)
        by_arrival = np.argsort(first)
        rank = np.empty_like(by_arrival)
        rank[by_arrival] = np.arange(len(names))
        number, first = rank[number], first[by_arrival]
        costs = token_time(workload.prompt_tokens, workload.output_tokens)
        demand = np.bincount(number, costs).astype(np.float64)
        return cls(
            names[by_arrival], number, workload.arrival_s[first], workload.prompt_tokens[first], demand
        )

    @property
    def types(self) -> list[str]:
        """Of each, (A,); "" where its name has none."""
        return [Application.parse(name).type for name in self.names.tolist()]

    def finished_s(self, served: Served) -> NDArray[np.float64]:
        """When the last request of each finished, (A,); NaN if one was refused."""
        finished = np.full(len(self.names), -np.inf)
        with np.errstate(invalid="ignore"):
            np.maximum.at(finished, self.number, served.finished_s)
        return finished


def ideal_finish_s(
    arrival_s: NDArray[np.float64], demand: NDArray[np.float64], rate: float
) -> NDArray[np.float64]:
    """When ideal fair sharing would finish each application, (A,) seconds.

    Args:
        arrival_s: (A,) ascending.
        demand: (A,) > 0.
        rate: service a second, in units of demand.
    """
    share, now = FairShare(), 0.0
    finish = np.empty(len(arrival_s))
    for number, time_s in enumerate([*arrival_s.tolist(), np.inf]):
        while now + (step_s := share.until_next() / rate) <= time_s < np.inf or (
            time_s == np.inf and len(share)
        ):
            now += step_s
            for application in share.serve(share.until_next()):
                finish[int(application)] = now
        if time_s < np.inf:
            share.serve((time_s - now) * rate)
            now = time_s
            share.join(str(number), float(demand[number]))
    return finish


class TrueDemand:
    """Knows what each application will cost."""

    def __init__(self, applications: Applications) -> None:
        self._cost = dict(zip(applications.names.tolist(), applications.demand.tolist(), strict=True))

    def __call__(self, application: Application, prompt_tokens: int) -> float:
        return self._cost[application.id]


def train_demand(workload: Workload, *, seed: int = 0) -> MlpDemand:
    """Fit the networks to finished applications. Raises: DataError: as `Applications.of`."""
    applications = Applications.of(workload)
    return fit_demand(applications.types, applications.first_prompt_tokens, applications.demand, seed=seed)


# --- The table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """What the table is made from: a folder of length files and traces, and one trace's arrivals."""

    data: Path
    arrivals: Path
    applications: int
    loads: Sequence[float] = (0.9, 1.2)
    seeds: Sequence[int] = (0, 1)

    @property
    def cases(self) -> int:
        return len(self.loads) * len(self.seeds) * len(ORDERS)


def fairness_rows(setup: Setup, *, workers: int) -> Iterator[dict[str, Any]]:
    """One row for each seed, load and order, as they are done.

    Raises: DataError: if a file is missing or has too few requests.
    """
    demand = train_demand(workload_of(setup, "train", TRAINED_ON, _TRAINING_SEED))
    cases = [(setup, demand, *case) for case in itertools.product(setup.seeds, setup.loads, ORDERS)]
    with worker_pool(workers) as pool:
        yield from pool.map(_run, cases)


def workload_of(setup: Setup, half: Half, count: int, seed: int) -> Workload:
    """Applications of one half of the sources; those to train on need no times and come as they may."""
    sources, arrivals = read_sources(setup.data, half), read_trace(setup.arrivals)
    if len(arrivals) < count:
        arrivals = poisson(arrivals.take(np.resize(np.arange(len(arrivals)), count)), seed=seed)
    return make_applications(sources, arrivals, count, seed=seed)


def _run(case: tuple[Setup, MlpDemand, int, float, str]) -> dict[str, Any]:
    setup, demand, seed, load, order = case
    step_time, engine = load_profile(PROFILE)
    engine = replace(engine, **ROOM)
    workload = workload_of(setup, "test", setup.applications, seed)
    tokens_per_s, rate = service_rates(workload, engine, step_time)
    workload = with_noisy_scores(at_load(workload, load, tokens_per_s), TAU, seed=seed)
    return {
        "workload": workload.name,
        "load": load,
        "seed": seed,
        "order": order,
        **measure(workload, order, demand, engine, step_time, rate),
    }


def service_rates(workload: Workload, engine: EngineSettings, step_time: StepTime) -> tuple[float, float]:
    """Of a full engine in arrival order: output tokens, and KV tokens times steps, a second."""
    drawn, finished_s = closed_loop(workload, engine, step_time)
    start, end = np.quantile(finished_s, [0.1, 0.9])
    counted = (finished_s > start) & (finished_s <= end)
    tokens = drawn.output_tokens[counted]
    costs = token_time(drawn.prompt_tokens[counted], tokens)
    return float(tokens.sum() / (end - start)), float(costs.sum() / (end - start))


def measure(
    workload: Workload, order: str, demand: Demand, engine: EngineSettings, step_time: StepTime, rate: float
) -> dict[str, Any]:
    """Serve a workload in one of `ORDERS` and compare with the ideal; times in seconds.

    A delay is how much later than in the ideal an application finished, negative if earlier; `bound_s` is
    2 c + C / rate, with c the longest time that a request ran and C the largest demand.
    """
    from pars_fast.simulation.faithful import simulate

    applications = Applications.of(workload)
    served = simulate(workload, _policy(order, demand, applications), None, engine, step_time)
    finished_s = applications.finished_s(served)
    completion = finished_s - applications.arrival_s
    delay = finished_s - ideal_finish_s(applications.arrival_s, applications.demand, rate)
    longest_s = float((served.finished_s - served.first_scheduled_s).max())
    bound_s = 2 * longest_s + float(applications.demand.max()) / rate
    values = {
        "mean_completion_s": completion.mean(),
        "p50_completion_s": np.median(completion),
        "p99_completion_s": np.quantile(completion, 0.99),
        "max_completion_s": completion.max(),
        "mean_delay_s": delay.mean(),
        "p99_delay_s": np.quantile(delay, 0.99),
        "max_delay_s": delay.max(),
        "bound_s": bound_s,
        "mean_e2e_s": (served.finished_s - workload.arrival_s).mean(),
    }
    return {
        "applications": len(delay),
        "requests": len(workload),
        **{name: float(f"{value:.5g}") for name, value in values.items()},
        "later_than_ideal": round(float((delay > 0).mean()), 4),
        "preemptions": served.preemptions,
        "arrivals_sha256": workload.sha256()[:12],
    }


def _policy(order: str, demand: Demand, applications: Applications) -> Policy:
    orders: Mapping[str, Callable[[], Policy]] = {
        **POLICIES,
        "justitia": lambda: Justitia(demand),
        EXACT: lambda: Justitia(TrueDemand(applications)),
    }
    return orders[order]()
