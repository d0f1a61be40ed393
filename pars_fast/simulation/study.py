"""The tables behind `docs/simulator.md`: what is simulated for each, on every trace of a folder.

A table is a tidy CSV, from which the page is made and defaults are chosen. Rows are kept as they come, so
that a study that was interrupted runs only what is missing.
"""

import csv
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pars_fast import __version__
from pars_fast.bench_results import commit
from pars_fast.errors import DataError, make_writable
from pars_fast.guards import NoGuard, PassingLimit
from pars_fast.policies import POLICIES, SharingPolicy
from pars_fast.simulation.fleet import ROUTERS
from pars_fast.simulation.step_time import load_profile
from pars_fast.simulation.sweep import FRONTIER, Case, Simulator, grid, make_setup, run_sweep
from pars_fast.simulation.workload import (
    Workload,
    make_workload,
    poisson,
    read_trace,
    with_burst,
    with_noisy_scores,
    with_ties_shuffled,
)

OURS, BASELINE, ORACLE = "pars_fast", "fcfs", "oracle"
TAU = 0.5  # of the noisy scores where nothing else is said: a good ranker on a mix of sources
LATENCIES = ("mean_latency_per_token_s", "mean_e2e_s", "p99_e2e_s", "max_wait_s")
PROFILE = "h100_llama_3_1_8b"

_LOADS = (0.8, 1.0, 1.2, 1.3)
_BURST, _BURST_LOAD = 0.3, 0.8  # share of a trace's requests that come at once half-way, and load with them
_PIECES = 8  # of each trace, for the intervals of no_harm
_LIGHT_LOADS = (0.5, 0.7, 0.85)
_ENGINES = (1, 4, 16, 64, 256, 1000)
_REQUESTS_PER_ENGINE = 600
_FLEET_SEATS = 64  # so that a few hundred requests an engine are a queue
_NOT_WORSE = ("mean_latency_per_token_s", "p99_latency_per_token_s", "mean_ttft_s", "p99_ttft_s",
              "mean_tpot_s", "mean_e2e_s", "p99_e2e_s", "max_wait_s")
_AGREEING = ("mean_latency_per_token_s", "p99_latency_per_token_s", "mean_ttft_s", "p99_ttft_s", "mean_e2e_s",
             "p99_e2e_s")
# 97.5 % quantile of Student's t for that many pieces, less one
_T = 2.365
# Those that share the engine among applications have a study of their own (`docs/fairness.md`).
COMPARED = [name for name, policy in POLICIES.items()
            if name != "priority" and not issubclass(policy, SharingPolicy)]
_POLICY_LOADS = (0.8, 1.0, 1.2)
_POLICY_PIECES = 3  # of each trace, one behind the other, each with noise of its own
_POLICY_COLUMNS = ("p99_latency_per_token_s", "mean_ttft_s", "p99_ttft_s", "mean_tpot_s", "p99_tpot_s",
                   "preemptions", "recomputed_tokens", "prefix_hit_tokens")
_CLAIMING = ("fcfs", "pars", "ltr", "elis", "alise", "pars_fast")
_CLAIM_LOADS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.6)

_Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Study:
    """What a table is made from: traces, whole or the first `requests` of each.

    `kept` holds rows as they come; `on_progress` is told a line at a time.
    """

    traces: Sequence[Path]
    kept: Path
    requests: int | None = None
    workers: int | None = None
    on_progress: Callable[[str], None] = lambda line: None


def run_study(table: str, study: Study) -> list[_Row]:
    """The rows of one of `TABLES`. Raises: DataError: if there is no trace, or one cannot be read."""
    if not study.traces:
        raise DataError("no trace_*.csv or trace_*.csv.gz in the folder of --traces")
    return TABLES[table](study)


def find_traces(folder: Path) -> list[Path]:
    """The traces of a folder by name."""
    return sorted([*folder.glob("trace_*.csv"), *folder.glob("trace_*.csv.gz")])


def read_timed_traces(folder: Path) -> list[Workload]:
    """The traces of a folder that have times of arrival.

    Raises: DataError: if there is none, or one cannot be read.
    """
    traces = [trace for trace in map(read_trace, find_traces(folder)) if trace.arrival_s[-1] > 0]
    if not traces:
        raise DataError(f"{folder}: no trace_*.csv[.gz] with arrival times there")
    return traces


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, each with what one needs to repeat it."""
    make_writable(path.parent)
    date = time.strftime("%Y-%m-%d")
    given = {"profile": PROFILE, "version": __version__, "commit": commit(), "date": date}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *given], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **given} for row in rows)


def read_table(path: Path) -> list[_Row]:
    """Rows of `write_table`, numbers as numbers and nothing as None; [] if there is no such table."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(name: str, text: str) -> Any:
    if name in ("arrivals_sha256", "commit"):
        return text  # which may look like a number
    try:
        return float(text) if text else None
    except ValueError:
        return text


# --- Workloads ----------------------------------------------------------------------------------------------


def _read(path: Path, requests: int | None) -> Workload:
    workload = read_trace(path)
    if workload.arrival_s[-1] == 0:
        workload = poisson(workload, seed=0)
    else:
        workload = with_ties_shuffled(workload, seed=0)
    return workload if requests is None else workload.take(np.arange(min(requests, len(workload))))


def _pieces(workload: Workload, count: int) -> dict[int, Workload]:
    """`count` successive parts of equal length, by number.

    Raises: DataError: if there are too few requests.
    """
    if len(workload) < count:
        raise DataError(f"{workload.name}: {len(workload)} requests are too few for {count} pieces")
    size = len(workload) // count
    return {k: workload.take(np.arange(k * size, (k + 1) * size)) for k in range(count)}


def _drawn(workload: Workload, count: int) -> Workload:
    """`count` requests with lengths drawn from a trace and Poisson arrivals."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(workload), size=count)
    return make_workload(workload.name, np.sort(rng.uniform(0, count, count)), workload.prompt_tokens[picks],
                         workload.output_tokens[picks])


def _run(study: Study, workloads: Mapping[int, Workload], cases: Sequence[Case], *,
         simulator: Simulator = "fast", **settings: Any) -> list[_Row]:
    step_time, engine = load_profile(PROFILE)
    longest = max(int((w.prompt_tokens + w.output_tokens).max()) for w in workloads.values())
    engine = replace(engine, max_model_len=max(engine.max_model_len, longest), **settings)
    name = next(iter(workloads.values())).name
    setup = make_setup(workloads, engine, step_time, simulator)
    return run_sweep(setup, cases, kept=study.kept, workers=study.workers,
                     on_row=lambda done, total: study.on_progress(f"{name}: {done} of {total}"))


# --- Tables -------------------------------------------------------------------------------------------------


def _frontier(study: Study) -> list[_Row]:
    """Every guard at every setting, for the order of an oracle and of a ranker, with and without a burst."""
    rows: list[_Row] = []
    for path in study.traces:
        workload = _read(path, study.requests)
        burst = replace(with_burst(workload, _BURST, seed=0), name=f"{workload.name} + burst")
        for offered, loads in ((workload, _LOADS), (burst, (_BURST_LOAD,))):
            scored = with_noisy_scores(offered, TAU, seed=0)  # once, not for each case
            cases = grid([BASELINE, ORACLE, OURS], FRONTIER, loads)
            rows += [{**row, "tau": TAU if row["policy"] == OURS else None}
                     for row in _run(study, {0: scored}, cases)]
    return [_short(row, "load", "policy", "guard") for row in rows]


def _robustness(study: Study) -> list[_Row]:
    """The default guard against the quality of the scores, their delay, and the share that has none."""
    ends = grid([BASELINE, ORACLE], [NoGuard()], (1.0, 1.2))
    varied = [("tau", {"taus": [round(0.1 * k, 1) for k in range(11)]}),
              ("ranker_delay_s", {"taus": [TAU], "delays_s": [0, 0.03, 0.1, 0.3, 1, 3, 10, 30]}),
              ("unscored_share", {"taus": [TAU], "unscored": [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]})]
    rows: list[_Row] = []
    for path in study.traces:
        workload = _read(path, study.requests)
        for name, dimension in varied:
            cases = grid([OURS], None, (1.0, 1.2), **dimension)  # type: ignore[arg-type]
            for row in _run(study, {0: workload}, [*ends, *cases]):
                if row["policy"] == OURS:
                    rows.append({"varied": name, "value": row[name],
                                 **_short(row, "load", "gain_captured", "gain_captured_e2e")})
    return rows


def _no_harm(study: Study) -> list[_Row]:
    """Below saturation, paired over pieces of each trace: each column's difference to arrival order."""
    cases = grid([BASELINE, OURS], None, _LIGHT_LOADS, seeds=range(_PIECES), taus=[0.0, TAU])
    rows: list[_Row] = []
    for path in study.traces:
        ran = _run(study, _pieces(_read(path, study.requests), _PIECES), cases)
        base = {(row["load"], row["seed"]): row for row in ran if row["policy"] == BASELINE}
        ours = [row for row in ran if row["policy"] == OURS]
        ours.sort(key=lambda row: (row["load"], row["tau"]))
        for (load, tau), group in groupby(ours, key=lambda row: (row["load"], row["tau"])):
            pairs = [(base[load, row["seed"]], row) for row in group]
            rows += [{"workload": pairs[0][0]["workload"], "load": load, "tau": tau, "column": column,
                      **_paired([pair[0][column] for pair in pairs], [pair[1][column] for pair in pairs])}
                     for column in _NOT_WORSE]
    return rows


def _paired(before: Sequence[float], after: Sequence[float]) -> _Row:
    """Mean of `before`, and the mean difference with its 95 % interval as shares of it."""
    change = np.subtract(after, before)
    mean, half = float(change.mean()), _T * float(change.std(ddof=1)) / math.sqrt(len(change))
    scale = float(np.mean(before))
    return {"pieces": len(change), "fcfs": _rounded(scale), "change": _rounded(mean / scale),
            "low": _rounded((mean - half) / scale), "high": _rounded((mean + half) / scale)}


def _fleet(study: Study) -> list[_Row]:
    """Equal load per engine from 1 engine to 1,000, by each router, on lengths of one trace."""
    rows: list[_Row] = []
    trace = next((path for path in study.traces if "conv" in path.name), study.traces[0])
    lengths = _read(trace, study.requests)
    for engines in _ENGINES:
        cases = [*grid([BASELINE, ORACLE], [NoGuard()], (1.2,), taus=[TAU], engines=[engines],
                       routers=ROUTERS),
                 *grid([OURS], None, (1.2,), taus=[TAU], engines=[engines], routers=ROUTERS)]
        workload = _drawn(lengths, _REQUESTS_PER_ENGINE * engines)
        rows += _run(study, {0: workload}, cases, max_num_seqs=_FLEET_SEATS)
    return [_short(row, "load", "engines", "router", "policy", "guard", "gain_captured", "gain_captured_e2e")
            for row in rows]


def _agreement(study: Study) -> list[_Row]:
    """Both simulators on the same requests: mean and 99th percentile of each latency."""
    cases = [*grid([BASELINE], [NoGuard()], (1.2,)), *grid([OURS], None, (1.2,), taus=[TAU])]
    rows: list[_Row] = []
    for path in study.traces:
        workload = _read(path, study.requests)
        simulators: tuple[Simulator, Simulator] = ("faithful", "fast")
        both = [_run(study, {0: workload}, cases, simulator=simulator) for simulator in simulators]
        for faithful, fast in zip(*both, strict=True):
            rows += [{"workload": workload.name, "policy": faithful["policy"], "guard": faithful["guard"],
                      "load": faithful["load"], "requests": len(workload), "column": column,
                      "faithful_s": faithful[column], "fast_s": fast[column],
                      "error": _rounded(fast[column] / faithful[column] - 1)} for column in _AGREEING]
    return rows


def _with_ltr_unguarded(policies: Sequence[str], loads: Sequence[float],
                        seeds: Sequence[int] = (0,)) -> list[Case]:
    """Every policy under its own guard; LTR without it, too, since its paper has both."""
    return [case for names, guards in ((policies, None), (["ltr"], [NoGuard()]))
            for case in grid(names, guards, loads, seeds=seeds, taus=[TAU])]


def _policies(study: Study) -> list[_Row]:
    """Every policy in the faithful simulator, all with the same noisy scores; PARS's under our guard, too.

    On several pieces of each trace, of `study.requests` or what there is for each; its number is the seed.
    """
    pieces = range(_POLICY_PIECES)
    cases = _with_ltr_unguarded(COMPARED, _POLICY_LOADS, pieces)
    cases += grid(["pars"], [PassingLimit()], _POLICY_LOADS, seeds=pieces, taus=[TAU])
    rows: list[_Row] = []
    for path in study.traces:
        most = None if study.requests is None else study.requests * _POLICY_PIECES
        rows += _run(study, _pieces(_read(path, most), _POLICY_PIECES), cases, simulator="faithful")
    shown = [row | {"tau": TAU if POLICIES[row["policy"]].uses_ranker else None} for row in rows]
    return [_short(row, "load", "policy", "guard") | {name: row[name] for name in _POLICY_COLUMNS}
            for row in shown]


def _latency_load(study: Study) -> list[_Row]:
    """Mean latency against load on one trace, for what papers say of throughput and of light loads."""
    path = next((path for path in study.traces if "conv" in path.name), study.traces[0])
    cases = _with_ltr_unguarded(_CLAIMING, _CLAIM_LOADS)
    rows = _run(study, {0: _read(path, study.requests)}, cases, simulator="faithful")
    return [_short(row, "load", "policy", "guard") | {name: row[name] for name in _POLICY_COLUMNS}
            for row in rows]


TABLES: dict[str, Callable[[Study], list[_Row]]] = {
    "frontier": _frontier,
    "robustness": _robustness,
    "no_harm": _no_harm,
    "fleet": _fleet,
    "agreement": _agreement,
    "policies": _policies,
    "latency_load": _latency_load,
}


def _short(row: Mapping[str, Any], *names: str) -> _Row:
    """What a table needs of a row."""
    kept = {name: row[name] for name in ("workload", *names)}
    return {**kept, "tau": row["tau"], "seed": row["seed"], "requests": row["completed"],
            **{name: _rounded(row[name]) for name in LATENCIES},
            "arrivals_sha256": row["arrivals_sha256"][:12]}


def _rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
