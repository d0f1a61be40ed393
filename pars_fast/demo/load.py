"""A real server under several loads: the same arrivals for every policy, and what is done is kept.

One server for all runs, whose policy is switched between drained ones, as in the demo. At each load the
policies take turns, so that a machine that gets slower does so for all. A load is the offered tokens/s over
the capacity in arrival order, measured first; `burst` is thousands of requests at once.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pars_fast.bench_results import commit
from pars_fast.demo.arrivals import BURST_LENGTHS, arrivals_hash, traffic
from pars_fast.demo.display import Display
from pars_fast.demo.records import Load, Run, ServedRequest, gain_captured, paired_ratio
from pars_fast.demo.run import (
    LIGHT_EVERY,
    SEED,
    Served,
    conditions,
    measure_capacity,
    rotated,
    serve_switched,
    served_model,
    switch_arguments,
    switchable_server,
    warm_up,
)
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.kept_rows import append_row, read_rows
from pars_fast.latency_columns import rounded
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_time import StepTime

BASELINE, ORACLE = "fcfs", "oracle"
COMPARED = (  # columns given as a ratio to arrival order, too
    "mean_latency_per_token_s", "p99_latency_per_token_s", "mean_ttft_s", "p99_ttft_s", "mean_tpot_s",
    "p99_tpot_s", "mean_e2e_s", "p99_e2e_s", "max_wait_s", "throughput_tok_s",
)
GAINS = {"gain_captured": "mean_latency_per_token_s", "gain_captured_e2e": "mean_e2e_s"}
_DRAINED_S = 2.0  # of a run, after the time that its arrivals or its tokens take


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to serve. Loads below 1 and the burst, which take longest, have a run in one of `LIGHT_EVERY`
    repeats; `burst_requests` 0 leaves the burst out."""

    policies: tuple[str, ...]
    loads: tuple[float, ...]
    burst_requests: int
    repeats: int

    @property
    def all_loads(self) -> tuple[Load, ...]:
        return (*self.loads, "burst") if self.burst_requests else self.loads

    def cases(self) -> list[Run]:
        """Runs that have not been served, in their order."""
        groups = [(repeat, load) for repeat in range(self.repeats) for load in self.all_loads
                  if repeat % LIGHT_EVERY == 0 or (isinstance(load, float) and load >= 1)]
        return [Run(policy, load, repeat, ()) for place, (repeat, load) in enumerate(groups)
                for policy in rotated(self.policies, place)]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All runs, and the figures made from them; keys of `summary` as in `summarise`."""

    runs: tuple[Run, ...]
    summary: dict[str, Any]


def run_load(
    plan: LoadPlan, *, model: str | None, ranker: str, kept: Path | None, display: Display
) -> LoadResult:
    """Serve every case of the plan that is not kept yet.

    Args:
        model: a model for vLLM to serve; None makes a tiny random one.
        ranker: as the setting PARS_RANKER.
        kept: JSON-lines file of finished runs and of the capacity; those found there are not served again,
            unless engine, ranker, commit or machine were others. None keeps nothing.
        display: shows progress.
    Raises: ServerError: if the server does not start, ends, or answers nothing. OutputError: if `kept` cannot
        be written.
    """
    sample = load_sample()
    with tempfile.TemporaryDirectory(prefix="pars-fast-load-") as name:
        served = served_model(model, Path(name), sample)
        book = _Book(kept, served, ranker, plan.burst_requests)
        missing = [case for case in plan.cases() if book.run(case) is None]
        display.say(f"{len(plan.cases())} runs, {len(missing)} to be served")
        if missing:
            display.say(f"starting vLLM with pars-fast, serving {served.description}")
            with switchable_server(served, ranker, Path(name)) as server:
                warm_up(server.url, served, sample, display)
                if book.capacity_tok_s is None:
                    capacity_tok_s = measure_capacity(server.url, served, sample, display)
                    book.keep_engine(server.step_log.engine, capacity_tok_s)
                assert book.capacity_tok_s is not None
                for case in _announced(missing, plan, sample, book.capacity_tok_s, display):
                    prompts, arrivals = _traffic(case, plan, sample, book.capacity_tok_s)
                    book.keep(serve_switched(server, served, case, prompts, arrivals, display))
        runs = [run for case in plan.cases() if (run := book.run(case)) is not None]
        assert book.capacity_tok_s is not None
        summary = summarise(runs, plan, sample, book.capacity_tok_s)
    engine = {"engine_settings": book.engine_settings}
    return LoadResult(tuple(runs), {**summary, **engine, **book.setup, **conditions()})


def _traffic(
    case: Run, plan: LoadPlan, sample: Sequence[SamplePrompt], capacity_tok_s: float
) -> tuple[list[SamplePrompt], np.ndarray]:
    return traffic(sample, case.load, capacity_tok_s, SEED + case.repeat, plan.burst_requests)


def _announced(
    cases: Sequence[Run], plan: LoadPlan, sample: Sequence[SamplePrompt], capacity_tok_s: float,
    display: Display,
) -> Iterator[Run]:
    """The cases one by one, with a word on how long the rest will take."""
    expected_s = []
    for case in cases:
        prompts, arrivals = _traffic(case, plan, sample, capacity_tok_s)
        tokens = sum(prompt.output_tokens for prompt in prompts)
        expected_s.append(max(float(arrivals[-1]), tokens / capacity_tok_s) + _DRAINED_S)
    started = time.monotonic()
    for place, case in enumerate(cases):
        pace = (time.monotonic() - started) / sum(expected_s[:place]) if place else 1.0
        display.say(f"capacity {capacity_tok_s:.0f} tokens/s; run {place + 1} of {len(cases)}, about "
                    f"{pace * sum(expected_s[place:]) / 60:.1f} min left")
        yield case


class _Book:
    """Finished runs by what they depend on, in a file that outlives the command."""

    def __init__(self, path: Path | None, served: Served, ranker: str, burst_requests: int) -> None:
        self._path, self._rows, self._burst_requests = path, read_rows(path), burst_requests
        machine = {name: value for name, value in conditions().items() if name != "date"}
        self.setup: dict[str, Any] = {
            "served_model": served.description, "engine_arguments": [*served.arguments, *switch_arguments()],
            "ranker": ranker, "seed": SEED, "commit": commit(),
        }
        self._key = _hash({**self.setup, **machine})
        engine = self._rows.get(self._key, {})
        self.capacity_tok_s: float | None = engine.get("capacity_tok_s")
        self.engine_settings: dict[str, int] | None = engine.get("engine_settings")

    def keep_engine(self, engine: EngineSettings, capacity_tok_s: float) -> None:
        self.engine_settings, self.capacity_tok_s = asdict(engine), capacity_tok_s
        self._keep(self._key, {"capacity_tok_s": capacity_tok_s, "engine_settings": self.engine_settings})

    def keep(self, run: Run) -> None:
        self._keep(self._key_of(run), asdict(run))

    def run(self, case: Run) -> Run | None:
        """The finished run of a case."""
        row = self._rows.get(self._key_of(case))
        if row is None:
            return None
        step_time = row["step_time"] and StepTime(**row["step_time"])
        requests = tuple(ServedRequest(**request) for request in row["requests"])
        return Run(**{**row, "requests": requests, "step_time": step_time})

    def _keep(self, key: str, row: dict[str, Any]) -> None:
        self._rows[key] = row
        append_row(self._path, key, row)

    def _key_of(self, case: Run) -> str:
        requests = self._burst_requests if case.load == "burst" else None
        return _hash([self._key, self.capacity_tok_s, case.policy, case.load, case.repeat, requests])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- Figures ------------------------------------------------------------------------------------------------


def summarise(
    runs: Sequence[Run], plan: LoadPlan, sample: Sequence[SamplePrompt], capacity_tok_s: float
) -> dict[str, Any]:
    """All figures of a sweep.

    `runs` has a row for each run, `means` one for each load and policy with ratios to arrival order and the
    gain captured, and `light` the paired ratios of TTFT and TPOT at loads below 1.
    """
    order = [(load, policy) for load in plan.all_loads for policy in plan.policies]
    by_load = sorted(runs, key=lambda run: (order.index((run.load, run.policy)), run.repeat))
    rows = [_row(run, capacity_tok_s) for run in by_load]
    return {
        "runs": rows,
        "means": means_of(rows),
        "light": _light(runs, plan),
        "policies": list(plan.policies),
        "loads": list(plan.all_loads),
        "requests": len(sample),
        "burst_requests": plan.burst_requests,
        "burst_lengths": BURST_LENGTHS,
        "repeats": plan.repeats,
        "capacity_tok_s": capacity_tok_s,
        "arrivals_sha256": arrivals_hash(
            sample, [SEED + repeat for repeat in range(plan.repeats)], plan.all_loads, plan.burst_requests
        ),
    }


def _row(run: Run, capacity_tok_s: float) -> dict[str, Any]:
    """The run's columns with the load offered and the load served, both up to the last arrival."""
    columns, last = run.columns(), max(request.arrival_s for request in run.requests)
    offered = sum(request.output_tokens for request in run.requests) / last / capacity_tok_s if last else None
    served = columns["throughput_to_last_arrival_tok_s"]
    return {**columns, "offered_load": offered and round(offered, 4),
            "achieved_load": served and round(served / capacity_tok_s, 4)}


def means_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each load and policy: means over repeats, `<column>_ratio` to arrival order, gains captured.

    Gains are of `fcfs` towards `oracle` at the same load, None where one of the three is missing or completed
    nothing, or where there is under 5 %.
    """
    groups: dict[tuple[Load, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["load"], row["policy"]), []).append(row)
    means = {key: _mean(group) for key, group in groups.items()}
    for (load, _), mean in means.items():
        base, best = (means.get((load, policy)) for policy in (BASELINE, ORACLE))
        for column in COMPARED:
            known = base is not None and base[column] and mean[column] is not None
            mean[f"{column}_ratio"] = round(mean[column] / base[column], 4) if known and base else None
        for name, column in GAINS.items():
            ends: list[Any] = [row and row[column] for row in (base, mean, best)]
            gain = None if None in ends else gain_captured(*ends)
            mean[name] = None if gain is None else round(gain, 4)
    return list(means.values())


def _mean(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {"load": group[0]["load"], "policy": group[0]["policy"], "repeats": len(group)}
    for column in group[0].keys() - {"load", "policy", "repeat", "stock"}:
        values = [row[column] for row in group if row[column] is not None]
        mean[column] = rounded(float(np.mean(values))) if values else None
    return mean


def _light(runs: Sequence[Run], plan: LoadPlan) -> list[dict[str, Any]]:
    light = [(load, policy) for load in plan.loads if load < 1 for policy in plan.policies
             if policy != BASELINE]
    return [
        {
            "load": load,
            "policy": policy,
            "ttft_ratio": paired_ratio(runs, policy, BASELINE, load, lambda r: r.time_to_first_token),
            "tpot_ratio": paired_ratio(runs, policy, BASELINE, load, lambda r: r.time_per_output_token),
        }
        for load, policy in light
    ]
