"""`pars-fast replay`: heavy imports inside the command."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pars_fast.errors import ParsFastError, make_writable, require_extra
from pars_fast.output import write_json

if TYPE_CHECKING:
    from pars_fast.simulation.replay import Replay

_SHOWN = ("mean_e2e_s", "mean_latency_per_token_s", "mean_completion_s", "p99_completion_s")


def add_replay(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    trace = ("arrival_s,prompt_tokens,output_tokens[,score][,app], or .jsonl as Mooncake's, whose prompts "
             "share prefixes")
    add("--trace", type=Path, required=True, metavar="F", help=trace)
    too_long = "leave out requests whose prompt and answer are longer than the served model takes"
    add("--skip-too-long", action="store_true", help=too_long)
    add("--requests", type=int, metavar="N", help="only the first N of the trace")
    policies = "by comma; with a guard of its own as in pars_fast/none (%(default)s)"
    add("--policies", default="fcfs,prompt_length,oracle", metavar="P,..", help=policies)
    add("--load", default="1.2", metavar="X,..", help="offered over closed-loop tokens/s (%(default)s)")
    add("--repeats", type=int, default=1, metavar="N", help="runs of each policy and load (%(default)s)")
    add("--tau", type=float, metavar="T", help="noisy scores of this Kendall tau instead of the trace's own")
    demand = "of justitia: file of `pars-fast fairness demand` (as PARS_DEMAND)"
    add("--demand", type=Path, metavar="F", help=demand)
    add("--model", help="model to serve; by default a tiny random one is made")
    add("--json", type=Path, metavar="F", help="write all runs there, each as soon as it is done")
    add("vllm", nargs="*", metavar="-- ARGUMENT", help="further arguments of `vllm serve`, after --")
    parser.set_defaults(run=_replay)


def _replay(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for module, extra in (("vllm", "cpu"), ("numba", "simulate")):
        require_extra(module, extra)
    if arguments.json:
        make_writable(arguments.json.parent)
    from pars_fast.demo.display import Display
    from pars_fast.simulation.replay import replay, simulated

    plan = _plan(arguments)
    result: dict[str, Any] = {"runs": []}

    def keep(row: dict[str, Any]) -> None:
        result["runs"].append(row)
        if arguments.json:
            write_json(arguments.json, result)

    with Display() as display:
        served = arguments.model, tuple(arguments.vllm)
        result |= replay(plan, *served, display=display, on_row=keep)
    result["simulated"] = [simulated(plan, row, result) for row in result["runs"]]
    if arguments.json:
        write_json(arguments.json, result)
    _print(result)


def _plan(arguments: argparse.Namespace) -> "Replay":
    import numpy as np

    from pars_fast.demo.model import MAX_MODEL_LEN
    from pars_fast.demo.scheduler_switch import split_policies
    from pars_fast.simulation.replay import Replay
    from pars_fast.simulation.workload import read_trace, with_noisy_scores

    try:
        policies = split_policies(arguments.policies)
        loads = [float(load) for load in arguments.load.split(",")]
    except ValueError as error:
        raise ParsFastError(str(error)) from None
    if arguments.repeats < 1 or (arguments.requests is not None and arguments.requests < 1):
        raise ParsFastError("--repeats and --requests must be at least 1")
    workload = read_trace(arguments.trace)
    if arguments.skip_too_long:
        tokens = workload.prompt_tokens + workload.output_tokens
        workload = workload.take(np.flatnonzero(tokens <= MAX_MODEL_LEN))
    if arguments.requests is not None:
        workload = workload.take(np.arange(min(arguments.requests, len(workload))))
    if arguments.tau is not None:
        workload = with_noisy_scores(workload, arguments.tau, seed=0)
    return Replay(workload, policies, loads, arguments.repeats, arguments.demand)


def _print(result: Mapping[str, Any]) -> None:
    """Means over repeats and their ratios to arrival order, beside the simulated ones."""
    from pars_fast.simulation.cli import print_compared
    from pars_fast.simulation.live_check import BASELINE, TOLERANCE, compare
    from pars_fast.simulation.replay import CACHED

    runs: Sequence[Mapping[str, Any]] = result["runs"]
    shown = [name for name in _SHOWN if any(run[name] is not None for run in runs)]
    rows = compare(runs, result["simulated"], shown)
    ranked = [row for row in rows if row["policy"] != BASELINE]
    print_compared("Means, s", shown, "", rows, TOLERANCE)
    if len(ranked) < len(rows):
        print_compared(f"Ratios to {BASELINE}", shown, "_ratio", ranked, TOLERANCE)
    if any(run[CACHED] for run in runs):
        cached = compare(runs, result["simulated"], [CACHED])
        print_compared("Share of prompt tokens found in the prefix cache", [CACHED], "", cached, TOLERANCE)
    lost = sum(run["requests"] - run["completed"] for run in runs)
    print(f"{lost} requests did not complete" if lost else "every request completed")
