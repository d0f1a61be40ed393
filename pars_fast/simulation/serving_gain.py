"""What a predictor's order is worth in serving: the gain it captures, beside its tau on the same requests.

Real prompts of the held-out splits arrive at a trace's times with a model's real answer lengths, and the fast
simulator serves them under each predictor's order, with this project's guard and without any. A score is
there at once, so that nothing but the order is compared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pars_fast.baselines import Predictor
from pars_fast.benchmark import MIN_ROWS, held_out_rows
from pars_fast.data import LengthFile
from pars_fast.errors import DataError
from pars_fast.guards import NoGuard, PassingLimit, guard_text
from pars_fast.simulation.command import real_tau
from pars_fast.simulation.step_time import load_profile
from pars_fast.simulation.sweep import Case, make_setup, run_case, with_gains
from pars_fast.simulation.workload import Workload, from_lengths

MIXED = "mixed"  # all files in equal shares: what one queue of many kinds of prompts holds
PERFECT = "perfect"  # knows every length
PROFILE = "h100_llama_3_1_8b"
ORDER = "pars"  # by the answer alone, so that a predictor gains by what it knows of answers and nothing else
GUARDS = (guard_text(PassingLimit()), guard_text(NoGuard()))
_SERVED = "served"  # the model column of a workload's file
_MEASURES = ("gain_captured", "gain_captured_e2e", "mean_latency_per_token_s", "mean_e2e_s", "p99_e2e_s",
             "max_wait_s")

Expected = Mapping[str, float]  # tokens, by prompt


def serving_gain(
    files: Sequence[LengthFile],
    predictors: Mapping[str, Predictor],
    traces: Sequence[Workload],
    *,
    loads: Sequence[float] = (1.0, 1.2),
    seeds: Sequence[int] = (0, 1, 2),
    requests: int = 3000,
    max_prompts_per_file: int = 120,
    on_progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Every predictor on every file and on all of them mixed, mean over traces and seeds.

    A seed draws the prompts, and for each file the model whose lengths are served.

    Returns: rows of workload, load, predictor (`fcfs` and `PERFECT` among them) and guard, with `runs`, the
        mean of `tau` and of the gains and latencies, and the spread of the gains over runs. A gain is None
        where an oracle gains under 5 % in every run.
    Raises: DataError: if a trace has too few requests, or no file can be measured.
    """
    held_out = [_held_out(file, max_prompts_per_file) for file in files]
    held_out = [file for file in held_out if _rankable(file)]
    if not held_out:
        raise DataError("no file has a test or val split with lengths to rank")
    prompts = list(dict.fromkeys(row.prompt for file in held_out for row in file.rows))
    expected: dict[str, Expected] = {}
    for name, predictor in predictors.items():
        on_progress(f"scoring {len(prompts)} prompts by {name}")
        expected[name] = dict(zip(prompts, _expected_tokens(predictor, prompts).tolist(), strict=True))
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        served = _served(held_out, seed, max_prompts_per_file)
        for file in served:
            on_progress(f"serving {file.name}, seed {seed}")
            for trace in traces:
                rows += _runs(file, trace, expected, loads, seed, requests)
    return _means(rows)


def print_gains(rows: Sequence[Mapping[str, Any]]) -> None:
    """Predictors by load and guard: on the mixed requests, and mean over the single files."""
    loads = list(dict.fromkeys(row["load"] for row in rows))
    predictors = dict.fromkeys(row["predictor"] for row in rows if row["predictor"] != "fcfs")
    files = {row["workload"] for row in rows}
    for title, chosen in (("all files mixed", {MIXED}), ("mean over single files", files - {MIXED})):
        for guard in GUARDS:
            gains = [f"{what}, load {load:g}" for load in loads for what in ("per token", "end to end")]
            table = Table("predictor", "tau", *gains, title=f"gain captured, {title}, guard {guard}")
            for name in predictors:
                of = [row for row in rows
                      if (row["predictor"], row["guard"]) == (name, guard) and row["workload"] in chosen]
                cells = [_cell([row[measure] for row in of if row["load"] == load], "{:.0%}")
                         for load in loads for measure in ("gain_captured", "gain_captured_e2e")]
                table.add_row(name, _cell([row["tau"] for row in of], "{:.3f}"), *cells)
            Console().print(table)


def _cell(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(np.mean(known)) if known else "-"


def _held_out(file: LengthFile, most: int) -> LengthFile:
    rows, _ = held_out_rows(file)
    kept = np.sort(np.random.default_rng(0).permutation(len(rows))[:most])
    return replace(file, rows=tuple(rows[i] for i in kept))


def _rankable(file: LengthFile) -> list[str]:
    """The models with enough answers, not all of one length."""
    lengths = {model: [row.output_tokens[model] for row in file.rows if model in row.output_tokens]
               for model in file.models}
    return [model for model, of in lengths.items() if len(of) >= MIN_ROWS and len(set(of)) > 1]


def _expected_tokens(predictor: Predictor, prompts: Sequence[str]) -> NDArray[np.float64]:
    """As a server has them; without a map any rising positive function of the score gives the order."""
    scores = predictor.score(prompts).double().numpy()
    return np.exp(scores) if predictor.token_map is None else predictor.token_map(scores)


def _served(files: Sequence[LengthFile], seed: int, share: int) -> list[LengthFile]:
    """Each file with one model's lengths, then all of them together, `share` rows of each."""
    single = []
    for index, file in enumerate(files):
        model = np.random.default_rng((seed, index)).choice(_rankable(file))
        rows = tuple(replace(row, output_tokens={_SERVED: row.output_tokens[model]})
                     for row in file.rows if model in row.output_tokens)
        single.append(replace(file, rows=rows))
    mixed = tuple(file.rows[i % len(file.rows)] for file in single for i in range(share))
    return [*single, replace(single[0], name=MIXED, rows=mixed)] if len(single) > 1 else single


def _runs(file: LengthFile, trace: Workload, expected: Mapping[str, Expected], loads: Sequence[float],
          seed: int, requests: int) -> Iterator[dict[str, Any]]:
    step_time, engine = load_profile(PROFILE)
    workload = from_lengths(file, _SERVED, requests, seed=seed, arrivals=trace)
    setup = make_setup({seed: workload}, engine, step_time)
    scored = {name: from_lengths(file, _SERVED, requests, seed=seed, arrivals=trace,
                                 scorer=lambda prompts, of=of: [of[prompt] for prompt in prompts])
              for name, of in expected.items()}
    rows = []
    for load in loads:
        rows.append({"predictor": "fcfs", **run_case(setup, Case("fcfs", NoGuard.name, load, seed))})
        for guard in GUARDS:
            rows.append({"predictor": PERFECT, "tau": 1.0}
                        | _without_tau(run_case(setup, Case("oracle", guard, load, seed))))
            for name, with_scores in scored.items():
                case = Case(ORDER, guard, load, seed)
                served = run_case(replace(setup, workloads={seed: with_scores}), case)
                rows.append({"predictor": name} | _without_tau(served) | {"tau": real_tau(with_scores)})
    for row in with_gains(rows):
        yield {**row, "workload": file.name}


def _without_tau(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "tau"}  # the case's: of noisy scores


def _means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def group(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["workload"], row["load"], row["guard"], row["predictor"]

    order = {group(row): place for place, row in reversed(list(enumerate(rows)))}
    means = []
    for key, members in groupby(sorted(rows, key=lambda row: order[group(row)]), key=group):
        runs = list(members)
        mean: dict[str, Any] = dict(zip(("workload", "load", "guard", "predictor"), key, strict=True))
        mean["runs"] = len(runs)
        for name in ("tau", *_MEASURES):
            values = [run[name] for run in runs if run[name] is not None]
            mean[name] = float(f"{np.mean(values):.4g}") if values else None
            if name.startswith("gain"):
                mean[f"{name}_std"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
        means.append(mean)
    return means
