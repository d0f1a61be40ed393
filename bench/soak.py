"""Twenty minutes above capacity: does memory stay flat, and does every request get its tokens?

    python -m bench.soak --minutes 20 --load 1.2 --json out/soak.json

A real server of the demo's tiny model with the ranker, recording and calibration on. Its capacity is measured
first in a closed loop; then requests arrive at `load` times that for so long, in a Poisson process, and a
share of the users hangs up after a moment. Every few seconds the resident memory of all processes of the
server is noted. Fails if a request that was not aborted lacks a token, or if memory grew by more than
`--max-growth` from the first half's end to the last sample.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from pars_fast.demo.client import closed_loop_capacity
from pars_fast.demo.model import make_tiny_model
from pars_fast.demo.sample import SamplePrompt, load_sample
from pars_fast.demo.server import read_metrics, vllm_server
from pars_fast.output import write_json

SEATS = 16
SAMPLE_EVERY_S = 5.0
ARGUMENTS = ["--enforce-eager", "--max-num-seqs", str(SEATS), "--max-model-len", "2048"]


@dataclass(slots=True)
class Tally:
    """What became of the requests, and memory in MiB by time in s."""

    completed: int = 0
    aborted: int = 0
    wrong: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=1.2, help="offered tokens over capacity (%(default)s)")
    parser.add_argument("--abort-share", type=float, default=0.2, help="users that hang up (%(default)s)")
    parser.add_argument("--max-output-tokens", type=int, default=64, help="longer answers are cut to it")
    parser.add_argument("--max-growth", type=float, default=0.05, help="of memory, as a share (%(default)s)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sample = [
        replace(prompt, output_tokens=min(prompt.output_tokens, arguments.max_output_tokens))
        for prompt in load_sample()
        if len(prompt.prompt) < 3000
    ]
    with tempfile.TemporaryDirectory() as name:
        report = _soak(Path(name), sample, arguments)
    print(json.dumps({key: value for key, value in report.items() if key != "memory_mib"}, indent=2))
    if arguments.json:
        write_json(arguments.json, report)
    return int(report["wrong"] > 0 or report["memory_growth"] > arguments.max_growth)


def _soak(folder: Path, sample: list[SamplePrompt], arguments: argparse.Namespace) -> dict[str, Any]:
    make_tiny_model(folder / "model", [prompt.prompt for prompt in sample])
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
    late = [mib for second, mib in tally.memory if second >= 60 * arguments.minutes / 2]
    return {
        "minutes": arguments.minutes,
        "load": arguments.load,
        "capacity_tok_s": capacity,
        "arrivals_per_s": rate,
        "completed": tally.completed,
        "aborted": tally.aborted,
        "wrong": tally.wrong,
        "memory_growth": late[-1] / late[0] - 1 if late else None,
        "memory_mib": tally.memory,
        "recorded_bytes": None if not (folder / "lengths.jsonl").exists()
        else (folder / "lengths.jsonl").stat().st_size,
        "errors_logged": log.count("ERROR"),
        "counters": counters,
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
    except (aiohttp.ClientError, KeyError):
        tally.wrong += 1
    else:
        tally.completed += made == prompt.output_tokens
        tally.wrong += made != prompt.output_tokens


async def _watch_memory(tally: Tally, start: float) -> None:
    while True:
        tally.memory.append((time.perf_counter() - start, _resident_mib(os.getpid())))
        await asyncio.sleep(SAMPLE_EVERY_S)


def _resident_mib(root: int) -> float:
    """Resident memory of all descendants of a process."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                pages[int(entry.name)] = int(fields[21])
    total = 0
    for pid in pages:
        ancestor = parents.get(pid)
        while ancestor and ancestor != root:
            ancestor = parents.get(ancestor)
        total += pages[pid] if ancestor == root else 0
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
