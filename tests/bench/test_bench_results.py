"""Rows, what follows from them, and the CSV."""

import csv
import re
import subprocess
from pathlib import Path

import pytest

from pars_fast import bench_results
from pars_fast.bench_results import (
    NOT_MEASURED,
    PROVENANCE,
    Report,
    Row,
    commit,
    machine,
    read_csv,
    write_csv,
)
from pars_fast.errors import DataError, OutputError

from .conftest import MakeReport


@pytest.fixture
def report(make_report: MakeReport) -> Report:
    return make_report()


def test_limits_come_from_the_peaks_of_the_same_run(report: Report) -> None:
    by_case = {(row.op, row.provider, row.shape.get("prompts")): row for row in report.rows}
    row = by_case["score", "pars_fast", 8]
    assert report.limit_us(row) == pytest.approx(800.0)  # 8e8 FLOPs at 1 TFLOP/s, past 20 us for the bytes
    assert report.fraction_of_limit(row) == pytest.approx(0.8)
    assert report.fraction_of_limit(by_case["peak_copy", "torch", None]) == pytest.approx(1.0)
    assert report.limit_us(by_case["arrival_to_order", "pars_fast", None]) is None


def test_bytes_are_the_limit_where_they_take_longer(report: Report) -> None:
    row = Row("score", "pars_fast", {"prompts": 1}, (100.0, 100.0, 100.0), bytes_moved=20_000, flops=10**6)
    assert report.limit_us(row) == pytest.approx(20.0)


def test_no_peak_no_limit() -> None:
    row = Row("score", "pars_fast", {"prompts": 8}, (1.0, 2.0, 3.0), flops=10**8)
    report = Report([row], dict.fromkeys(PROVENANCE, ""))
    assert report.limit_us(row) is None
    assert report.records()[0]["fraction_of_limit"] is None
    assert report.records()[0]["tflop_per_s"] == pytest.approx(50.0)


def test_csv_is_tidy(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.csv"
    write_csv(path, report)
    with path.open() as file:
        reader = csv.DictReader(file)
        records = list(reader)
    assert reader.fieldnames == [
        "op",
        "provider",
        *("bytes", "size", "model", "prompts", "waiting"),
        *("time_us_p20", "time_us_p50", "time_us_p80"),
        *("bytes_moved", "flops", "gb_per_s", "tflop_per_s", "limit_us", "fraction_of_limit"),
        *("kendall_tau", "added_us_p50", "added_us_p99"),
        *("gpu", "cpu", "threads", "versions", "commit", "date"),
    ]
    ours = records[3]
    assert (ours["model"], ours["prompts"], ours["waiting"]) == ("MiniLM-L6", "8", "")
    assert [ours[f"time_us_{quantile}"] for quantile in ("p20", "p50", "p80")] == [
        "900.0",
        "1000.0",
        "1050.0",
    ]
    assert (ours["gb_per_s"], ours["tflop_per_s"], ours["fraction_of_limit"]) == ("0.02", "0.8", "0.8")
    assert {record["date"] for record in records} == {"2026-01-02"}


def test_a_case_not_measured_keeps_its_name_and_has_no_figure(report: Report, tmp_path: Path) -> None:
    write_csv(tmp_path / "gpu.csv", report)
    with (tmp_path / "gpu.csv").open() as file:
        record = list(csv.DictReader(file))[-1]
    assert (record["op"], record["provider"], record["waiting"]) == ("arrival_to_order", "pars_fast", "1024")
    assert [record[f"time_us_{quantile}"] for quantile in ("p20", "p50", "p80")] == [NOT_MEASURED] * 3
    assert record["gb_per_s"] == record["tflop_per_s"] == record["fraction_of_limit"] == ""


def test_what_was_written_is_read_back(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "gpu.csv"
    write_csv(path, report)
    back = read_csv(path)
    assert back.provenance == report.provenance
    assert [row.case for row in back.rows] == [row.case for row in report.rows]
    assert [row.time_us for row in back.rows] == [row.time_us for row in report.rows]
    write_csv(tmp_path / "again.csv", back)
    assert (tmp_path / "again.csv").read_text() == path.read_text()


def test_a_file_that_is_no_result_is_named(report: Report, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    write_csv(good, report)
    text = good.read_text()
    for content, message in {
        None: "no such file",
        "": "no results of `pars-fast bench`, lacks columns op, provider",
        "kernel,shape\nx,y\n": "lacks columns op, provider",
        text.splitlines()[0] + "\n": "holds no results",
        text.replace("1000.0,", "fast,"): "damaged row (could not convert string to float: 'fast')",
        text.replace("1000.0,", "100.0,"): "damaged row (times must be positive and rise from p20 to p80",
    }.items():
        if content is not None:
            bad.write_text(content)
        with pytest.raises(DataError, match=re.escape(message)) as error:
            read_csv(bad)
        assert str(bad) in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_csv(tmp_path / "file" / "gpu.csv", report)


def test_the_machine_is_described() -> None:
    described = machine(2)
    assert tuple(described) == PROVENANCE
    assert described["cpu"]
    assert re.search(r"torch \d", described["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", described["date"])


def test_the_commit_says_whether_code_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_results, "ROOT", tmp_path)
    assert commit() == "none"

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "cpu.csv").write_text("old")
    (tmp_path / "code.py").write_text("old")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (results / "cpu.csv").write_text("new")
    assert re.fullmatch(r"[0-9a-f]{12}", commit())
    (tmp_path / "code.py").write_text("new")
    assert commit().endswith("-dirty")
