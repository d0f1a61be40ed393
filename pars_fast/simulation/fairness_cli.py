"""`pars-fast fairness`: applications, the demand that Justitia predicts of them, and the table."""

import argparse
from pathlib import Path

from pars_fast.errors import make_writable, require_extra
from pars_fast.simulation.options import require_at_least


def add_fairness(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    _add_applications(commands.add_parser("applications", help="make task-parallel applications, as a trace"))
    _add_demand(commands.add_parser("demand", help="train what an application will cost, for PARS_DEMAND"))
    _add_table(commands.add_parser("table", help="compare orders by application, against ideal sharing"))


def _add_applications(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="length files and traces of the types")
    add("--arrivals", type=Path, required=True, metavar="TRACE", help="an application at each of its times")
    add("--applications", type=int, default=1000, metavar="N", help="how many (%(default)s)")
    add("--half", choices=["train", "test"], default="test", help="of the sources (%(default)s)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, metavar="F.csv", help="a trace with a column app")
    parser.set_defaults(run=_applications)


def _applications(arguments: argparse.Namespace) -> None:
    require_at_least(1, "--applications", arguments.applications)
    require_at_least(0, "--seed", arguments.seed)
    make_writable(arguments.out.parent)
    from pars_fast.simulation.applications import make_applications, read_sources, write_trace
    from pars_fast.simulation.workload import read_trace

    sources, arrivals = read_sources(arguments.data, arguments.half), read_trace(arguments.arrivals)
    workload = make_applications(sources, arrivals, arguments.applications, seed=arguments.seed)
    write_trace(arguments.out, workload)
    print(f"{arguments.applications} applications, {len(workload)} requests, written to {arguments.out}")


def _add_demand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        type=Path,
        required=True,
        metavar="F.csv",
        help="finished requests; the column app is TYPE/NAME",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="F.json", help="for PARS_DEMAND")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_demand)


def _demand(arguments: argparse.Namespace) -> None:
    require_at_least(0, "--seed", arguments.seed)
    require_extra("sklearn", "train")
    make_writable(arguments.out.parent)
    from pars_fast.simulation.fairness import train_demand
    from pars_fast.simulation.workload import read_trace

    demand = train_demand(read_trace(arguments.trace), seed=arguments.seed)
    demand.save(arguments.out)
    names = ", ".join(name or "any other type" for name in demand.networks)
    print(f"demand of {names} written to {arguments.out}")


def _add_table(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="length files and traces of the types")
    add("--arrivals", type=Path, required=True, metavar="TRACE", help="an application at each of its times")
    add("--applications", type=int, default=250, metavar="N", help="of each run (%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes (%(default)s)")
    add("--out", type=Path, required=True, metavar="F.csv")
    parser.set_defaults(run=_table)


def _table(arguments: argparse.Namespace) -> None:
    require_at_least(1, "--applications", arguments.applications)
    require_at_least(1, "--workers", arguments.workers)
    for module, extra in (("numba", "simulate"), ("vllm", "vllm"), ("sklearn", "train")):
        require_extra(module, extra)
    make_writable(arguments.out.parent)  # minutes before it is written
    from pars_fast.simulation.fairness import Setup, fairness_rows
    from pars_fast.simulation.study import write_table

    setup = Setup(arguments.data, arguments.arrivals, arguments.applications)
    rows = []
    for row in fairness_rows(setup, workers=arguments.workers):
        rows.append(row)
        write_table(arguments.out, rows)  # as far as it is done
        print(f"{len(rows)} of {setup.cases}", end="\r", flush=True)
    print(f"table written to {arguments.out}")
