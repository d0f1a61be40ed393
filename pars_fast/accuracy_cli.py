"""`pars-fast transfer`, `losses` and `learning-curve`: heavy imports inside the commands."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pars_fast.errors import make_writable, require_extra
from pars_fast.output import write_csv, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from pars_fast.data import LengthFile
    from pars_fast.simulation.transfer_latency import TransferLatency
    from pars_fast.transfer import ModelTransfer

DEFAULT = argparse.SUPPRESS  # an option not given falls back to the study's own default


def add_transfer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="length files")
    add("--encoder", default="minilm", help="as of baseline")
    add("--max-models", type=int, default=12, help="of each file (%(default)s)")
    add("--max-prompts-per-file", type=int, default=2000, help="across sets (%(default)s)")
    traces = "trace_*.csv[.gz]: serve each model in the order of every predictor, at their times"
    add("--traces", type=Path, metavar="DIR", help=traces)
    add("--json", type=Path, metavar="F", help="write all cells there")
    parser.set_defaults(run=_transfer)


def _transfer(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from pars_fast.baselines.encoder import FrozenEncoder
    from pars_fast.data import read_length_file
    from pars_fast.transfer import across_models, across_sets

    if arguments.json:
        make_writable(arguments.json.parent)
    serve = _serving(arguments.traces) if arguments.traces else None
    console, encoder = Console(), FrozenEncoder.of(arguments.encoder)
    files = [read_length_file(path) for path in arguments.data]
    result: dict[str, Any] = {"models": {}, "sets": []}
    for file in (file for file in files if len(file.models) > 1):
        models = across_models(file, encoder, arguments.max_models)
        cells = result["models"][file.name] = models.cells()
        _print_cells(console, f"{file.name}: tau on the model of the column", models.models, models.tau,
                     {"all the others": models.others})  # fmt: skip
        if serve is not None:
            latency = serve(models)
            cells["latency"] = asdict(latency)
            title = f"{file.name}: mean latency per token, over that of its own model's order"
            fcfs = {"arrival order": latency.fcfs_per_token}
            _print_cells(console, title, models.models, latency.per_token, fcfs)
    if len(files) > 1:
        sets = across_sets(files, encoder, max_prompts_per_file=arguments.max_prompts_per_file)
        result["sets"] = [asdict(one) for one in sets]
        table = Table(
            "set", "learnt from it alone", "from all", "from all but it", title="mean tau over models"
        )
        for one in sets:
            table.add_row(one.name, *(f"{tau:.3f}" for tau in (one.own, one.all_files, one.all_but_this)))
        console.print(table)
    if arguments.json:
        write_json(arguments.json, _without_nan(result))


def _without_nan(value: Any) -> Any:
    """None for a tau that does not exist: of a model whose answers are all of one length."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _serving(folder: Path) -> "Callable[[ModelTransfer], TransferLatency]":
    """Raises: MissingExtraError, DataError: before anything is trained."""
    require_extra("numba", "simulate")
    from functools import partial

    from pars_fast.simulation.study import read_timed_traces
    from pars_fast.simulation.transfer_latency import transfer_latency

    return partial(transfer_latency, traces=read_timed_traces(folder))


def _print_cells(
    console: "Console",
    title: str,
    models: Sequence[str],
    cells: Sequence[Sequence[float]],
    more: Mapping[str, Sequence[float]],
) -> None:
    from rich.table import Table

    numbers = [str(number) for number in range(1, 1 + len(models))]
    table = Table("trained on", *numbers, title=title, box=None)
    for number, name, row in zip(numbers, models, cells, strict=True):
        table.add_row(f"{number} {name}", *(f"{cell:.2f}" for cell in row))
    for name, row in more.items():
        table.add_row(name, *(f"{cell:.2f}" for cell in row))
    console.print(table)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """What a study that trains has in common with others."""
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="length files to train on")
    add("--exclude", nargs="+", default=[], metavar="FILE", help="as of train")
    measured = "measured on, as of evaluate --all"
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help=measured)
    add("--out", required=True, type=Path, help="folder of the runs; goes on with those found there")
    add("--init", default="minilm", help="as of train (%(default)s)")


def _length_files(
    arguments: argparse.Namespace,
) -> "tuple[list[LengthFile], list[LengthFile], list[LengthFile]]":
    """To train on, to leave out, to measure on."""
    from pars_fast.benchmark import read_length_files
    from pars_fast.data import read_length_file

    training, exclude = (
        [read_length_file(path) for path in paths] for paths in (arguments.data, arguments.exclude)
    )
    return training, exclude, read_length_files(arguments.data_dir)


def add_losses(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_runs(parser)
    add("--seeds", type=int, default=5, metavar="N", help="runs of each loss (%(default)s)")
    against = "the first against the others (all of train's)"
    add("--losses", nargs="+", default=DEFAULT, metavar="LOSS", help=against)
    tried = "tried with the first seed; validation chooses (3e-4 1e-3)"
    add("--learning-rates", nargs="+", type=float, default=DEFAULT, metavar="R", help=tried)
    add("--layers", type=int, default=DEFAULT, metavar="N", help="of the encoder (1)")
    add("--max-prompts-per-file", type=int, default=DEFAULT, metavar="N", help="as of train (400)")
    add("--csv", required=True, type=Path, metavar="F", help="write tau of every loss, seed and file there")
    parser.set_defaults(run=_losses)


def _losses(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from rich.console import Console
    from rich.table import Table

    from pars_fast.bench_results import all_threads, machine
    from pars_fast.loss_comparison import BUDGET, Comparison, compare_losses, standings

    made = machine(all_threads())
    make_writable(arguments.csv.parent)
    training, exclude, measured = _length_files(arguments)

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name, value in vars(arguments).items() if name in names}

    comparison = Comparison(
        training,
        exclude,
        init=arguments.init,
        budget=replace(BUDGET, **given("layers", "max_prompts_per_file")),
        seeds=range(arguments.seeds),
        **given("losses", "learning_rates"),
    )
    rows = compare_losses(comparison, measured, arguments.out, on_run=lambda name: print(name, flush=True))
    write_csv(arguments.csv, [{**row, **made} for row in rows])
    names, losses = [file.name for file in measured], comparison.losses
    table = Table("file", *losses, title=f"Kendall tau-b, mean and 95 % interval of {arguments.seeds} seeds")
    for title, chosen in (*((name, [name]) for name in names), ("mean", names)):
        found = standings(rows, chosen)
        cells = (f"{found[loss].mean:.3f} ± {found[loss].half_width:.3f}" for loss in losses)
        table.add_row(title, *cells)
    console = Console()
    console.print(table)
    for loss, standing in standings(rows, names).items():
        if standing.p_value is not None:
            console.print(
                f"{losses[0]} minus {loss}: {standing.difference:+.3f} "
                f"± {standing.difference_half_width:.3f}, p {standing.p_value:.3f}"
            )


def add_learning_curve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_runs(parser)
    add("--seeds", type=int, default=3, metavar="N", help="runs of each point (%(default)s)")
    add("--layer-seeds", type=int, default=1, metavar="N", help="the same of larger encoders (%(default)s)")
    add("--csv", required=True, type=Path, metavar="F", help="write tau of every run and file there")
    parser.set_defaults(run=_learning_curve)


def _learning_curve(arguments: argparse.Namespace) -> None:
    from pars_fast.bench_results import all_threads, machine
    from pars_fast.learning_curve import learning_curve, print_curve

    made = machine(all_threads())
    make_writable(arguments.csv.parent)
    training, exclude, measured = _length_files(arguments)
    rows = []
    for row in learning_curve(
        training,
        measured,
        arguments.out,
        init=arguments.init,
        exclude=exclude,
        seeds=range(arguments.seeds),
        layer_seeds=range(arguments.layer_seeds),
        on_run=lambda name: print(name, flush=True),
    ):
        rows.append({**row, **made})
        write_csv(arguments.csv, rows)
    print_curve(rows)
