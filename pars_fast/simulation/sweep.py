"""Many simulations: a grid of cases on all cores, each row kept as soon as it is there.

A row is keyed by a hash of everything that it depends on, the code's commit included, and appended to a
JSON-lines file beside the result, so that a sweep that was interrupted, or is extended, runs only what is
missing.
"""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pars_fast import __version__
from pars_fast.bench_results import commit
from pars_fast.demo.records import gain_captured
from pars_fast.distribution import LengthDistribution, fit_length_distribution
from pars_fast.errors import ParsFastError
from pars_fast.guards import (
    GUARDS,
    FixedThreshold,
    Guard,
    IdleQuantum,
    NoGuard,
    OvertakingBudget,
    PassingLimit,
    RelativeAgeing,
    UniBoost,
    guard_text,
    parse_guard,
)
from pars_fast.kept_rows import append_row, read_rows
from pars_fast.policies import POLICIES, needs_distribution, with_lengths
from pars_fast.simulation.arrays import Floats
from pars_fast.simulation.columns import columns
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.fast import capacity_tok_s
from pars_fast.simulation.fleet import Router, simulate_fleet
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.workload import Workload, at_load, with_noisy_scores, with_unscored
from pars_fast.worker_pool import worker_pool

Simulator = Literal["fast", "faithful"]

FRONTIER: tuple[Guard, ...] = (  # each guard from tight to loose, for queues of seconds to minutes
    NoGuard(),
    *(FixedThreshold(seconds) for seconds in (1, 2, 4, 8, 15, 30, 60, 120, 240)),
    *(IdleQuantum(steps) for steps in (50, 200, 800, 3200, 12800)),
    *(RelativeAgeing(rate) for rate in (0.005, 0.02, 0.08, 0.3, 1.2)),
    *(UniBoost(knob) for knob in (0.5, 2, 8, 30, 120, 500)),
    *(OvertakingBudget(beta) for beta in (0, 0.1, 0.25, 0.5, 1, 2, 4)),
    *(PassingLimit(beta) for beta in (0, 0.1, 0.25, 0.5, 1, 2, 4)),
)


_OTHER_DRAW = 1000  # added to a seed
_GAINS = (("gain_captured", "mean_latency_per_token_s"), ("gain_captured_e2e", "mean_e2e_s"))
_commit = functools.cache(commit)  # git is asked once a process


@dataclass(frozen=True, slots=True)
class Case:
    """One simulation of a sweep.

    `tau` is that of noisy scores, None for the workload's own; `guard` is as `guard_text` writes it; `load`
    is of the whole fleet's capacity.
    """

    policy: str
    guard: str
    load: float
    seed: int = 0
    tau: float | None = None
    ranker_delay_s: float = 0.0
    unscored_share: float = 0.0
    engines: int = 1
    router: Router = "round_robin"


@dataclass(frozen=True, slots=True)
class Setup:
    """What all cases of a sweep have in common; `workloads` and `capacity_tok_s` are by seed.

    `scores` are (N,) expected tokens by seed and predictor, for the policies whose papers bring a predictor
    of their own; `lengths` is the distribution of the workload's own scores, by log expected tokens.
    """

    workloads: Mapping[int, Workload]
    capacity_tok_s: Mapping[int, float]
    engine: EngineSettings
    step_time: StepTime
    simulator: Simulator = "fast"
    scores: Mapping[tuple[int, str], Floats] = field(default_factory=dict)
    lengths: LengthDistribution | None = None


def make_setup(workloads: Mapping[int, Workload], engine: EngineSettings, step_time: StepTime,
               simulator: Simulator = "fast") -> Setup:
    """Measure what one engine can do of each workload, in the fast simulator."""
    capacity = {seed: capacity_tok_s(workload, engine, step_time) for seed, workload in workloads.items()}
    return Setup(workloads, capacity, engine, step_time, simulator)


def grid(policies: Sequence[str], guards: Sequence[Guard] | None, loads: Sequence[float], *,
         seeds: Sequence[int] = (0,), taus: Sequence[float | None] = (None,),
         delays_s: Sequence[float] = (0.0,), unscored: Sequence[float] = (0.0,),
         engines: Sequence[int] = (1,), routers: Sequence[Router] = ("round_robin",)) -> list[Case]:
    """Every combination, less those that would be the same run twice.

    Arrival order needs no guard, a policy without a ranker has no scores that could be late or wrong, and one
    engine needs no router. `guards` None gives each policy its own.
    """
    cases: dict[Case, None] = {}
    dimensions = (policies, loads, seeds, taus, delays_s, unscored, engines, routers)
    for policy, load, seed, tau, delay, share, count, router in itertools.product(*dimensions):
        rules = POLICIES[policy]
        for guard in (rules.default_guard,) if guards is None else guards:
            case = Case(policy, guard_text(guard), load, seed, tau, delay, share, count, router)
            if policy == "fcfs":
                case = replace(case, guard=NoGuard.name)
            if count == 1:
                case = replace(case, router="round_robin")
            if not rules.uses_ranker:
                case = replace(case, ranker_delay_s=0.0)
                if case.router != "predicted_work":
                    case = replace(case, tau=None, unscored_share=0.0)
            cases[case] = None
    return list(cases)


def parse_guards(text: str) -> list[Guard] | None:
    """`own` (None: each policy's own), `all` (each guard by default), `frontier`, or guards by comma.

    Raises: ParsFastError: if a guard is not understood; says what would be right.
    """
    if text == "own":
        return None
    if text == "all":
        return [guard() for guard in GUARDS.values()]
    if text == "frontier":
        return list(FRONTIER)
    try:  # a comma before a name ends a guard, any other is within its settings
        return [parse_guard(part) for part in re.split(rf",(?={'|'.join(GUARDS)})", text)]
    except ValueError as error:
        raise ParsFastError(f"a guard is {error}; got {text!r}") from None


def run_case(setup: Setup, case: Case) -> dict[str, Any]:
    """Simulate one case; its row without the gains, which need other rows."""
    capacity = setup.capacity_tok_s[case.seed]
    workload = at_load(setup.workloads[case.seed], case.load, capacity * case.engines)
    if case.tau is not None:
        workload = with_noisy_scores(workload, case.tau, seed=case.seed)
    elif (own := _own_scores(setup, case)) is not None:
        workload = replace(workload, expected_tokens=own)
    lengths = _lengths(setup, case, workload)
    if case.unscored_share:
        workload = with_unscored(workload, case.unscored_share, seed=case.seed)
    guard = parse_guard(case.guard)
    if setup.simulator == "faithful":
        from pars_fast.simulation import faithful

        served = faithful.simulate(workload, with_lengths(case.policy, lengths), guard, setup.engine,
                                   setup.step_time, ranker_delay_s=case.ranker_delay_s)
    else:
        served = simulate_fleet(workload, case.policy, guard, setup.engine, setup.step_time,
                                engines=case.engines, router=case.router, ranker_delay_s=case.ranker_delay_s)
    row = columns(workload, served)
    throughput = row["throughput_to_last_arrival_tok_s"]
    achieved = None if throughput is None else round(throughput / (capacity * case.engines), 4)
    return {**asdict(case), "workload": workload.name, "simulator": setup.simulator,
            "arrivals_sha256": workload.sha256(), "capacity_tok_s": round(capacity, 3),
            "achieved_load": achieved, **row}


def _own_scores(setup: Setup, case: Case) -> Floats | None:
    """Of the predictor that the policy's paper brings, if it was trained."""
    predictor = POLICIES[case.policy].predictor
    return None if predictor is None else setup.scores.get((case.seed, predictor))


def _lengths(setup: Setup, case: Case, workload: Workload) -> LengthDistribution | None:
    """The distribution that a policy orders by: of noisy scores it is fitted on another draw of the noise."""
    if not needs_distribution(case.policy):
        return None
    if case.tau is None:
        return setup.lengths
    other = with_noisy_scores(workload, case.tau, seed=case.seed + _OTHER_DRAW)
    lengths = np.log(other.output_tokens.astype(np.float64))
    return fit_length_distribution(np.log(other.expected_tokens), lengths, np.ones(len(other)))


def run_sweep(setup: Setup, cases: Sequence[Case], *, kept: Path | None = None, workers: int | None = None,
              on_row: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
    """Rows of all cases, in their order.

    Args:
        kept: JSON-lines file of rows; those found there are not run again, new ones are appended.
        workers: processes; None takes all cores, 1 runs in this process.
        on_row: told (rows there are, rows there will be).
    Raises: ParsFastError: if the faithful simulator is asked for a fleet. OutputError: if `kept` cannot be
        written.
    """
    if setup.simulator == "faithful" and any(case.engines > 1 for case in cases):
        raise ParsFastError("the faithful simulator runs one engine; take the fast one for a fleet")
    keys = [_key(setup, case) for case in cases]
    known = read_rows(kept)
    rows = {key: known[key] for key in keys if key in known}
    missing = {key: case for key, case in zip(keys, cases, strict=True) if key not in rows}
    on_row(len(rows), len(keys))
    workers = min(workers or os.cpu_count() or 1, len(missing))
    for key, row in _run_all(setup, missing, workers):
        rows[key] = row
        append_row(kept, key, row)
        on_row(len(rows), len(keys))
    return with_gains([rows[key] for key in keys])


def _run_all(setup: Setup, cases: Mapping[str, Case], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if workers <= 1:
        for key, case in cases.items():
            yield key, run_case(setup, case)
        return
    with worker_pool(workers, _set_up, (setup,)) as pool:
        futures = {pool.submit(_run_here, case): key for key, case in cases.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


_setup: Setup | None = None  # of this worker process


def _set_up(setup: Setup) -> None:
    global _setup
    _setup = setup


def _run_here(case: Case) -> dict[str, Any]:
    assert _setup is not None
    return run_case(_setup, case)


def _key(setup: Setup, case: Case) -> str:
    given = {**asdict(case), "workload": setup.workloads[case.seed].sha256(), "engine": asdict(setup.engine),
             "capacity": setup.capacity_tok_s[case.seed], "step_time": asdict(setup.step_time),
             "simulator": setup.simulator, "version": __version__, "commit": _commit()}
    if case.tau is None and (own := _own_scores(setup, case)) is not None:
        given["scores"] = hashlib.sha256(np.ascontiguousarray(own).tobytes()).hexdigest()
    if case.tau is None and setup.lengths is not None and needs_distribution(case.policy):
        given["lengths"] = asdict(setup.lengths)
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def with_gains(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `gain_captured` (latency per token) and `gain_captured_e2e`.

    Both are against FCFS and the unguarded oracle of the same seed, `served_alike`; None where one of them is
    missing or the oracle gains under 5 %.
    """
    with_gain = [dict(row) for row in rows]
    ends = {(row["policy"], row["seed"], *served_alike(row)): row for row in with_gain
            if row["policy"] == "fcfs" or (row["policy"], row["guard"]) == ("oracle", NoGuard.name)}
    for row in with_gain:
        fcfs, oracle = (ends.get((policy, row["seed"], *served_alike(row))) for policy in ("fcfs", "oracle"))
        for name, column in _GAINS:
            values: list[Any] = [end and end[column] for end in (fcfs, row, oracle)]
            row[name] = None
            if all(value is not None for value in values):
                gain = gain_captured(*values)
                row[name] = None if gain is None else round(gain, 4)
    return with_gain


def served_alike(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row has in common with those that it is compared with, but for the seed.

    A router that goes by predicted work sends even FCFS's requests by their scores.
    """
    names = ["workload", "load", "engines", "router", "simulator"]
    if row["router"] == "predicted_work":
        names += ["tau", "unscored_share"]
    return tuple(row[name] for name in names)
