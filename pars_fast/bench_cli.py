"""`pars-fast bench`: the suite, and what is done with its results."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from pars_fast.errors import ParsFastError, make_writable, require_extra
from pars_fast.output import write_json


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Without a sub-command the CPU suite is run."""
    _add_outputs(parser)
    parser.set_defaults(run=_suite)
    commands = parser.add_subparsers(metavar="COMMAND", title="instead of the CPU suite")

    show = commands.add_parser("show", help="print the table of a finished run")
    show.add_argument("file", type=Path, metavar="FILE", help="pytest-benchmark's JSON, or a CSV of results")
    _add_outputs(show)
    show.set_defaults(run=_show)

    gpu = commands.add_parser("gpu", help="run the GPU cases; without a GPU they are marked as not measured")
    gpu.add_argument("--csv", type=Path, required=True, metavar="F", help="write the rows there")
    gpu.add_argument("--only", metavar="OPS", help="run the cases of these ops, by comma; goes on in F")
    gpu.set_defaults(run=_gpu)

    step = commands.add_parser("step", help="time the scheduling step alone, ranked against stock vLLM")
    step.add_argument("--waiting", type=int, default=10_000, help="requests in the queue (%(default)s)")
    step.add_argument("--steps", type=int, default=5_000, help="paired steps to time (%(default)s)")
    step.add_argument("--async-scheduling", action="store_true", help="of vLLM's AsyncScheduler")
    step.add_argument(
        "--noise", action="store_true", help="two stock schedulers: what the machine makes of equal steps"
    )
    step.add_argument("--json", type=Path, metavar="F", help="write the figures there")
    step.set_defaults(run=_step)

    compare = commands.add_parser("compare", help="say what got slower; exit status 1 if anything did")
    compare.add_argument("before", type=Path, metavar="A", help="CSV of results")
    compare.add_argument("after", type=Path, metavar="B", help="CSV of results")
    compare.add_argument(
        "--threshold",
        type=float,
        default=0.10,
        help="slower by so much, beyond the spread from p20 to p80, counts (%(default)s)",
    )
    compare.set_defaults(run=_compare)

    plot = commands.add_parser("plot", help="draw the results of a file")
    plot.add_argument("csv", type=Path, metavar="CSV", help="results")
    plot.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for one SVG an op")
    plot.set_defaults(run=_plot)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows there")
    parser.add_argument("--csv", type=Path, metavar="F", help="write the rows there, tidy")


def _suite(arguments: argparse.Namespace) -> None:
    from pars_fast.bench_table import SUITE_JSON, run_suite

    _check_outputs(arguments)
    run_suite(SUITE_JSON)
    _publish(SUITE_JSON, arguments)


def _show(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments)
    _publish(arguments.file, arguments)


def _gpu(arguments: argparse.Namespace) -> int:
    from pars_fast.bench_table import run_gpu_suite

    make_writable(arguments.csv.parent)
    return run_gpu_suite(arguments.csv, arguments.only)


def _step(arguments: argparse.Namespace) -> None:
    if arguments.json:
        make_writable(arguments.json.parent)
    if arguments.steps < 1:
        raise ParsFastError(f"--steps must be at least 1, got {arguments.steps}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    require_extra("vllm", "vllm")
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from pars_fast.step_workload import measure_step

    scheduler_cls = AsyncScheduler if arguments.async_scheduling else Scheduler
    times = asdict(
        measure_step(arguments.waiting, arguments.steps, scheduler_cls, ranking=not arguments.noise)
    )
    for name, value in times.items():
        print(f"{name}: {value:,.1f}" if isinstance(value, float) else f"{name}: {value:,}")
    if arguments.json:
        write_json(arguments.json, times)


def _compare(arguments: argparse.Namespace) -> int:
    from pars_fast.bench_compare import compare, print_comparison
    from pars_fast.bench_results import read_csv

    if arguments.threshold < 0:
        raise ParsFastError(f"--threshold must not be negative, got {arguments.threshold}")
    comparison = compare(read_csv(arguments.before), read_csv(arguments.after), arguments.threshold)
    print_comparison(comparison)
    return 1 if comparison.slower else 0


def _plot(arguments: argparse.Namespace) -> None:
    from pars_fast.bench_plot import plot
    from pars_fast.bench_results import read_csv

    for path in plot(read_csv(arguments.csv), arguments.out):
        print(f"plot written to {path}")


def _check_outputs(arguments: argparse.Namespace) -> None:
    for path in filter(None, (arguments.json, arguments.csv)):
        make_writable(path.parent)  # minutes before it is written


def _publish(source: Path, arguments: argparse.Namespace) -> None:
    from pars_fast.bench_results import read_csv, write_csv
    from pars_fast.bench_table import print_report, read_report

    report = read_csv(source) if source.suffix == ".csv" else read_report(source)
    print_report(report)
    sys.stdout.flush()
    if arguments.json:
        write_json(arguments.json, report.records())
    if arguments.csv:
        write_csv(arguments.csv, report)
