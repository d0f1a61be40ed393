"""`pars-fast simulate`, `profile` and `live-check`: heavy imports inside the commands."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pars_fast.errors import ParsFastError, make_writable, require_extra
from pars_fast.output import wide_console, write_json
from pars_fast.simulation.options import require_at_least

_TABLES = ("frontier", "robustness", "no_harm", "fleet", "agreement", "policies", "latency_load")


def _numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",")]


def _whole_numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def add_simulate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    trace = ("arrival_s,prompt_tokens,output_tokens[,score][,app], or a .jsonl of Mooncake's, whose prompts "
             "share prefixes; with --lengths only its times")
    add("--trace", "--arrivals", type=Path, metavar="F", help=trace)
    lengths = "length file: real prompts, which a ranker scores, at Poisson times or those of --trace"
    add("--lengths", type=Path, metavar="F", help=lengths)
    add("--model-column", help="--lengths: whose answers (the first column)")
    add("--ranker", default="default", help="--lengths: ranker directory, or none (%(default)s)")
    predictors = "--lengths: folder of `baseline`, whose predictors score for the policies they came with"
    add("--predictors", type=Path, metavar="DIR", help=predictors)
    add("--requests", type=int, metavar="N", help="only the first N of a trace; so many prompts (2000)")
    add("--poisson", action="store_true", help="--trace alone: Poisson arrivals instead of its own")
    add("--burst", type=float, default=0.0, metavar="SHARE", help="of the requests, all at once half-way")
    policies = "by comma, or all that the engine has and the scores allow (%(default)s)"
    add("--policies", default="all", help=policies)
    guards = "own, all, frontier, or by comma, as in none,passing_limit:beta=1 (%(default)s)"
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
        add(f"--{name}", type=int, default=argparse.SUPPRESS, metavar="N")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="on by itself, as in vLLM; without it preempted requests are computed again as a whole")
    add("--seed", type=_whole_numbers, default=[0], help="seeds, by comma (0)")
    add("--workers", type=int, metavar="N", help="processes (all cores)")
    add("--json", type=Path, metavar="F", help="write all rows there; F.rows.jsonl keeps them as they come")
    add("--report", type=Path, metavar="F.html", help="write a self-contained page there")
    parser.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> None:
    if arguments.trace is None and arguments.lengths is None:
        raise ParsFastError("give --trace, or prompts by --lengths, or both")
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


def add_study(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    tables = f"{', '.join(_TABLES)}; or page: draw those of --out"
    add("table", choices=[*_TABLES, "page"], help=tables)
    add("--traces", type=Path, metavar="DIR", help="trace_*.csv[.gz]: arrival_s,prompt_tokens,output_tokens")
    add("--out", type=Path, required=True, metavar="DIR", help="its CSV; rows as they come beside it")
    add("--requests", type=int, default=argparse.SUPPRESS, metavar="N", help="only the first N of a trace")
    add("--workers", type=int, metavar="N", help="processes (all cores)")
    add("--report", type=Path, metavar="F.html", help="page: write it there")
    parser.set_defaults(run=_study)


def _study(arguments: argparse.Namespace) -> None:
    require_extra("numba", "simulate")
    if arguments.table == "page":
        from pars_fast.simulation.study_page import write_page

        if arguments.report is None:
            raise ParsFastError("page needs --report F.html")
        make_writable(arguments.report.parent)
        write_page(arguments.report, arguments.out)
        print(f"page written to {arguments.report}")
        return
    if arguments.traces is None:
        raise ParsFastError(f"{arguments.table} needs --traces DIR")
    make_writable(arguments.out)  # minutes before it is written
    from pars_fast.simulation.study import Study, find_traces, run_study, write_table

    path = arguments.out / f"{arguments.table}.csv"
    given = {"requests": arguments.requests} if hasattr(arguments, "requests") else {}
    require_at_least(1, "--requests", *given.values())
    study = Study(find_traces(arguments.traces), path.with_suffix(".rows.jsonl"), workers=arguments.workers,
                  on_progress=lambda line: print(line, end="\r", flush=True), **given)
    write_table(path, run_study(arguments.table, study))
    print(f"table written to {path}")


def add_serving_gain(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    predictor = "as of evaluate --all (default small prompt_length)"
    rankers = ["default", "small", "prompt_length"]
    add("--ranker", nargs="+", default=rankers, metavar="[NAME=]DIR", help=predictor)
    files = "lengths_*.jsonl[.gz] (%(default)s)"
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help=files)
    add("--traces", type=Path, required=True, metavar="DIR", help="trace_*.csv[.gz], whose times are taken")
    add("--load", type=_numbers, default=[1.0, 1.2], help="offered over closed-loop tokens/s (1.0,1.2)")
    add("--seeds", type=int, default=3, metavar="N", help="draws of prompts and models (%(default)s)")
    for name in ("requests", "max-prompts-per-file"):
        add(f"--{name}", type=int, default=argparse.SUPPRESS, metavar="N")
    add("--csv", type=Path, required=True, metavar="F", help="write the table there")
    parser.set_defaults(run=_serving_gain)


def _serving_gain(arguments: argparse.Namespace) -> None:
    sizes = ("requests", "max_prompts_per_file")
    given = {name: getattr(arguments, name) for name in sizes if hasattr(arguments, name)}
    for name, number in {"seeds": arguments.seeds, **given}.items():
        require_at_least(1, "--" + name.replace("_", "-"), number)
    require_extra("numba", "simulate")
    make_writable(arguments.csv.parent)  # minutes before it is written
    from pars_fast.baselines import load_predictor
    from pars_fast.benchmark import read_length_files
    from pars_fast.simulation.serving_gain import print_gains, serving_gain
    from pars_fast.simulation.study import read_timed_traces, write_table

    traces = read_timed_traces(arguments.traces)
    predictors = {}
    for text in arguments.ranker:
        name, path = text.split("=", 1) if "=" in text else (Path(text).name, text)
        predictors[name] = load_predictor(path)
    rows = serving_gain(read_length_files(arguments.data_dir), predictors, traces, loads=arguments.load,
                        seeds=range(arguments.seeds), on_progress=lambda line: print(line, flush=True),
                        **given)
    write_table(arguments.csv, rows)
    print_gains(rows)


def add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="write the profile there")
    parser.add_argument("--model", help="model to serve; by default a tiny random one is made")
    parser.set_defaults(run=_profile)


def _profile(arguments: argparse.Namespace) -> None:
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


def add_live_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--live", type=Path, required=True, metavar="F", help="what `pars-fast demo` or `load` wrote as JSON")
    add("--ranker", default="auto", help="the server's ranker (%(default)s)")
    delay = "seconds from prompts to their scores; by default what each run measured"
    add("--ranker-delay", type=float, metavar="S", help=delay)
    add("--json", type=Path, metavar="F", help="write the comparison there")
    parser.set_defaults(run=_live_check)


def _live_check(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    require_extra("vllm", "cpu")
    if arguments.json:
        make_writable(arguments.json.parent)
    from pars_fast.simulation.live_check import live_check, read_result

    result = live_check(read_result(arguments.live), ranker=arguments.ranker,
                        ranker_delay_s=arguments.ranker_delay)
    _print_live_check(result)
    if arguments.json:
        write_json(arguments.json, result)


def _print_live_check(result: dict[str, Any]) -> None:
    """A table of means and one of ratios to arrival order, and by column how many agree."""
    from pars_fast.simulation.live_check import BASELINE, JUDGED

    ranked = [row for row in result["rows"] if row["policy"] != BASELINE]
    print_compared("Means, s", JUDGED, "", result["rows"], result["tolerance"])
    print_compared("Ratios to fcfs", JUDGED, "_ratio", ranked, result["tolerance"])
    for column, judged in result["columns"].items():
        parts = (f"{judged[f'{kind}_within']} of {judged[f'{kind}_rows']} {kind}s within "
                 f"{result['tolerance']:.0%}, worst {_percent(judged[f'worst_{kind}_error'])}"
                 for kind in ("mean", "ratio"))
        print(f"{column}: {'; '.join(parts)}")
    print(f"the simulator {'agrees' if result['agrees'] else 'does not agree'} with the server on "
          f"{' and '.join(JUDGED)}")


def print_compared(title: str, columns: Sequence[str], suffix: str, rows: Sequence[dict[str, Any]],
                    tolerance: float) -> None:
    """Live, simulated and error of each column; an error beyond the tolerance is marked."""
    from rich.table import Table

    headers = [header for column in columns for header in (f"{column}, live", "simulated", "error")]
    table = Table("load", "policy", *headers, title=title)
    for row in rows:
        cells = [str(row["load"]), row["policy"]]
        for column in columns:
            error = row[f"{column}{suffix}_error"]
            values = (row[f"{side}_{column}{suffix}"] for side in ("live", "simulated"))
            cells += ["-" if value is None else f"{value:.4g}" for value in values]
            cells.append(_percent(error, "+") + ("" if error is None or abs(error) <= tolerance else " !"))
        table.add_row(*cells)
    wide_console().print(table)


def _percent(share: float | None, sign: str = "") -> str:
    return "-" if share is None else f"{share:{sign}.1%}"
