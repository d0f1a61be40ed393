"""What an order does to prefix-cache hits, and what knowing of them adds to the order.

    python -m bench.prefix_cache --traces conversation_trace.jsonl synthetic_trace.jsonl

Traces as Mooncake publishes them (github.com/kvcache-ai/Mooncake, FAST25-release/traces): their `hash_ids`
say what prompts share. Each is cut in pieces, one behind the other, which vLLM's own scheduler serves with
step times of an H100, at 1.2 of what it serves in arrival order when all requests wait from the start, and
noisy scores of a tau of 0.5. `blind` is `pars_fast` with every prompt counted whole.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pars_fast.bench_results import all_threads, machine
from pars_fast.errors import DataError
from pars_fast.output import write_csv
from pars_fast.policies import POLICIES, Policy
from pars_fast.policies.base import QueuedRequest
from pars_fast.policies.pars_fast import ParsFast
from pars_fast.simulation.columns import columns
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.faithful import simulate
from pars_fast.simulation.step_time import StepTime, load_profile
from pars_fast.simulation.study import PROFILE, TAU
from pars_fast.simulation.workload import Workload, at_load, read_trace, with_noisy_scores
from pars_fast.worker_pool import worker_pool

RESULTS = Path(__file__).parent / "results" / "simulation" / "prefix_cache.csv"
LOAD = 1.2
KV_CACHE_TOKENS = (400_000, 1_600_000)  # an H100 beside an 8B model, and four times as many
COLUMNS = ("mean_latency_per_token_s", "p99_latency_per_token_s", "mean_ttft_s", "mean_e2e_s", "p99_e2e_s",
           "max_wait_s", "preemptions", "prefix_hit_tokens")


class Blind(ParsFast):
    """`pars_fast` that does not ask what is cached."""

    def uncached_tokens(self, request: QueuedRequest) -> int:
        return request.num_prompt_tokens


ORDERS: dict[str, type[Policy]] = {
    **{name: POLICIES[name] for name in ("fcfs", "prompt_length", "pars_fast")},
    "blind": Blind,
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive requests of a trace, on one engine."""

    number: int
    workload: Workload
    engine: EngineSettings
    step_time: StepTime


def pieces(path: Path, count: int, requests: int) -> Iterator[Piece]:
    """The first `count` times `requests` requests of a trace, on engines of `KV_CACHE_TOKENS`.

    Raises: DataError: if the trace cannot be read, says nothing of what prompts share, or has too few.
    """
    trace = read_trace(path)
    if trace.hash_ids is None:
        raise DataError(f"{path}: has no hash_ids; take a .jsonl as Mooncake publishes them")
    if len(trace) < count * requests:
        raise DataError(f"{path}: {len(trace)} requests, not {count} times {requests}")
    step_time, engine = load_profile(PROFILE)
    for number in range(count):
        piece = trace.take(np.arange(number * requests, (number + 1) * requests))
        longest = int((piece.prompt_tokens + piece.output_tokens).max())
        scored = with_noisy_scores(piece, TAU, seed=number)
        for tokens in KV_CACHE_TOKENS:
            room = replace(
                engine, kv_cache_tokens=tokens, max_model_len=max(engine.max_model_len, longest)
            )
            yield Piece(number, scored, room, step_time)


def rows_of(piece: Piece) -> list[dict[str, Any]]:
    """A row for each order."""
    workload, engine, step_time = piece.workload, piece.engine, piece.step_time
    waiting = replace(workload, arrival_s=np.zeros(len(workload)))
    finished = simulate(waiting, "fcfs", None, engine, step_time).finished_s
    served = np.isfinite(finished)
    capacity = float(workload.output_tokens[served].sum() / finished[served].max())
    offered = at_load(workload, LOAD, capacity)
    rows = []
    for name, policy in ORDERS.items():
        result = columns(offered, simulate(offered, policy(), None, engine, step_time))
        rows.append({
            "workload": workload.name, "piece": piece.number, "requests": len(workload), "load": LOAD,
            "kv_cache_tokens": engine.kv_cache_tokens, "prompt_tokens": int(workload.prompt_tokens.sum()),
            "policy": name, **{column: result[column] for column in COLUMNS},
        })
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, nargs="+", required=True, metavar="F")
    parser.add_argument("--pieces", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1000, help="of each piece")
    parser.add_argument("--workers", type=int, help="processes (all cores)")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cut = [piece for path in arguments.traces for piece in pieces(path, arguments.pieces, arguments.requests)]
    rows = []
    with worker_pool(arguments.workers) as pool:
        for made in pool.map(rows_of, cut):
            rows += [{**row, **machine(all_threads())} for row in made]
            for row in made:
                print(row, flush=True)
    write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
