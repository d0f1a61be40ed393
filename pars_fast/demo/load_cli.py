"""`pars-fast load`: heavy imports inside the command."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pars_fast.errors import ParsFastError, make_writable, require_extra
from pars_fast.output import wide_console, write_json

_COLUMNS = {  # of the table of means: column, heading
    "mean_latency_per_token_s": "s/token", "p99_latency_per_token_s": "p99", "mean_ttft_s": "TTFT s",
    "p99_ttft_s": "p99", "mean_tpot_s": "TPOT s", "mean_e2e_s": "e2e s", "p99_e2e_s": "p99",
    "max_wait_s": "max wait", "throughput_tok_s": "tok/s", "achieved_load": "achieved",
    "mean_latency_per_token_s_ratio": "s/token, x fcfs", "mean_e2e_s_ratio": "e2e, x fcfs",
    "gain_captured": "gain", "gain_captured_e2e": "gain e2e",
}


def add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--loads", default="0.5,0.8,1.0,1.2,1.5", metavar="X,..",
        help="offered tokens/s over the engine's capacity (%(default)s)")
    add("--policies", default="fcfs,pars_fast/none,pars_fast,oracle", metavar="P,..",
        help="by comma, or all; with a guard of its own as in pars_fast/none (%(default)s)")
    add("--burst", type=int, default=2000, metavar="N", help="requests at once, 0 for none (%(default)s)")
    add("--repeats", type=int, default=2,
        help="runs of each policy and load; below load 1, and of the burst, a third (%(default)s)")
    add("--model", help="model to serve; by default a tiny random one is made")
    add("--ranker", default="auto", help="as the setting PARS_RANKER (%(default)s)")
    add("--json", type=Path, metavar="F",
        help="write all figures there; F.rows.jsonl keeps finished runs, and the same command goes on")
    add("--report", type=Path, metavar="F.html", help="write a self-contained page there")
    parser.set_defaults(run=_load)


def _load(arguments: argparse.Namespace) -> None:
    from pars_fast.demo.scheduler_switch import split_policies

    try:
        policies = split_policies(arguments.policies)
        loads = [float(load) for load in arguments.loads.split(",") if load]
    except ValueError as error:
        raise ParsFastError(str(error)) from None
    if not all(0 < load < float("inf") for load in loads):
        raise ParsFastError(f"a load is a positive number, got {arguments.loads}")
    if arguments.repeats < 1 or arguments.burst < 0 or not (loads or arguments.burst):
        raise ParsFastError("there is nothing to serve: --repeats must be at least 1, --burst not negative, "
                            "and one of --loads and --burst given")
    require_extra("vllm", "cpu")
    for path in filter(None, (arguments.json, arguments.report)):
        make_writable(path.parent)  # minutes before it is written
    from pars_fast.demo.display import Display
    from pars_fast.demo.load import LoadPlan, run_load
    from pars_fast.demo.load_page import write_page

    kept = arguments.json and arguments.json.with_name(arguments.json.name + ".rows.jsonl")
    plan = LoadPlan(tuple(policies), tuple(dict.fromkeys(loads)), arguments.burst, arguments.repeats)
    with Display() as display:
        result = run_load(plan, model=arguments.model, ranker=arguments.ranker, kept=kept, display=display)
    print_means(result.summary["means"])
    if arguments.json:
        write_json(arguments.json, result.summary)
    if arguments.report:
        write_page(arguments.report, result.summary)
        print(f"page written to {arguments.report}")


def print_means(means: Sequence[dict[str, Any]]) -> None:
    """The table of means over repeats."""
    from rich.table import Table

    table = Table("load", "policy", *_COLUMNS.values(), title="Means over repeats")
    for mean, following in zip(means, [*means[1:], None], strict=True):
        figures = ("-" if mean[name] is None else f"{mean[name]:.3g}" for name in _COLUMNS)
        last = following is None or following["load"] != mean["load"]
        table.add_row(str(mean["load"]), mean["policy"], *figures, end_section=last)
    wide_console().print(table)
