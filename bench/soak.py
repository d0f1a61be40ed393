"""Twenty minutes above capacity: does memory stay flat, and does every request get its tokens?

    python -m bench.soak --minutes 20 --load 1.2 --json out/soak.json --csv bench/results/soak.csv

A real server of the demo's tiny model, as deep as in the demo, with the ranker, recording and calibration on.
Its capacity is measured first in a closed loop; then requests arrive at `load` times that for so long, in a
Poisson process, and a share of the users hangs up after a moment. The queue grows all the time, and
`ulimit -n` bounds how many can wait. Every few seconds the resident memory of each process of the server is
noted. Fails if a request that was not aborted lacks a token, or if the engine's or the ranker's memory grew
by more than `--max-growth` from the third quarter of the time to the last. The CSV has a row for each
process, and the machine.
"""

import argparse
import asyncio
import contextlib
import csv
import math
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from pars_fast.bench_results import all_threads, machine
from pars_fast.demo.client import closed_loop_capacity
from pars_fast.demo.model import NUM_LAYERS, make_tiny_model
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.demo.server import read_metrics, vllm_server
from pars_fast.errors import make_writable
from pars_fast.output import write_json

SEATS = 16
SAMPLE_EVERY_S = 5.0
SAY_EVERY_S = 60.0
PROCESSES = {  # by what their command line has; the first that fits
    "ranker_process": "ranker", "EngineCore": "engine", "VLLM::Worker": "engine", "api_server": "api server",
}
ARGUMENTS = ["--enforce-eager", "--max-num-seqs", str(SEATS), "--max-model-len", "2048"]


@dataclass(slots=True)
class Tally:
    """What became of the requests, and (seconds, MiB by process)."""

    completed: int = 0
    aborted: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # of the wrong ones, by their kind
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=1.2, help="offered tokens over capacity (%(default)s)")
    parser.add_argument("--abort-share", type=float, default=0.2, help="users that hang up (%(default)s)")
    parser.add_argument("--max-output-tokens", type=int, default=64, help="longer answers are cut to it")
    parser.add_argument("--max-growth", type=float, default=0.05, help="of memory, as a share (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="all figures, and memory over time")
    parser.add_argument("--csv", type=Path, metavar="F", help="a row for each process")
    arguments = parser.parse_args()
    for path in filter(None, (arguments.json, arguments.csv)):
        make_writable(path.parent)  # minutes before it is written
    sample = [
        replace(prompt, output_tokens=min(prompt.output_tokens, arguments.max_output_tokens))
        for prompt in load_sample()
        if len(prompt.prompt) < 3000
    ]
    with tempfile.TemporaryDirectory() as name:
        report = _soak(Path(name), sample, arguments)
    _show(report)
    if arguments.json:
        write_json(arguments.json, report)
    if arguments.csv:
        _write_csv(arguments.csv, report)
    grown = any(growth > arguments.max_growth for process in ("engine", "ranker")
                if (growth := report["processes"].get(process, {}).get("growth")) is not None)
    return int(report["wrong"] > 0 or grown)


def _show(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if name == "counters":
            for counter, count in value.items():
                print(f"{counter}: {count:,.6g}")
        elif name == "processes":
            for process, figures in value.items():
                said = (f"{figure} {number:.5g}" for figure, number in figures.items())
                print(f"{process}: {', '.join(said)}")
        elif name != "memory_mib":
            print(f"{name}: {value:,.6g}" if isinstance(value, float) else f"{name}: {value}")


def _write_csv(path: Path, report: dict[str, Any]) -> None:
    """A row for each process, with the figures of the whole and the machine."""
    shown = {name: value for name, value in report.items()
             if name not in ("processes", "memory_mib", "counters", "machine")}
    rows = [{"process": process, **figures, **shown, **report["counters"], **report["machine"]}
            for process, figures in report["processes"].items()]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def of_process(memory: list[tuple[float, dict[str, float]]], process: str) -> dict[str, float]:
    """Its memory when load began, at the end and at most, MiB, and its growth from the third quarter of the
    samples to the last: a ratio less 1."""
    mib = np.array([sample.get(process, 0.0) for _, sample in memory])
    figures = {"mib_start": mib[0], "mib_end": mib[-1], "mib_max": mib.max()}
    if len(mib) >= 4:
        third, last = mib[len(mib) // 2 : 3 * len(mib) // 4].mean(), mib[3 * len(mib) // 4 :].mean()
        figures["growth"] = last / third - 1 if third else 0.0
    return {name: round(float(value), 5) for name, value in figures.items()}


def _soak(folder: Path, sample: list[SamplePrompt], arguments: argparse.Namespace) -> dict[str, Any]:
    make_tiny_model(folder / "model", [prompt.prompt for prompt in sample], NUM_LAYERS)
    variables = {"PARS_ENABLE": "1", "PARS_RECORD": str(folder / "lengths.jsonl"), "HF_HUB_OFFLINE": "1",
                 "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    model = str(folder / "model")
    with vllm_server(model, ARGUMENTS, variables, folder / "log.txt") as url:
        closed_loop_capacity(url, model, sample[:SEATS], SEATS, lambda: None)  # warm
        capacity = closed_loop_capacity(url, model, sample, 2 * SEATS, lambda: None)
        mean_tokens = sum(prompt.output_tokens for prompt in sample) / len(sample)
        rate = arguments.load * capacity / mean_tokens
        tally = asyncio.run(_serve(url, model, sample, rate, arguments))
        counters = {name: value for name, value in read_metrics(url).items() if name.startswith("pars_")
                    and not name.endswith("_bucket") and not math.isnan(value)}
        log = (folder / "log.txt").read_text(errors="replace")
    return {
        "minutes": arguments.minutes,
        "load": arguments.load,
        "capacity_tok_s": round(capacity, 1),
        "arrivals_per_s": round(rate, 2),
        "completed": tally.completed,
        "aborted": tally.aborted,
        "wrong": tally.wrong,
        "errors": "; ".join(f"{count} {error}" for error, count in tally.errors.items()),
        "recorded_bytes": None if not (folder / "lengths.jsonl").exists()
        else (folder / "lengths.jsonl").stat().st_size,
        "errors_logged": log.count("ERROR"),
        "processes": {process: of_process(tally.memory, process)
                      for process in dict.fromkeys(PROCESSES.values())},
        "counters": counters,
        "machine": machine(all_threads()),
        "memory_mib": tally.memory,
    }


async def _serve(
    url: str, model: str, sample: list[SamplePrompt], rate: float, arguments: argparse.Namespace
) -> Tally:
    rng, tally = np.random.default_rng(0), Tally()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start = time.perf_counter()
        memory = asyncio.create_task(_watch_memory(tally, start))
        under_way: set[asyncio.Task[None]] = set()
        due = start
        while (due := due + rng.exponential(1 / rate)) < start + 60 * arguments.minutes:
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            prompt = sample[rng.integers(len(sample))]
            patience_s = rng.exponential(0.5) if rng.random() < arguments.abort_share else None
            task = asyncio.create_task(_one(session, url, model, prompt, patience_s, tally))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
        memory.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await memory
    return tally


async def _one(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: SamplePrompt,
    patience_s: float | None,
    tally: Tally,
) -> None:
    body = {"model": model, "prompt": prompt.prompt, "max_tokens": prompt.output_tokens, "ignore_eos": True}
    try:
        async with asyncio.timeout(patience_s), session.post(f"{url}/v1/completions", json=body) as response:
            made = (await response.json())["usage"]["completion_tokens"]
    except TimeoutError:
        tally.aborted += patience_s is not None
        tally.wrong += patience_s is None
    except (aiohttp.ClientError, KeyError) as error:
        tally.wrong += 1
        tally.errors[f"{type(error).__name__} {error}"] += 1
    else:
        tally.completed += made == prompt.output_tokens
        tally.wrong += made != prompt.output_tokens


async def _watch_memory(tally: Tally, start: float) -> None:
    said = 0.0
    while True:
        second = time.perf_counter() - start
        tally.memory.append((round(second, 1), _resident_mib(os.getpid())))
        if second >= said:
            said += SAY_EVERY_S
            memory = ", ".join(f"{process} {mib:.0f} MiB" for process, mib in tally.memory[-1][1].items())
            print(f"{second / 60:.0f} min: {tally.completed} completed, {tally.aborted} aborted, "
                  f"{tally.wrong} wrong; {memory}", flush=True)
        await asyncio.sleep(SAMPLE_EVERY_S)


def _resident_mib(root: int) -> dict[str, float]:
    """Resident memory of the descendants of a process, by what they are."""
    parents: dict[int, int] = {}
    resident: dict[int, tuple[str, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_text()
                mib = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
                parents[int(entry.name)], resident[int(entry.name)] = int(fields[1]), (command, mib)
    total = dict.fromkeys(PROCESSES.values(), 0.0)
    for pid, (command, mib) in resident.items():
        ancestor = parents.get(pid)
        while ancestor and ancestor != root:
            ancestor = parents.get(ancestor)
        process = next((name for part, name in PROCESSES.items() if part in command), None)
        if ancestor == root and process is not None:
            total[process] += mib
    return {process: round(mib, 1) for process, mib in total.items()}


if __name__ == "__main__":
    sys.exit(main())
