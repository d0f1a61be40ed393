"""Below saturation, does a server with pars-fast answer as fast as stock vLLM?

    python -m bench.light_load --json out/light_load.json  # an hour

A real server of the demo's model, whose scheduler becomes vLLM's own and the ranked one by turns
(`stock_switch.py`). In a round each gets the same requests at the same times, some seconds of them, at half
the capacity; who is first changes from round to round. A machine whose speed drifts does so for both, if
rounds are short; longer ones were seen to scatter no less, so many short ones tell more.

A ratio is that of the means of a round, to stock; given are the geometric mean over the rounds and its 95 %
interval (Student's t on logarithms). The CSV has a row for each, the JSON every round.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bench.stock_switch import KIND_VARIABLE, RANKED, STOCK
from pars_fast.bench_results import all_threads, machine
from pars_fast.demo.arrivals import BURST_LENGTHS, LOADS, arrival_times
from pars_fast.demo.display import Display
from pars_fast.demo.records import Run
from pars_fast.demo.run import measure_capacity, rotated, serve_run, served_model, warm_up
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.demo.server import vllm_server
from pars_fast.errors import make_writable
from pars_fast.output import write_csv, write_json

RESULTS = Path(__file__).parent / "results" / "light_load.csv"
KINDS = (STOCK, RANKED)
LOAD = LOADS["light"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=600, help="at least 2 (%(default)s)")
    parser.add_argument("--requests", type=int, default=10, help="of a round (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="every round")
    parser.add_argument("--csv", type=Path, metavar="F", default=RESULTS,
                        help="a row for each scheduler (bench/results/light_load.csv)")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.requests < 2:
        parser.error("an interval takes two rounds, and a round two requests")
    for path in filter(None, (arguments.csv, arguments.json)):
        make_writable(path.parent)  # minutes before it is written
    with tempfile.TemporaryDirectory(prefix="pars-fast-light-") as folder, Display() as display:
        capacity_tok_s, runs = _serve(Path(folder), arguments, display)
    conditions = {"load": LOAD, "capacity_tok_s": round(capacity_tok_s, 1),
                  **machine(all_threads())}
    rows = [{**row, **conditions} for row in summarise(runs)]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items() if name not in conditions))
    if arguments.json:
        write_json(arguments.json, {"schedulers": rows, "rounds": [run.columns() for run in runs]})
    write_csv(arguments.csv, rows)
    return int(any(row["completed"] < row["requests"] for row in rows))


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each scheduler: means over the rounds, s, and their ratios to stock with intervals."""
    ttft_s, tpot_s = (_by_kind(runs, column) for column in ("mean_ttft_s", "mean_tpot_s"))
    rows = []
    for kind in KINDS:
        served = [run for run in runs if run.policy == kind]
        row: dict[str, Any] = {"scheduler": kind, "rounds": len(served)}
        for name, means in (("ttft", ttft_s), ("tpot", tpot_s)):
            ratio, low, high = ratio_interval(means[kind], means[STOCK])
            row |= {f"mean_{name}_s": round(float(means[kind].mean()), 5), f"{name}_ratio": round(ratio, 4),
                    f"{name}_ratio_low": round(low, 4), f"{name}_ratio_high": round(high, 4)}
        requests = [request for run in served for request in run.requests]
        rows.append({**row, "requests": len(requests), "completed": sum(r.completed for r in requests),
                     "scored_total": sum(run.scored_total for run in served),
                     "fallback_total": sum(run.fallback_total for run in served)})
    return rows


def _by_kind(runs: Sequence[Run], column: str) -> dict[str, NDArray[np.float64]]:
    """The column of each scheduler's rounds, in their order."""
    rounds = sorted(runs, key=lambda run: run.repeat)
    return {kind: np.array([run.columns()[column] for run in rounds if run.policy == kind], np.float64)
            for kind in KINDS}


def ratio_interval(means: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float, float]:
    """(geometric mean of means / base, low and high end of its 95 % interval); both (n,), n >= 2, paired."""
    logs = np.log(means / base)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return float(np.exp(logs.mean())), float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def _serve(folder: Path, arguments: argparse.Namespace, display: Display) -> tuple[float, list[Run]]:
    """(capacity in tokens/s, every round under either scheduler)"""
    sample = [replace(prompt, output_tokens=max(2, round(BURST_LENGTHS * prompt.output_tokens)))
              for prompt in load_sample()]  # shorter, so that a round of few seconds has many requests
    served, kind_file = served_model(None, folder, sample), folder / "kind"
    kind_file.write_text(STOCK)
    environment = {**served.environment, "PARS_ENABLE": "1", KIND_VARIABLE: str(kind_file)}
    flags = [*served.arguments, "--scheduler-cls", "bench.stock_switch.RankedKind"]
    with vllm_server(served.model, flags, environment, folder / "log.txt") as url:
        warm_up(url, served, sample, display)
        capacity_tok_s = measure_capacity(url, served, sample, display)
        runs = []
        for number in range(arguments.rounds):
            prompts = _drawn(sample, arguments.requests, number)
            arrivals = arrival_times(prompts, LOAD, capacity_tok_s, number)
            for kind in rotated(KINDS, number):
                kind_file.write_text(kind)
                case = Run(kind, LOAD, number, ())
                runs.append(serve_run(url, served, case, prompts, arrivals, display))
    return capacity_tok_s, runs


def _drawn(sample: Sequence[SamplePrompt], requests: int, seed: int) -> list[SamplePrompt]:
    return [sample[i] for i in np.random.default_rng(seed).integers(len(sample), size=requests)]


if __name__ == "__main__":
    sys.exit(main())
