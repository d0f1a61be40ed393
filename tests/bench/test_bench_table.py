import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pars_fast import bench_table
from pars_fast.bench_results import read_csv
from pars_fast.bench_table import print_report, quantiles_us, read_report, run_gpu_suite, run_suite
from pars_fast.cli import main
from pars_fast.errors import DataError, MissingExtraError, ParsFastError

from .conftest import PROVENANCE, MakeReport

MACHINE = {"provenance": PROVENANCE | {"gpu": ""}}


def benchmark(
    op: str, provider: str, baseline: str, times_s: list[float], shape: dict[str, int], **info: Any
) -> dict[str, Any]:
    extra_info = {"op": op, "provider": provider, "baseline": baseline, "shape": shape, **info}
    return {"extra_info": extra_info, "stats": {"data": times_s}}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What pytest-benchmark would write, cut down to what is read."""
    prompts, waiting = {"prompts": 16, "tokens": 900}, {"waiting": 100}
    benchmarks = [
        benchmark("score", "hf_eager", "hf_eager", [0.004] * 5, prompts),
        benchmark("score", "pars_fast", "hf_eager", [0.002] * 5, prompts, flops=10**9, kendall_tau=1.0),
        benchmark("queue_add", "pars_fast", "stock", [16e-6, 32e-6, 48e-6], waiting, operations=16),
        benchmark(
            "step",
            "pars_fast",
            "stock",
            [120e-6] * 3,
            waiting,
            baseline_time_us=[90.0, 100.0, 110.0],
            added_us=[19.0, 80.0],
        ),
    ]
    content = {
        "machine_info": MACHINE,
        "benchmarks": benchmarks,
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(content))
    return path


def test_rows_and_speed_up(results: Path) -> None:
    report = read_report(results)
    measured = [(row.op, row.provider, report.speed_up(row)) for row in report.rows]
    assert measured == [
        ("score", "hf_eager", None),
        ("score", "pars_fast", pytest.approx(2.0)),
        ("queue_add", "pars_fast", None),  # its baseline is not in the file
        ("step", "stock", None),
        ("step", "pars_fast", pytest.approx(100 / 120)),
    ]


def test_times_are_quantiles_of_one_operation(results: Path) -> None:
    rows = {(row.op, row.provider): row for row in read_report(results).rows}
    assert rows["queue_add", "pars_fast"].time_us == pytest.approx((1.4, 2.0, 2.6))
    assert rows["step", "stock"].time_us == (90.0, 100.0, 110.0)
    assert rows["step", "pars_fast"].added_us == (19.0, 80.0)


def test_quantiles_of_seconds_and_nanoseconds_agree() -> None:
    assert quantiles_us([1e-6, 2e-6, 3e-6]) == pytest.approx(quantiles_us([1000, 2000, 3000], ns_per_unit=1))


def test_work_and_tau_reach_the_row(results: Path) -> None:
    row = read_report(results).rows[1]
    assert (row.flops, row.bytes_moved, row.kendall_tau) == (10**9, None, 1.0)


def test_table_shows_measured_rows_and_the_machine(results: Path) -> None:
    console = Console(width=160, record=True)
    print_report(read_report(results), console)
    text = console.export_text()
    for part in ("2.00x", "0.83x", "16 prompts, 900 tokens", "+19 / +80", "1.0000", "Toy CPU", "threads 2"):
        assert part in text
    assert "not measured" not in text


def test_table_counts_what_was_not_measured(make_report: MakeReport) -> None:
    console = Console(width=160, record=True)
    print_report(make_report(), console)
    text = console.export_text()
    assert "1 of 6 cases not measured" in text
    assert "80.0%" in text  # of the limit
    assert "arrival_to_order" not in text


def test_command_prints_and_writes_rows(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, tidy = tmp_path / "out" / "rows.json", tmp_path / "out" / "rows.csv"
    assert main(["bench", "show", str(results), "--json", str(rows), "--csv", str(tidy)]) == 0
    assert "pars-fast bench" in capsys.readouterr().out
    records = json.loads(rows.read_text())
    assert records[4]["added_us_p99"] == 80.0
    assert len(read_csv(tidy).rows) == len(records)
    assert main(["bench", "show", str(tidy)]) == 0
    assert "16 prompts, 900 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; `pars-fast bench` without a file runs the suite"),
        ("{", "cannot be read as JSON"),
        ("[]", "no results of the suite"),
        ('{"benchmarks": [{"extra_info": {}}]}', "no results of the suite in bench/ (KeyError('op'))"),
        ('{"benchmarks": []}', "holds no results"),
    ],
    ids=["missing", "no JSON", "a list", "another suite", "empty"],
)
def test_a_file_that_is_no_result_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        read_report(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_suite_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_table, "ROOT", tmp_path)
    with pytest.raises(ParsFastError, match="run it from a checkout of the repository"):
        run_suite(tmp_path / "bench.json")
    with pytest.raises(ParsFastError, match="run it from a checkout of the repository"):
        run_gpu_suite(tmp_path / "gpu.csv")


def test_suite_needs_pytest_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pars-fast\[bench\]'"):
        run_suite(tmp_path / "bench.json")
