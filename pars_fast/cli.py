"""The `pars-fast` command: one sub-command a function, heavy imports inside it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pars_fast import __version__
from pars_fast.bench_cli import add_bench
from pars_fast.errors import ParsFastError, make_writable
from pars_fast.output import write_json
from pars_fast.simulation.cli import add_live_check, add_profile, add_simulate, add_study

DEFAULT = argparse.SUPPRESS  # an option not given falls back to the recipe's own default


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its own status or 0, 2 with one line on stderr when the user can mend the cause."""
    arguments = _parser().parse_args(argv)
    try:
        status: int | None = arguments.run(arguments)
    except (ParsFastError, OSError) as error:
        print(f"pars-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pars-fast: interrupted", file=sys.stderr)
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pars-fast", description="Prompt-aware shortest-first scheduling for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a ranker on length files"))
    _add_evaluate(commands.add_parser("evaluate", help="measure a ranker on a length file"))
    _add_demo(commands.add_parser("demo", help="serve real prompts by a real vLLM under three policies"))
    add_bench(commands.add_parser("bench", help="time scoring, queue and scheduling step"))
    add_simulate(commands.add_parser("simulate", help="compare policies and guards in simulated engines"))
    add_study(commands.add_parser("study", help="remake the simulators' tables: frontier, robustness, fleet"))
    add_profile(commands.add_parser("profile", help="measure the step time of vLLM on this machine"))
    add_live_check(
        commands.add_parser("live-check", help="compare the faithful simulator with a demo's real server")
    )
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="length files")
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="length files whose prompts must not be trained on, wherever they occur",
    )
    add("--out", required=True, type=Path, help="directory for the ranker; resumes a run found there")
    add(
        "--init",
        default="minilm",
        help="starting weights: minilm, default, small, a local directory or a hub name (%(default)s)",
    )
    add("--model-column", default=DEFAULT, help="model whose lengths are learnt, or consensus")
    add("--loss", default=DEFAULT, help="margin (PARS) or huber")
    add("--pooling", default=DEFAULT, choices=["cls", "mean"])
    for name in ("epochs", "batch-prompts", "max-prompts-per-file", "max-tokens", "layers", "seed"):
        add(f"--{name}", type=int, default=DEFAULT)
    for name in ("learning-rate", "dropout"):
        add(f"--{name}", type=float, default=DEFAULT)
    add("--teacher", default=DEFAULT, help="ranker whose scores are averaged with the recorded lengths")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from pars_fast.data import read_length_file
    from pars_fast.training import Recipe, train

    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    files = [read_length_file(path) for path in arguments.data]
    exclude = [read_length_file(path) for path in arguments.exclude]
    train(files, arguments.init, Recipe(**given), arguments.out, exclude=exclude)
    print(f"ranker written to {arguments.out}")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranker", default="default", help="directory, default or small (%(default)s)")
    parser.add_argument("--data", required=True, metavar="FILE", help="length file")
    parser.add_argument("--split", default="test", choices=["train", "val", "test", "all"])
    parser.add_argument("--json", type=Path, metavar="F", help="write the measures there")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from pars_fast.data import read_length_file
    from pars_fast.evaluation import evaluate
    from pars_fast.ranker import Ranker

    if arguments.json:
        make_writable(arguments.json.parent)  # say so before the work, not after it
    file = read_length_file(arguments.data)
    result = evaluate(Ranker.from_pretrained(arguments.ranker), file, arguments.split)
    _print_quality(f"{file.name}, {arguments.split} split", result)
    if arguments.json:
        write_json(arguments.json, result)


def _print_quality(title: str, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    headers = ("model", "n", "Kendall tau-b", "95 % interval", "pair accuracy", "impact accuracy")
    table = Table(*headers, title=title)
    for model, column in result["models"].items():
        if column["kendall_tau"] is None:
            table.add_row(model, str(column["n"]), "-", column["reason"], "-", "-")
            continue
        low, high = column["ci95"]
        measures = (column["kendall_tau"], column["pair_accuracy"], column["impact_accuracy"])
        tau, *accuracies = (_figure(value) for value in measures)
        table.add_row(model, str(column["n"]), tau, f"{low:.3f} .. {high:.3f}", *accuracies)
    console = Console()
    console.print(table)
    console.print(f"mean Kendall tau-b: {_figure(result['mean_kendall_tau'])}")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="F", help="write all figures there")
    parser.add_argument("--report", type=Path, metavar="F.html", help="write a self-contained page there")
    parser.add_argument("--model", help="model to serve; by default a tiny random one is made")
    parser.add_argument("--ranker", default="auto", help="as the setting PARS_RANKER (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each policy and load (%(default)s)")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from pars_fast.errors import require_extra

    if arguments.repeats < 1:
        raise ParsFastError(f"--repeats must be at least 1, got {arguments.repeats}")
    require_extra("vllm", "cpu")
    for path in filter(None, (arguments.json, arguments.report)):
        path.parent.mkdir(parents=True, exist_ok=True)  # minutes before it is written
        path.touch()
    from pars_fast.demo.display import Display
    from pars_fast.demo.report import write_report
    from pars_fast.demo.run import run_demo

    with Display() as display:
        result = run_demo(
            model=arguments.model, ranker=arguments.ranker, repeats=arguments.repeats, display=display
        )
    for name in ("gain_captured", "gain_captured_e2e", "tau", "tau_within_source", "light_ttft_ratio"):
        print(f"{name}: {result.summary[name]}")
    if arguments.json:
        write_json(arguments.json, result.to_json())
    if arguments.report:
        write_report(
            arguments.report, runs=result.runs, expected_tokens=result.expected_tokens, summary=result.summary
        )
        print(f"page written to {arguments.report}")


if __name__ == "__main__":
    sys.exit(main())
