"""The `pars-fast` command: one sub-command a function, heavy imports inside it."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pars_fast import __version__
from pars_fast.accuracy_cli import add_learning_curve, add_losses, add_transfer
from pars_fast.batch.cli import add_batch
from pars_fast.bench_cli import add_bench
from pars_fast.demo.load_cli import add_load
from pars_fast.errors import ParsFastError, make_writable
from pars_fast.output import write_json
from pars_fast.simulation.cli import (
    add_live_check,
    add_profile,
    add_serving_gain,
    add_simulate,
    add_study,
)
from pars_fast.simulation.fairness_cli import add_fairness
from pars_fast.simulation.replay_cli import add_replay

DEFAULT = argparse.SUPPRESS  # an option not given falls back to the recipe's own default


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its own status or 0, 2 with one line on stderr when the user can mend the cause.

    Raises: SystemExit: on SIGTERM, with 143, and on options that argparse does not understand.
    """
    arguments = _parser().parse_args(argv)
    try:
        with _exit_on_sigterm():
            status: int | None = arguments.run(arguments)
    except (ParsFastError, OSError) as error:
        print(f"pars-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pars-fast: interrupted", file=sys.stderr)
        return 130
    return status or 0


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """By default SIGTERM skips every `finally`, and a vLLM server that a command started goes on running."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pars-fast", description="Prompt-aware shortest-first scheduling for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a ranker on length files"))
    _add_collect(
        commands.add_parser("collect", help="collect answer lengths from an OpenAI-compatible server")
    )
    add_batch(commands.add_parser("batch", help="complete a file of prompts, in batches of similar length"))
    _add_calibrate(commands.add_parser("calibrate", help="fit a ranker's distribution of lengths"))
    _add_baseline(commands.add_parser("baseline", help="train simple predictors to compare with"))
    _add_evaluate(commands.add_parser("evaluate", help="measure rankers on length files"))
    add_transfer(commands.add_parser("transfer", help="train on one model or set, measure on another"))
    add_losses(commands.add_parser("losses", help="fine-tune by each loss at equal budget, and compare"))
    add_learning_curve(
        commands.add_parser("learning-curve", help="what limits: prompts, answers a prompt, or the encoder?")
    )
    _add_duplicates(commands.add_parser("duplicates", help="near-duplicate prompts across splits"))
    _add_demo(commands.add_parser("demo", help="serve real prompts by a real vLLM under three policies"))
    add_load(commands.add_parser("load", help="serve the demo's prompts at several loads under each policy"))
    add_bench(commands.add_parser("bench", help="time scoring, queue and scheduling step"))
    add_simulate(commands.add_parser("simulate", help="compare policies and guards in simulated engines"))
    add_study(commands.add_parser("study", help="remake the simulators' tables: frontier, robustness, fleet"))
    add_fairness(commands.add_parser("fairness", help="applications: make them, compare orders"))
    add_serving_gain(
        commands.add_parser("serving-gain", help="what predictors are worth in simulated serving")
    )
    add_profile(commands.add_parser("profile", help="measure the step time of vLLM on this machine"))
    add_live_check(
        commands.add_parser("live-check", help="compare the faithful simulator with a demo's real server")
    )
    add_replay(commands.add_parser("replay", help="serve a trace by a real vLLM under each policy"))
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
        help="starting weights: minilm, default, small, a local directory or a hub name (%(default)s); "
        "what is not given here is as a ranker was trained, and PARS's recipe for a mere encoder",
    )
    add("--model-column", default=DEFAULT, help="model whose lengths are learnt, or consensus")
    add("--loss", default=DEFAULT, help="margin (PARS), margin_unfiltered, listmle (LTR) or huber")
    add("--pooling", default=DEFAULT, choices=["cls", "mean"])
    whole = ("epochs", "batch-prompts", "max-prompts-per-file", "max-tokens", "tail-tokens", "layers", "seed")
    for name in whole:
        add(f"--{name}", type=int, default=DEFAULT)
    for name in ("learning-rate", "dropout"):
        add(f"--{name}", type=float, default=DEFAULT)
    add("--teacher", default=DEFAULT, help="ranker whose scores are averaged with the recorded lengths")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from pars_fast.data import read_length_file
    from pars_fast.training import Recipe, train, trained_with

    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    files = [read_length_file(path) for path in arguments.data]
    exclude = [read_length_file(path) for path in arguments.exclude]
    recipe = Recipe(**{**trained_with(arguments.init), **given})
    train(files, arguments.init, recipe, arguments.out, exclude=exclude)
    print(f"ranker written to {arguments.out}")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ranker", metavar="RANKER", help="default, small or a directory; changed in place")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="length files")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="as of train")
    parser.add_argument("--model-column", default="consensus", help="model that is served (any model's)")
    parser.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    from pars_fast.data import read_length_file
    from pars_fast.packaged import checkpoint_directory
    from pars_fast.ranker import Ranker
    from pars_fast.training import calibrate

    ranker = Ranker.from_pretrained(arguments.ranker, device="cpu")
    files = [read_length_file(path) for path in arguments.data]
    exclude = [read_length_file(path) for path in arguments.exclude]
    calibrate(ranker, files, model_column=arguments.model_column, exclude=exclude)
    ranker.save_pretrained(checkpoint_directory(arguments.ranker))
    print(f"distribution of lengths written to {checkpoint_directory(arguments.ranker)}")


def _add_baseline(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "names",
        nargs="+",
        metavar="NAME",
        help="prompt_length, tfidf_ridge, frozen_ridge, alise, elis, head_LOSS with a loss of train",
    )
    add("--data", nargs="+", required=True, metavar="FILE", help="length files")
    add("--exclude", nargs="+", default=[], metavar="FILE", help="as of train")
    add("--out", required=True, type=Path, help="folder; each baseline gets its own in it")
    add("--encoder", default="minilm", help="frozen encoder: minilm, a local directory or a hub name")
    add("--model-column", default="consensus", help="model whose lengths are learnt, or consensus")
    add("--max-prompts-per-file", type=int)
    add("--seed", type=int, default=42)
    parser.set_defaults(run=_baseline)


def _baseline(arguments: argparse.Namespace) -> None:
    from pars_fast.baselines import fit_baseline
    from pars_fast.data import read_length_file

    make_writable(arguments.out)
    files = [read_length_file(path) for path in arguments.data]
    exclude = [read_length_file(path) for path in arguments.exclude]
    for name in arguments.names:
        predictor = fit_baseline(
            name,
            files,
            exclude=exclude,
            encoder=arguments.encoder,
            model_column=arguments.model_column,
            max_prompts_per_file=arguments.max_prompts_per_file,
            seed=arguments.seed,
        )
        predictor.save_pretrained(arguments.out / name)
        print(f"{name} written to {arguments.out / name}")


def _add_collect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--endpoint", required=True, metavar="URL", help="an OpenAI-compatible server, with or without /v1")
    add("--prompts", required=True, type=Path, metavar="F", help='.jsonl with "prompt", or a prompt a line')
    add("--out", required=True, type=Path, metavar="F", help="length file for train; resumes by F.sqlite")
    add("--model", default=DEFAULT, help="the first that the server names, if not given")
    for name in ("samples", "concurrency", "max-tokens", "attempts"):
        add(f"--{name}", type=int, default=DEFAULT)
    for name in ("temperature", "timeout-s"):
        add(f"--{name}", type=float, default=DEFAULT)
    add("--ray", type=int, default=0, metavar="N", help="ask from N workers of a Ray cluster (RAY_ADDRESS)")
    parser.set_defaults(run=_collect)


def _collect(arguments: argparse.Namespace) -> int:
    import os
    from dataclasses import fields

    from pars_fast.collect import Collection, collect, progress, read_prompts

    names = {field.name for field in fields(Collection)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    collection = Collection(**given, api_key=os.environ.get("OPENAI_API_KEY"))
    if arguments.ray < 0:
        raise ParsFastError(f"--ray must be a number of workers, got {arguments.ray}")
    prompts = read_prompts(arguments.prompts)
    with progress(len(prompts) * collection.samples) as show:
        report = collect(prompts, arguments.out, collection, ray_workers=arguments.ray, on_answer=show)
    print(
        f"{arguments.out}: {report.already + report.collected} of {report.wanted} answers, "
        f"{report.collected} new, {report.at_limit} of them cut at {collection.max_tokens} tokens; "
        f"{report.refused} refused"
    )
    if report.failed:
        print(f"{report.failed} failed; the same command tries them again", file=sys.stderr)
    return 1 if report.failed else 0


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--ranker",
        nargs="+",
        metavar="[NAME=]DIR",
        help="default, small, prompt_length, or a directory of train or baseline (default). With --all: "
        "several, NAME=DIR,DIR for seeds of one, the first compared with all (default small prompt_length)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FILE", help="length file")
    what.add_argument("--all", action="store_true", help="every length file of --data-dir, every ranker")
    what.add_argument("--adversarial", action="store_true", help="the package's own pairs of hard prompts")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="for --all (%(default)s)")
    add("--max-prompts-per-file", type=int, help="with --all: a sample of so many, for a quick look")
    add("--split", default="test", choices=["train", "val", "test", "all"], help="of --data (%(default)s)")
    add("--json", type=Path, metavar="F", help="write the measures there")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.json:
        make_writable(arguments.json.parent)  # say so before the work, not after it
    if arguments.all:
        _evaluate_all(arguments)
        return
    if arguments.adversarial:
        _evaluate_adversarial(arguments)
        return
    from pars_fast.baselines import load_predictor
    from pars_fast.data import read_length_file
    from pars_fast.evaluation import evaluate

    if len(names := arguments.ranker or ["default"]) > 1:
        raise ParsFastError("--data takes one --ranker; several are compared with --all")
    file = read_length_file(arguments.data)
    result = evaluate(load_predictor(names[0]), file, arguments.split)
    _print_quality(f"{file.name}, {arguments.split} split", result)
    if arguments.json:
        write_json(arguments.json, result)


def _evaluate_all(arguments: argparse.Namespace) -> None:
    from pars_fast.baselines import load_predictor
    from pars_fast.benchmark import benchmark, read_length_files
    from pars_fast.benchmark_table import BenchmarkTable

    predictors = {}
    for given in arguments.ranker or ["default", "small", "prompt_length"]:
        name, paths = given.split("=", 1) if "=" in given else (Path(given).name, given)
        predictors[name] = [load_predictor(path) for path in paths.split(",")]
    table, results = BenchmarkTable(list(predictors)), {}
    files = read_length_files(arguments.data_dir)
    for name, result in benchmark(files, predictors, max_prompts_per_file=arguments.max_prompts_per_file):
        results[name] = result
        table.add(name, result)
        if arguments.json:
            write_json(arguments.json, results)  # as far as it is done
    table.print()


def _evaluate_adversarial(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from pars_fast.adversarial import judge, right_by_family
    from pars_fast.baselines import load_predictor

    names = arguments.ranker or ["default", "small"]
    verdicts = {name: judge(load_predictor(name)) for name in names}
    families = {name: right_by_family(judged) for name, judged in verdicts.items()}
    table = Table("family", "pairs", *names, title="pairs in the right order")
    for family, (_, count) in families[names[0]].items():
        table.add_row(family, str(count), *(str(families[name][family][0]) for name in names))
    totals = (str(sum(right for right, _ in families[name].values())) for name in names)
    table.add_row("all", str(len(verdicts[names[0]])), *totals)
    Console().print(table)
    if arguments.json:
        write_json(
            arguments.json,
            {name: [asdict(verdict) for verdict in judged] for name, judged in verdicts.items()},
        )


def _add_duplicates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="length files")
    parser.add_argument("--json", type=Path, metavar="F", help="write every pair there")
    parser.set_defaults(run=_duplicates)


def _duplicates(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from pars_fast.data import read_length_file
    from pars_fast.duplicates import leaking_prompts, near_duplicates

    files = [read_length_file(path) for path in arguments.data]
    pairs = near_duplicates(files)
    leaks = {split: leaking_prompts(pairs, split) for split in ("val", "test")}
    table = Table("file", "val", "test", title="prompts with a near-duplicate in train")
    for file in files:
        table.add_row(file.name, *(str(leaks[split][file.name]) for split in ("val", "test")))
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, [asdict(pair) for pair in pairs])


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
