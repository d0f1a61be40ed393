"""Does the faithful simulator say what a real server showed? Its arrivals, served again in simulation.

`pars-fast demo` and `pars-fast load` name capacity and seed in their JSON, and the arrivals follow from them,
so the same requests arrive at the same times. The engine is the server's, and the step time is fitted to the
steps of each run: a machine does not have the same speed all day, and at the edge of saturation a few per
cent of it decide whether there is a queue at all. So how long a step takes is given; checked is all that is
made of steps: who is in them, how long the queue is, what a request waits. The ranker's delay, too, is the
one that the server measured in each run.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from pars_fast.demo.arrivals import LOADS, arrivals_hash, traffic
from pars_fast.demo.model import TINY
from pars_fast.demo.records import STEP_TIMES
from pars_fast.demo.run import expected_tokens, served_model
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.demo.scheduler_switch import parse_policy
from pars_fast.errors import DataError
from pars_fast.simulation.columns import columns
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.faithful import simulate
from pars_fast.simulation.step_log import MIN_STEPS
from pars_fast.simulation.step_time import StepTime
from pars_fast.simulation.workload import Workload, make_workload

BASELINE = "fcfs"
JUDGED = ("mean_e2e_s", "mean_latency_per_token_s")
COMPARED = (*JUDGED, "mean_ttft_s", "mean_tpot_s", "p99_e2e_s", "max_wait_s")
TOLERANCE = 0.15
_KEYS = {"runs", "capacity_tok_s", "seed", "repeats", "arrivals_sha256", "served_model", "engine_settings"}
_COLUMNS = {"stock", "policy", "load", "repeat", *STEP_TIMES, *COMPARED}  # of a run
BATCH_DELAY_S = 0.15  # where it was not measured: 4 prompts, on the fifth of a core that a full server leaves


def live_check(
    result: Mapping[str, Any], *, ranker: str, ranker_delay_s: float | None = None
) -> dict[str, Any]:
    """Compare the runs of a real server with their simulation.

    Args:
        result: what `read_result` gives.
        ranker_delay_s: None takes what each run measured, `BATCH_DELAY_S` where it did not.

    Returns: `{"rows": one for each load and policy, "columns": ..., "agrees": ...}`. A row has, for each of
        `COMPARED`, the live and the simulated mean over the repeats (`live_`, `simulated_`), the error of
        the latter as a ratio less 1, both ratios to `fcfs` (`_ratio`) and the error of the simulated one.
        `columns` has, by column, the largest error of a mean and of a ratio and how many rows are within
        `TOLERANCE`. `agrees` says whether there are rows and all are, of the `JUDGED` columns, in both.
    Raises: DataError: if the figures do not belong to the shipped sample, or a run has no step time.
    """
    sample = load_sample()
    burst_requests = result.get("burst_requests", 0)
    seeds = [result["seed"] + repeat for repeat in range(result["repeats"])]
    if arrivals_hash(sample, seeds, result.get("loads", LOADS), burst_requests) != result["arrivals_sha256"]:
        raise DataError("the arrivals are not those of the shipped sample; run `pars-fast demo` or "
                        "`pars-fast load` again")
    prompt_tokens = dict(zip((prompt.prompt for prompt in sample),
                             _prompt_tokens(result["served_model"], sample), strict=True))
    expected = dict(zip(prompt_tokens, expected_tokens(ranker, sample), strict=True))
    live = [row for row in result["runs"] if not row["stock"]]
    engine = EngineSettings(**result["engine_settings"])
    simulated = []
    for row in live:
        seed = result["seed"] + row["repeat"]
        prompts, arrivals = traffic(sample, row["load"], result["capacity_tok_s"], seed, burst_requests)
        workload: Workload = make_workload(
            "live", arrivals, [prompt_tokens[prompt.prompt] for prompt in prompts],
            [prompt.output_tokens for prompt in prompts], [expected[prompt.prompt] for prompt in prompts])
        if (step_time := step_time_of(row)) is None:
            raise DataError(f"load {row['load']}, {row['policy']}: fewer than {MIN_STEPS} steps, too few to "
                            "know how long they take; serve more requests")
        delay = row.get("mean_score_latency_s") if ranker_delay_s is None else ranker_delay_s
        name, guard = parse_policy(row["policy"])
        served = simulate(workload, name, guard, engine, step_time,
                          ranker_delay_s=BATCH_DELAY_S if delay is None else delay)
        simulated.append(columns(workload, served))
    rows = compare(live, simulated)
    summary = {column: _judge(rows, column) for column in COMPARED}
    within = all(summary[column][f"{kind}_within"] == summary[column][f"{kind}_rows"]
                 for column in JUDGED for kind in ("mean", "ratio"))
    return {"rows": rows, "columns": summary, "tolerance": TOLERANCE, "agrees": bool(rows) and within}


def step_time_of(row: Mapping[str, Any]) -> StepTime | None:
    """How long the steps of a real run took, None where they were too few for a fit."""
    times = {name: row[name] for name in STEP_TIMES}
    return None if None in times.values() else StepTime(**times, source="the run itself")


def read_result(path: Path) -> dict[str, Any]:
    """What `pars-fast demo --json` or `pars-fast load --json` wrote.

    Raises: DataError: if it is something else, or was written by a version whose runs had fewer columns.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        missing = _KEYS - result.keys()
        runs = [] if missing else [row for row in result["runs"] if not row.get("stock")]
        missing_columns = {column for row in runs for column in _COLUMNS - row.keys()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not what `pars-fast demo` or `load` wrote ({error})") from error
    if missing:
        raise DataError(f"{path}: not what `pars-fast demo` or `load` wrote (no {sorted(missing)[0]})")
    if missing_columns:
        raise DataError(f"{path}: a run has no {sorted(missing_columns)[0]}, as in a file of an earlier "
                        "version; run `pars-fast demo` or `pars-fast load` again")
    return result


def _prompt_tokens(served: str, sample: Sequence[SamplePrompt]) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        model = served_model(None if served.startswith(TINY) else served, Path(folder), sample).model
        tokenizer = AutoTokenizer.from_pretrained(model)
        return [len(ids) for ids in tokenizer([prompt.prompt for prompt in sample])["input_ids"]]


def compare(
    live: Sequence[Mapping[str, Any]], simulated: Sequence[Mapping[str, Any]],
    compared: Sequence[str] = COMPARED,
) -> list[dict[str, Any]]:
    """A row for each load and policy of `live`, whose runs `simulated` has in the same order.

    Of each of the columns `compared` it has what `live_check` says of its rows.
    """
    groups: dict[tuple[Any, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for real, model in zip(live, simulated, strict=True):
        groups.setdefault((real["load"], real["policy"]), []).append((real, model))
    means = {
        key: {column: tuple(_mean([run[side][column] for run in runs]) for side in (0, 1))
              for column in compared}
        for key, runs in groups.items()
    }
    rows = []
    for (load, policy), of in means.items():
        row: dict[str, Any] = {"policy": policy, "load": load}
        for column, (lived, modelled) in of.items():
            base = means.get((load, BASELINE), {}).get(column, (None, None))
            ratios = _over(lived, base[0]), _over(modelled, base[1])
            row |= {
                f"live_{column}": lived,
                f"simulated_{column}": modelled,
                f"{column}_error": _less_one(_over(modelled, lived)),
                f"live_{column}_ratio": ratios[0],
                f"simulated_{column}_ratio": ratios[1],
                f"{column}_ratio_error": _less_one(_over(ratios[1], ratios[0])),
            }
        rows.append(row)
    return rows


def _judge(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, Any]:
    """Means are judged in all rows, and one that is missing is not within the tolerance; ratios in those that
    have one and are not arrival order's own."""
    means = [row[f"{column}_error"] for row in rows]
    ratios = [row[f"{column}_ratio_error"] for row in rows if row["policy"] != BASELINE]
    judged: dict[str, Any] = {}
    for kind, errors in (("mean", means), ("ratio", [error for error in ratios if error is not None])):
        known = [abs(error) for error in errors if error is not None]
        judged |= {f"worst_{kind}_error": max(known, default=None), f"{kind}_rows": len(errors),
                   f"{kind}_within": sum(error <= TOLERANCE for error in known)}
    return judged


def _mean(values: Sequence[Any]) -> float | None:
    """None if one is missing: the other side's mean would be over other repeats."""
    return None if None in values else float(np.mean(values))


def _over(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _less_one(ratio: float | None) -> float | None:
    return None if ratio is None else ratio - 1
