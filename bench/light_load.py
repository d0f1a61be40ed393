"""Below saturation, does a server with pars-fast answer as fast as one without?

    python -m bench.light_load --json out/light_load.json

Three real servers of the demo's model are up at once: one with pars-fast, stock vLLM, and stock vLLM again,
which shows what chance does. All but the one that is served are idle. In a round each gets the same requests
at the same times, some seconds of them, at half the capacity; who is first changes from round to round. A
machine whose speed drifts over minutes does so for all three, which runs of minutes cannot rid themselves of.

A ratio is that of the means of a round, to stock; given are the geometric mean over the rounds and its 95 %
interval (Student's t on logarithms). The CSV has a row for each server, the JSON every round.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pars_fast.bench_results import all_threads, machine
from pars_fast.demo.arrivals import BURST_LENGTHS, arrival_times
from pars_fast.demo.display import Display
from pars_fast.demo.records import Run
from pars_fast.demo.run import Served, measure_capacity, serve_run, served_model, warm_up
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.demo.server import vllm_server
from pars_fast.errors import make_writable
from pars_fast.output import write_csv, write_json

RESULTS = Path(__file__).parent / "results" / "light_load.csv"
STOCK = "stock"
SERVERS: Mapping[str, Mapping[str, str]] = {  # what each has in its environment
    "pars_fast": {"PARS_ENABLE": "1"}, STOCK: {}, "stock_again": {},
}
ORDERS = tuple(itertools.permutations(SERVERS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="at least 2, best by sixes (%(default)s)")
    parser.add_argument("--requests", type=int, default=40, help="of a round (%(default)s)")
    parser.add_argument("--load", type=float, default=0.5, help="offered tokens over capacity (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="every round")
    parser.add_argument("--csv", type=Path, metavar="F", default=RESULTS,
                        help="a row for each server (bench/results/light_load.csv)")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.requests < 2:
        parser.error("an interval takes two rounds, and a round two requests")
    for path in filter(None, (arguments.csv, arguments.json)):
        make_writable(path.parent)  # minutes before it is written
    with tempfile.TemporaryDirectory(prefix="pars-fast-light-") as folder, Display() as display:
        capacity_tok_s, runs = _serve(Path(folder), arguments, display)
    conditions = {"load": arguments.load, "capacity_tok_s": round(capacity_tok_s, 1),
                  **machine(all_threads())}
    rows = [{**row, **conditions} for row in summarise(runs)]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items() if name not in conditions))
    if arguments.json:
        write_json(arguments.json, {"servers": rows, "rounds": [run.columns() for run in runs]})
    write_csv(arguments.csv, rows)
    return int(any(row["completed"] < row["requests"] for row in rows))


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each server: means over the rounds, s, and their ratios to stock with intervals."""
    ttft_s, tpot_s = (by_server(runs, column) for column in ("mean_ttft_s", "mean_tpot_s"))
    rows = []
    for server in SERVERS:
        served = [run for run in runs if run.policy == server]
        row: dict[str, Any] = {"server": server, "rounds": len(served)}
        for name, means in (("ttft", ttft_s), ("tpot", tpot_s)):
            ratio, low, high = ratio_interval(means[server], means[STOCK])
            row |= {f"mean_{name}_s": round(float(means[server].mean()), 5), f"{name}_ratio": round(ratio, 4),
                    f"{name}_ratio_low": round(low, 4), f"{name}_ratio_high": round(high, 4)}
        requests = [request for run in served for request in run.requests]
        rows.append({**row, "requests": len(requests), "completed": sum(r.completed for r in requests),
                     "scored_total": sum(run.scored_total for run in served),
                     "fallback_total": sum(run.fallback_total for run in served)})
    return rows


def by_server(runs: Sequence[Run], column: str) -> dict[str, NDArray[np.float64]]:
    """The column of each server's rounds, in their order."""
    rounds = sorted(runs, key=lambda run: run.repeat)
    return {server: np.array([run.columns()[column] for run in rounds if run.policy == server], np.float64)
            for server in SERVERS}


def ratio_interval(means: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float, float]:
    """(geometric mean of means / base, low and high end of its 95 % interval); both (n,), n >= 2, paired."""
    logs = np.log(means / base)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return float(np.exp(logs.mean())), float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def _serve(folder: Path, arguments: argparse.Namespace, display: Display) -> tuple[float, list[Run]]:
    """(capacity in tokens/s, every round of every server)"""
    sample = [replace(prompt, output_tokens=max(2, round(BURST_LENGTHS * prompt.output_tokens)))
              for prompt in load_sample()]  # shorter, so that a round of few seconds has many requests
    served = served_model(None, folder, sample)
    with contextlib.ExitStack() as stack:
        urls = {server: stack.enter_context(_server(served, server, folder)) for server in SERVERS}
        for url in urls.values():
            warm_up(url, served, sample, display)
        capacity_tok_s = measure_capacity(urls[STOCK], served, sample, display)
        runs = []
        for number in range(arguments.rounds):
            prompts = _drawn(sample, arguments.requests, number)
            arrivals = arrival_times(prompts, arguments.load, capacity_tok_s, number)
            for server in ORDERS[number % len(ORDERS)]:
                case = Run(server, arguments.load, number, ())
                runs.append(serve_run(urls[server], served, case, prompts, arrivals, display))
    return capacity_tok_s, runs


def _server(served: Served, server: str, folder: Path) -> contextlib.AbstractContextManager[str]:
    environment = {**served.environment, **SERVERS[server]}
    return vllm_server(served.model, served.arguments, environment, folder / f"{server}.log")


def _drawn(sample: Sequence[SamplePrompt], requests: int, seed: int) -> list[SamplePrompt]:
    return [sample[i] for i in np.random.default_rng(seed).integers(len(sample), size=requests)]


if __name__ == "__main__":
    sys.exit(main())
