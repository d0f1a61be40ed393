"""The study: its tables have what they promise, are written and read whole, and make a page."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pars_fast import cli
from pars_fast.errors import DataError
from pars_fast.guards import FixedThreshold, NoGuard, PassingLimit
from pars_fast.kept_rows import read_rows
from pars_fast.simulation import study
from pars_fast.simulation.engine import EngineSettings
from pars_fast.simulation.step_time import PROFILES
from pars_fast.simulation.study import Study, find_traces, read_table, run_study, write_table
from pars_fast.simulation.study_page import render_page


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two traces of 160 requests, one of them without arrivals, and a study small enough for a test."""
    engine = EngineSettings(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_tokens=4800)
    for name, value in (("_ENGINES", (1, 3)), ("_REQUESTS_PER_ENGINE", 100), ("_FLEET_SEATS", 4),
                        ("_PIECES", 4), ("FRONTIER", (NoGuard(), FixedThreshold(1), PassingLimit())),
                        ("load_profile", lambda name: (PROFILES[name], engine))):
        monkeypatch.setattr(study, name, value)
    folder = tmp_path / "traces"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, spread in (("one", 1.0), ("two", 0.0)):
        arrivals = np.cumsum(rng.exponential(spread, 160))
        columns = arrivals, rng.integers(1, 60, 160), rng.geometric(1 / 40, 160)
        lines = [f"{t:.6f},{p},{o}\n" for t, p, o in zip(*columns, strict=True)]
        (folder / f"trace_{name}.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(lines))
    return folder


def make(table: str, traces: Path, kept: Path) -> list[dict[str, Any]]:
    return run_study(table, Study(find_traces(traces), kept, workers=1))


def test_tables_are_read_as_they_were_written(traces: Path, tmp_path: Path) -> None:
    tables = {name: make(name, traces, tmp_path / f"{name}.rows.jsonl")
              for name in ("frontier", "robustness", "no_harm", "fleet")}
    for name, rows in tables.items():
        write_table(tmp_path / f"{name}.csv", rows)
        read = read_table(tmp_path / f"{name}.csv")
        assert [{column: row[column] for column in rows[0]} for row in read] == rows
        assert {"profile", "version", "commit", "date"} <= read[0].keys()
    assert {row["workload"] for row in tables["frontier"]} == {"one", "two", "one + burst", "two + burst"}
    assert {row["tau"] for row in tables["frontier"] if row["policy"] == "pars_fast"} == {0.5}
    assert {row["varied"] for row in tables["robustness"]} == {"tau", "ranker_delay_s", "unscored_share"}
    assert {row["pieces"] for row in tables["no_harm"]} == {4}
    assert all(row["low"] <= row["change"] <= row["high"] for row in tables["no_harm"])
    assert {row["requests"] for row in tables["fleet"]} == {100, 300}
    page = render_page({name: read_table(tmp_path / f"{name}.csv") for name in study.TABLES})
    for heading in ("One setting for every trace", "Quality of the ranking", "Requests without a score",
                    "Below saturation", "Many engines behind one router", "Provenance"):
        assert heading in page
    assert "src=" not in page


def test_an_interrupted_table_goes_on(traces: Path, tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"
    rows = make("robustness", traces, kept)
    size = kept.stat().st_size
    assert make("robustness", traces, kept) == rows
    assert kept.stat().st_size == size


def test_every_table_is_of_the_requests_asked_for(traces: Path, tmp_path: Path) -> None:
    kept = {most: tmp_path / f"{most}.rows.jsonl" for most in (None, 80)}
    fleets = []
    for most, path in kept.items():
        one = Study(find_traces(traces)[:1], path, requests=most, workers=1)
        run_study("no_harm", one)
        assert {row["requests"] for row in read_rows(path).values()} == {(most or 160) // 4}
        fleets.append(run_study("fleet", one))
    assert fleets[0][0]["requests"] == fleets[1][0]["requests"] == 100
    assert fleets[0][0]["arrivals_sha256"] != fleets[1][0]["arrivals_sha256"]  # lengths of the first 80
    with pytest.raises(DataError, match="one: 3 requests are too few for 4 pieces"):
        run_study("no_harm", Study(find_traces(traces)[:1], tmp_path / "few.jsonl", requests=3))


def test_simulators_are_compared_column_by_column(traces: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="the faithful simulator drives vLLM's scheduler")
    one = Study(find_traces(traces)[:1], tmp_path / "rows.jsonl", requests=40, workers=1)
    rows = run_study("agreement", one)
    assert {row["policy"] for row in rows} == {"fcfs", "pars_fast"}
    assert all(abs(row["error"]) < 0.05 for row in rows)


def test_policies_are_compared_on_pieces_of_a_trace(traces: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="the faithful simulator drives vLLM's scheduler")
    monkeypatch.setattr(study, "COMPARED", ["fcfs", "pars_fast"])
    monkeypatch.setattr(study, "_POLICY_LOADS", (1.2,))
    one = Study(find_traces(traces)[:1], tmp_path / "rows.jsonl", requests=40, workers=1)
    rows = run_study("policies", one)
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert {row["requests"] for row in rows} == {40}
    assert len({row["arrivals_sha256"] for row in rows if row["policy"] == "fcfs"}) == 3
    assert len(rows) == 12  # ltr is there, too, without its guard, and pars under ours


def test_pairs_are_taken_by_piece() -> None:
    row = study._paired([1.0, 2.0, 3.0], [1.1, 2.1, 3.1])
    assert (row["fcfs"], row["change"], row["low"], row["high"]) == (2.0, 0.05, 0.05, 0.05)


def test_the_command_writes_table_and_page(traces: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    options = ["--traces", str(traces), "--out", str(out), "--requests", "80", "--workers", "1"]
    assert cli.main(["study", "frontier", *options]) == 0, capsys.readouterr().err
    assert cli.main(["study", "page", "--out", str(out), "--report", str(page)]) == 0
    assert page.read_text().count("<svg") == 1 + 2 * 4 + 2  # the strip, two policies and measures, two bursts
    assert {row["requests"] for row in read_table(out / "frontier.csv")} == {80}


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no trace_"):
        run_study("fleet", Study(find_traces(tmp_path), tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="make it by `pars-fast study frontier"):
        render_page({})
    assert cli.main(["study", "fleet", "--out", str(tmp_path)]) == 2
    assert "fleet needs --traces DIR" in capsys.readouterr().err
    options = ["--out", str(tmp_path), "--traces", str(tmp_path), "--requests", "0"]
    assert cli.main(["study", "fleet", *options]) == 2
    assert "--requests must be at least 1, got 0" in capsys.readouterr().err
