"""Plots are made from the file of results alone."""

import sys
from pathlib import Path

import pytest

from pars_fast.bench_plot import size_axis
from pars_fast.bench_results import Report, Row, write_csv
from pars_fast.cli import main

from .conftest import PROVENANCE, MakeReport


@pytest.fixture
def results(make_report: MakeReport, tmp_path: Path) -> Path:
    path = tmp_path / "gpu.csv"
    write_csv(path, make_report())
    return path


def test_one_plot_an_op_that_was_measured(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "plots"
    assert main(["bench", "plot", str(results), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"peak_copy.svg", "peak_matmul.svg", "score.svg"}
    picture = (out / "score.svg").read_text()
    for part in ("pars_fast, MiniLM-L6", "hf_eager", "hardware limit", "Toy GPU", "0123456789ab", "prompts"):
        assert part in picture
    assert main(["bench", "plot", str(results), "--out", str(out)]) == 0
    assert (out / "score.svg").read_text() == picture


def test_nothing_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "gpu.csv"
    write_csv(path, Report([Row("score", "pars_fast", {"prompts": 1}, None)], PROVENANCE))
    assert main(["bench", "plot", str(path), "--out", str(tmp_path)]) == 2
    assert "nothing to plot: no case of the file was measured" in capsys.readouterr().err


def test_matplotlib_is_asked_for(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "plot", str(results), "--out", str(tmp_path)]) == 2
    assert "pip install 'pars-fast[bench]'" in capsys.readouterr().err


def test_the_axis_is_the_size_that_varies_most(make_report: MakeReport) -> None:
    rows = make_report().rows
    assert size_axis(rows[2:5]) == "prompts"
    assert size_axis(rows[2:4]) is None
    assert size_axis([]) is None
