import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pars_fast import bench_table
from pars_fast.bench_table import print_report, quantiles_us, read_report, run_suite, write_csv
from pars_fast.cli import main
from pars_fast.errors import DataError, MissingExtraError, ParsFastError

MACHINE = {
    "cpu": {"brand_raw": "Toy CPU"},
    "processor": "x86_64",
    "torch_threads": 2,
    "versions": {"pars_fast": "0.1.0", "torch": "2.13.0"},
}


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
        benchmark("score", "pars_fast", "hf_eager", [0.002] * 5, prompts),
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
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": benchmarks,
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(content))
    return path


def test_rows_and_speed_up(results: Path) -> None:
    report = read_report(results)
    measured = [(row.op, row.provider, report.speed_up(row)) for row in report.rows if row.time_us]
    assert measured == [
        ("score", "hf_eager", None),
        ("score", "pars_fast", pytest.approx(2.0)),
        ("queue_add", "pars_fast", None),  # its baseline is not in the file
        ("step", "stock", None),
        ("step", "pars_fast", pytest.approx(100 / 120)),
    ]


def test_times_are_quantiles_of_one_operation(results: Path) -> None:
    rows = {(row.op, row.provider): row for row in read_report(results).rows if row.device == "cpu"}
    assert rows["queue_add", "pars_fast"].time_us == pytest.approx((1.4, 2.0, 2.6))
    assert rows["step", "stock"].time_us == (90.0, 100.0, 110.0)
    assert rows["step", "pars_fast"].added_us == (19.0, 80.0)


def test_quantiles_of_seconds_and_nanoseconds_agree() -> None:
    assert quantiles_us([1e-6, 2e-6, 3e-6]) == pytest.approx(quantiles_us([1000, 2000, 3000], ns_per_unit=1))


def test_csv_is_tidy_and_says_what_was_not_measured(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.csv"
    write_csv(path, read_report(results))
    with path.open() as file:
        records = list(csv.DictReader(file))
    score = records[1]
    assert (score["op"], score["provider"], score["prompts"], score["waiting"]) == (
        "score",
        "pars_fast",
        "16",
        "",
    )
    assert [score[f"time_us_{q}"] for q in ("p20", "p50", "p80")] == ["2000.0"] * 3
    assert (score["cpu"], score["threads"], score["torch"]) == ("Toy CPU", "2", "2.13.0")
    assert (score["commit"], score["date"]) == ("0123456789ab-dirty", "2026-01-02")
    gpu = [record for record in records if record["device"] == "gpu"]
    assert {record["time_us_p50"] for record in gpu} == {"not measured"}
    assert [(record["op"], record["provider"]) for record in gpu] == [
        ("score", "hf_eager"),
        ("score", "pars_fast"),
    ]


def test_table_shows_measured_rows_and_the_machine(results: Path) -> None:
    console = Console(width=160, record=True)
    print_report(read_report(results), console)
    text = console.export_text()
    for part in ("2.00x", "0.83x", "16 prompts, 900 tokens", "+19 / +80", "Toy CPU", "threads 2"):
        assert part in text
    assert "gpu" not in text


def test_command_prints_and_writes_rows(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, tidy = tmp_path / "out" / "rows.json", tmp_path / "out" / "rows.csv"
    assert main(["bench", str(results), "--json", str(rows), "--csv", str(tidy)]) == 0
    assert "pars-fast bench" in capsys.readouterr().out
    records = json.loads(rows.read_text())
    assert records[4]["added_us_p99"] == 80.0
    assert records[-1]["time_us_p50"] is None
    assert len(tidy.read_text().splitlines()) == len(records) + 1


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


def test_suite_needs_pytest_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pars-fast\[bench\]'"):
        run_suite(tmp_path / "bench.json")
