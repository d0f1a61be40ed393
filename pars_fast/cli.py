"""The `pars-fast` command: one sub-command a function, heavy imports inside it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pars_fast import __version__
from pars_fast.errors import OutputError, ParsFastError, make_writable

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
    parser = argparse.ArgumentParser(
        prog="pars-fast", description="Prompt-aware shortest-first scheduling for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a ranker on length files"))
    _add_evaluate(commands.add_parser("evaluate", help="measure a ranker on a length file"))
    _add_demo(commands.add_parser("demo", help="serve real prompts by a real vLLM under three policies"))
    _add_bench(commands.add_parser("bench", help="time scoring, queue and scheduling step"))
    _add_simulate(commands.add_parser("simulate", help="compare policies and guards in simulated engines"))
    _add_profile(commands.add_parser("profile", help="measure the step time of vLLM on this machine"))
    _add_live_check(
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
        help="starting weights: minilm, default, a local directory or a hub name (%(default)s)",
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
    parser.add_argument("--ranker", default="default", help="ranker directory (%(default)s)")
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
    parser.add_argument("--ranker", default="default", help="ranker directory (%(default)s)")
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


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "target",
        nargs="?",
        metavar="FILE|step",
        help="print the table of a pytest-benchmark JSON file, or time the scheduling step alone; "
        "without it the repository's suite is run",
    )
    add("--json", type=Path, metavar="F", help="write the rows there")
    add("--csv", type=Path, metavar="F", help="write the rows there, tidy")
    add("--waiting", type=int, default=10_000, help="step: requests in the queue (%(default)s)")
    add("--steps", type=int, default=5_000, help="step: paired steps to time (%(default)s)")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    from pars_fast.bench_table import SUITE_JSON, print_report, read_report, run_suite, write_csv

    for path in filter(None, (arguments.json, arguments.csv)):
        make_writable(path.parent)  # minutes before it is written
    if arguments.target == "step":
        _bench_step(arguments)
        return
    if arguments.target is None:
        run_suite(SUITE_JSON)
    report = read_report(Path(arguments.target or SUITE_JSON))
    print_report(report)
    if arguments.json:
        write_json(arguments.json, report.records())
    if arguments.csv:
        write_csv(arguments.csv, report)


def _bench_step(arguments: argparse.Namespace) -> None:
    import os
    from dataclasses import asdict

    from pars_fast.errors import require_extra

    if arguments.steps < 1:
        raise ParsFastError(f"--steps must be at least 1, got {arguments.steps}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    require_extra("vllm", "vllm")
    from pars_fast.step_workload import measure_step

    times = asdict(measure_step(arguments.waiting, arguments.steps))
    for name, value in times.items():
        print(f"{name}: {value:,.1f}" if isinstance(value, float) else f"{name}: {value:,}")
    if arguments.json:
        write_json(arguments.json, times)


def _numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",")]


def _whole_numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    one_of = source.add_argument
    one_of("--trace", type=Path, metavar="F", help="arrival_s,prompt_tokens,output_tokens[,score][,app]")
    one_of("--lengths", type=Path, metavar="F", help="length file: real prompts, which a ranker scores")
    add("--model-column", help="--lengths: whose answers (the first column)")
    add("--ranker", default="default", help="--lengths: ranker directory, or none (%(default)s)")
    add("--arrivals", type=Path, metavar="TRACE", help="--lengths: arrive at its times; else Poisson")
    add("--requests", type=int, metavar="N", help="only the first N of a trace; so many prompts (2000)")
    add("--poisson", action="store_true", help="--trace: Poisson arrivals instead of its own")
    add("--burst", type=float, default=0.0, metavar="SHARE", help="of the requests, all at once half-way")
    add("--policies", default="all", help="by comma, or all (%(default)s)")
    guards = "own, all, frontier, or by comma, as in none,overtaking_budget:beta=1 (%(default)s)"
    add("--guards", default="own", help=guards)
    add("--load", type=_numbers, default=[0.7, 1.0, 1.2], help="offered over closed-loop tokens/s")
    add("--tau", type=_numbers, metavar="T", help="noisy scores of these Kendall taus instead of real ones")
    add("--ranker-delay", type=_numbers, default=[0.0], metavar="S", help="seconds from prompt to score (0)")
    add("--unscored", type=_numbers, default=[0.0], metavar="SHARE", help="of the requests, never scored (0)")
    add("--fleet", type=_whole_numbers, default=[1], metavar="N", help="engines, at equal load each (1)")
    add("--router", default="round_robin", help="or least_loaded, predicted_work; by comma (%(default)s)")
    add("--engine", default="fast", choices=["fast", "faithful"], help="which simulator (%(default)s)")
    add("--profile", default="h100_llama_3_1_8b", metavar="NAME|F", help="time of a step (%(default)s)")
    for name in ("max-num-seqs", "max-num-batched-tokens", "kv-cache-tokens", "max-model-len"):
        add(f"--{name}", type=int, default=DEFAULT, metavar="N")
    add("--seed", type=_whole_numbers, default=[0], help="seeds, by comma (0)")
    add("--workers", type=int, metavar="N", help="processes (all cores)")
    add("--json", type=Path, metavar="F", help="write all rows there; F.rows.jsonl keeps them as they come")
    add("--report", type=Path, metavar="F.html", help="write a self-contained page there")
    parser.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> None:
    from pars_fast.errors import require_extra

    require_extra("numba", "simulate")
    if arguments.engine == "faithful":
        require_extra("vllm", "vllm")
    for path in filter(None, (arguments.json, arguments.report)):
        make_writable(path.parent)  # minutes before it is written
    from pars_fast.simulation.command import simulate
    from pars_fast.simulation.report import write_report

    result = simulate(arguments)
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.report:
        write_report(arguments.report, result)
        print(f"page written to {arguments.report}")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="write the profile there")
    parser.add_argument("--model", help="model to serve; by default a tiny random one is made")
    parser.set_defaults(run=_profile)


def _profile(arguments: argparse.Namespace) -> None:
    from pars_fast.errors import require_extra

    require_extra("vllm", "cpu")
    make_writable(arguments.json.parent)  # a minute before it is written
    from pars_fast.simulation.profile import measure_profile

    print("serving by vLLM and measuring its steps: about a minute and a half", flush=True)
    profile = measure_profile(arguments.model)
    write_json(arguments.json, profile.to_json())
    step, fit = profile.step_time, profile.fit
    print(f"a step takes {step.base_s * 1e3:.3g} ms + {step.prefill_token_s * 1e6:.3g} us a prefill token + "
          f"{step.decode_seq_s * 1e6:.3g} us a decoding request + {step.kv_token_s * 1e9:.3g} ns a KV token")
    print(f"{fit.steps:,} steps of {fit.mean_step_s * 1e3:.3g} ms: r2 {fit.r2:.3f}, "
          f"median error {fit.median_relative_error:.1%}")
    print(f"profile written to {arguments.json}")


def _add_live_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--demo", type=Path, required=True, metavar="F", help="what `pars-fast demo --json F` wrote")
    add("--profile", required=True, metavar="F", help="what `pars-fast profile --json F` wrote, same machine")
    add("--ranker", default="default", help="the demo's ranker (%(default)s)")
    add("--ranker-delay", type=float, default=DEFAULT, metavar="S", help="seconds to score 8 prompts")
    add("--json", type=Path, metavar="F", help="write the comparison there")
    parser.set_defaults(run=_live_check)


def _live_check(arguments: argparse.Namespace) -> None:
    import os

    from pars_fast.errors import require_extra

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    require_extra("vllm", "cpu")
    if arguments.json:
        make_writable(arguments.json.parent)
    from pars_fast.simulation.live_check import BATCH_DELAY_S, TOLERANCE, live_check, read_demo
    from pars_fast.simulation.step_time import load_profile

    step_time, engine = load_profile(arguments.profile)
    delay = getattr(arguments, "ranker_delay", BATCH_DELAY_S)
    demo = read_demo(arguments.demo)
    result = live_check(demo, step_time, engine, ranker=arguments.ranker, ranker_delay_s=delay)
    _print_live_check(result)
    print(f"worst error of a mean {result['worst_mean_error']:.1%}, of a ratio to fcfs "
          f"{result['worst_ratio_error']:.1%}: {'within' if result['agrees'] else 'beyond'} {TOLERANCE:.0%}")
    if arguments.json:
        write_json(arguments.json, result)


def _print_live_check(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    headers = ("policy", "load", "end-to-end s, live", "simulated", "error", "s per token, live", "simulated",
               "error", "error of the ratios to fcfs")
    table = Table(*headers, title="Real server and faithful simulator, means")
    for row in result["rows"]:
        cells = [row["policy"], row["load"]]
        for column in ("mean_e2e_s", "mean_latency_per_token_s"):
            cells += [f"{row[f'live_{column}']:.4g}", f"{row[f'simulated_{column}']:.4g}",
                      f"{row[f'{column}_error']:+.1%}"]
        ratios = (row[f"{column}_ratio_error"] for column in ("mean_e2e_s", "mean_latency_per_token_s"))
        table.add_row(*cells, ", ".join(f"{error:+.1%}" for error in ratios))
    Console().print(table)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making the folder if need be.

    Raises: OutputError: if it cannot be written.
    """
    make_writable(path.parent)
    try:
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
