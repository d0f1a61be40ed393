"""The regression check: what counts as slower, and how the command says so."""

from pathlib import Path

import pytest
from rich.console import Console

from pars_fast.bench_compare import compare, print_comparison
from pars_fast.bench_results import Report, Row, write_csv
from pars_fast.cli import main
from pars_fast.errors import DataError

from .conftest import PROVENANCE, MakeReport

Times = tuple[float, float, float]


def one_case(times: Times, **shape: int) -> Report:
    return Report([Row("score", "pars_fast", shape or {"prompts": 1}, times)], PROVENANCE)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((111.0, 112.0, 113.0), "slower"),
        ((109.0, 300.0, 400.0), "same"),  # the median is worse, but within the spread
        ((98.0, 99.0, 110.0), "same"),
        ((70.0, 75.0, 79.0), "faster"),
    ],
    ids=str,
)
def test_slower_is_beyond_the_spread_and_the_threshold(after: Times, verdict: str) -> None:
    (change,) = compare(one_case((90.0, 95.0, 100.0)), one_case(after)).changes
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(after[1] / 95.0)


def test_the_threshold_can_be_set() -> None:
    before, after = one_case((90.0, 95.0, 100.0)), one_case((111.0, 112.0, 113.0))
    assert compare(before, after, threshold=0.2).slower == []


def test_cases_of_one_file_only_are_listed(make_report: MakeReport) -> None:
    before, after = make_report(), make_report()
    del after.rows[3]
    comparison = compare(before, after)
    assert [(row.op, row.provider, row.shape["prompts"]) for row in comparison.uncompared] == [
        ("score", "pars_fast", 8)
    ]
    console = Console(width=150, record=True)
    print_comparison(comparison, console)
    assert "measured in one file only: score, pars_fast, model MiniLM-L6, 8 prompts" in console.export_text()


def test_files_of_other_shape_are_refused() -> None:
    with pytest.raises(DataError, match="no case is measured in both files: 1 cases of the first and 1 of"):
        compare(one_case((1.0, 2.0, 3.0)), one_case((1.0, 2.0, 3.0), prompts=2))


def test_files_of_other_machines_are_refused(make_report: MakeReport) -> None:
    with pytest.raises(DataError, match=r"different machines: gpu Toy GPU, 700\.00 W and none"):
        compare(make_report(), make_report(gpu=""))


def test_command(make_report: MakeReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = str(tmp_path / "old.csv"), str(tmp_path / "new.csv")
    write_csv(Path(old), make_report())
    write_csv(Path(new), make_report(scale=1.5))
    assert main(["bench", "compare", old, old]) == 0
    assert "0 of 5 cases got slower" in capsys.readouterr().out
    assert main(["bench", "compare", old, new]) == 1
    shown = capsys.readouterr().out
    assert "3 of 5 cases got slower" in shown
    assert "+50.0%" in shown
    assert main(["bench", "compare", old, new, "--threshold", "0.6"]) == 0
    assert main(["bench", "compare", old, new, "--threshold", "-1"]) == 2
    assert "--threshold must not be negative, got -1.0" in capsys.readouterr().err
    assert main(["bench", "compare", old, str(tmp_path / "none.csv")]) == 2
    assert "none.csv: no such file" in capsys.readouterr().err
