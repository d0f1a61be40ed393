"""The `pars-fast` command: one sub-command a function, heavy imports inside it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pars_fast import __version__
from pars_fast.errors import ParsFastError

DEFAULT = argparse.SUPPRESS  # an option not given falls back to the recipe's own default


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on stderr when the user can mend the cause."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ParsFastError, OSError) as error:
        print(f"pars-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pars-fast: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pars-fast", description="Prompt-aware shortest-first scheduling for vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a ranker on length files"))
    _add_evaluate(commands.add_parser("evaluate", help="measure a ranker on a length file"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="length files")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="FILE",
                        help="length files whose prompts must not be trained on, wherever they occur")
    parser.add_argument("--out", required=True, type=Path, help="directory for the ranker; resumes a run found there")
    parser.add_argument("--init", default="minilm",
                        help="starting weights: minilm, default, a local directory or a hub name (%(default)s)")
    parser.add_argument("--model-column", default=DEFAULT, help="model whose lengths are learnt, or consensus")
    parser.add_argument("--loss", default=DEFAULT, help="margin (PARS) or huber")
    parser.add_argument("--pooling", default=DEFAULT, choices=["cls", "mean"])
    for name, kind in (("epochs", int), ("batch-prompts", int), ("learning-rate", float), ("dropout", float),
                       ("max-prompts-per-file", int), ("max-tokens", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, default=DEFAULT)
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from pars_fast.data import read_length_file
    from pars_fast.training import Recipe, train

    given = {field.name: getattr(arguments, field.name) for field in fields(Recipe) if hasattr(arguments, field.name)}
    files = [read_length_file(path) for path in arguments.data]
    exclude = [read_length_file(path) for path in arguments.exclude]
    train(files, arguments.init, Recipe(**given), arguments.out, exclude=exclude)
    print(f"ranker written to {arguments.out}")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranker", default="default", help="ranker directory (%(default)s)")
    parser.add_argument("--data", required=True, metavar="FILE", help="length file")
    parser.add_argument("--split", default="test", choices=["train", "val", "test", "all"])
    parser.add_argument("--json", type=Path, metavar="F", help="write the measures there")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from pars_fast.data import read_length_file
    from pars_fast.evaluation import evaluate
    from pars_fast.ranker import Ranker

    file = read_length_file(arguments.data)
    result = evaluate(Ranker.from_pretrained(arguments.ranker), file, arguments.split)
    _print_quality(f"{file.name}, {arguments.split} split", result)
    if arguments.json:
        write_json(arguments.json, result)


def _print_quality(title: str, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "n", "Kendall tau-b", "95 % interval", "pair accuracy", "impact accuracy", title=title)
    for model, column in result["models"].items():
        if column["kendall_tau"] is None:
            table.add_row(model, str(column["n"]), "-", column["reason"], "-", "-")
            continue
        low, high = column["ci95"]
        accuracies = ("-" if value is None else f"{value:.3f}"
                      for value in (column["pair_accuracy"], column["impact_accuracy"]))
        table.add_row(model, str(column["n"]), f"{column['kendall_tau']:.3f}", f"{low:.3f} .. {high:.3f}", *accuracies)
    mean = result["mean_kendall_tau"]
    console = Console()
    console.print(table)
    console.print(f"mean Kendall tau-b: {'-' if mean is None else f'{mean:.3f}'}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
