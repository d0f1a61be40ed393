"""The CPU suite: run it, read pytest-benchmark's JSON, print any report as a table.

A benchmark's `extra_info` says what was timed: `op`, `provider`, `shape` (what made it large or small), and
where they apply `baseline`, `bytes_moved`, `flops`, `kendall_tau`, `added_us` (see `bench_results.Row`),
`operations` (how many one round did), `time_us` (p20, p50, p80 where the benchmark timed a part of its round
itself) and `baseline_time_us` (the same of a baseline timed in turn with it). `machine_info` holds the run's
`provenance`.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pars_fast.bench_results import PROVENANCE, ROOT, Report, Row, Times
from pars_fast.errors import DataError, ParsFastError, make_writable, require_extra

SUITE_JSON = ROOT / "out" / "bench.json"


def read_report(path: Path) -> Report:
    """Read pytest-benchmark's JSON.

    Raises: DataError: if the file is missing, no JSON, or not of this suite; names it.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; `pars-fast bench` without a file runs the suite") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    try:
        rows = [row for benchmark in content["benchmarks"] for row in _rows(benchmark)]
        if rows:
            provenance = content["machine_info"]["provenance"]
            return Report(rows, {name: provenance[name] for name in PROVENANCE})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no results of the suite in bench/ ({error!r})") from error
    raise DataError(f"{path}: holds no results; was every benchmark skipped?")


def quantiles_us(values: Sequence[float], *, ns_per_unit: float = 1e9) -> Times:
    """p20, p50, p80 in microseconds of times in seconds, or in another unit."""
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)) * (ns_per_unit / 1e3)
    return float(p20), float(p50), float(p80)


def run_suite(out: Path) -> None:
    """Run the repository's suite; pytest-benchmark's JSON goes to `out`.

    Raises: MissingExtraError: without pytest-benchmark. ParsFastError: outside a checkout, or if it fails.
    """
    require_suite()
    require_extra("pytest_benchmark", "bench")
    make_writable(out.parent)
    options = ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={out.resolve()}"]
    code = subprocess.run([sys.executable, "-m", "pytest", "bench", *options], cwd=ROOT).returncode
    if code:
        raise ParsFastError(f"the benchmark suite failed (pytest ended with code {code})")


def run_gpu_suite(csv: Path, only: str | None = None) -> int:
    """Run the repository's GPU cases, or those of the ops that `only` names by comma; they write their own
    CSV. The exit status of that command.

    Raises: ParsFastError: outside a checkout.
    """
    require_suite()
    command = [sys.executable, "-m", "bench.gpu", "--csv", str(csv.resolve())]
    if only is not None:
        command += ["--only", only]
    return subprocess.run(command, cwd=ROOT).returncode


def require_suite() -> None:
    """Raises: ParsFastError: outside a checkout, where there is nothing to run."""
    if not (ROOT / "bench" / "bench_scoring.py").exists():
        raise ParsFastError(
            "the benchmark suite is not in the installed package; run it from a checkout of the repository"
        )


def print_report(report: Report, console: Console | None = None) -> None:
    """The table of what was measured, and below it the machine."""
    console = console or Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title="pars-fast bench", box=SIMPLE)
    for header in ("op", "provider"):
        table.add_column(header, no_wrap=True)
    table.add_column("shape")
    for header in ("p20 us", "p50 us", "p80 us", "speed-up", "of limit", "tau", "added us p50 / p99"):
        table.add_column(header, justify="right")
    measured = [row for row in report.rows if row.time_us is not None]
    for previous, row in zip([None, *measured], measured, strict=False):
        if previous is not None and previous.op != row.op:
            table.add_section()
        table.add_row(*_cells(report, row))
    console.print(table)
    if missing := len(report.rows) - len(measured):
        console.print(f"{missing} of {len(report.rows)} cases not measured")
    given = {name: value for name, value in report.provenance.items() if value}
    console.print(", ".join(f"{name} {value}" for name, value in given.items()), highlight=False)


def shape_text(row: Row) -> str:
    """A row's shape in words: `16 prompts, 900 tokens`."""
    return ", ".join(
        f"{size:,} {name}" if isinstance(size, int) else f"{name} {size}" for name, size in row.shape.items()
    )


def _rows(benchmark: dict[str, Any]) -> list[Row]:
    info = benchmark["extra_info"]
    op, baseline, shape = info["op"], info.get("baseline"), info["shape"]
    of_a_round = info.get("time_us") or quantiles_us(benchmark["stats"]["data"])
    p20, p50, p80 = (time / info.get("operations", 1) for time in of_a_round)
    row = Row(
        op,
        info["provider"],
        shape,
        (p20, p50, p80),
        baseline,
        info.get("bytes_moved"),
        info.get("flops"),
        info.get("kendall_tau"),
        tuple(info["added_us"]) if "added_us" in info else None,
    )
    if "baseline_time_us" in info:
        return [Row(op, baseline, shape, tuple(info["baseline_time_us"]), baseline), row]
    return [row]


def _cells(report: Report, row: Row) -> list[str]:
    assert row.time_us is not None
    speed_up, fraction = report.speed_up(row), report.fraction_of_limit(row)
    if speed_up is not None:
        compared = f"{speed_up:.2f}x"
    else:
        compared = "baseline" if row.provider == row.baseline else ""
    return [
        row.op,
        row.provider,
        shape_text(row),
        *(f"{time:,.2f}" if time < 10 else f"{time:,.0f}" for time in row.time_us),
        compared,
        "" if fraction is None else f"{fraction:.1%}",
        "" if row.kendall_tau is None else f"{row.kendall_tau:.4f}",
        "" if row.added_us is None else " / ".join(f"{time:+,.0f}" for time in row.added_us),
    ]
