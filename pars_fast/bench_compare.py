"""Regression check between two files of results.

A case got slower when even the best fifth of the new times lies more than `threshold` above the worst fifth
of the old ones: p20 after > (1 + threshold) * p80 before. So spread alone is no regression. Faster is the
mirror image.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pars_fast.bench_results import Report, Row
from pars_fast.bench_table import shape_text
from pars_fast.errors import DataError

THRESHOLD = 0.10
Verdict = Literal["slower", "faster", "same"]


@dataclass(frozen=True, slots=True)
class Change:
    """One case, measured in both files."""

    before: Row
    after: Row
    verdict: Verdict

    @property
    def ratio(self) -> float:
        """Median time after over before."""
        assert self.before.time_us is not None
        assert self.after.time_us is not None
        return self.after.time_us[1] / self.before.time_us[1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`uncompared`: cases measured in one of the files only."""

    changes: list[Change]
    uncompared: list[Row]

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


def compare(before: Report, after: Report, threshold: float = THRESHOLD) -> Comparison:
    """Compare the cases that both reports measured.

    Raises: DataError: if there is no such case, or the reports come from different hardware.
    """
    for name in ("gpu", "cpu", "threads"):
        old, new = before.provenance[name], after.provenance[name]
        if old != new:
            raise DataError(
                f"the files come from different machines: {name} {old or 'none'} and {new or 'none'}"
            )
    old_rows, new_rows = ({row.case: row for row in report.rows if row.time_us} for report in (before, after))
    common = [case for case in old_rows if case in new_rows]
    if not common:
        raise DataError(
            f"no case is measured in both files: {len(old_rows)} cases of the first and {len(new_rows)} of "
            "the second have no op, provider and shape in common"
        )
    changes = [
        Change(old_rows[case], new_rows[case], _verdict(old_rows[case], new_rows[case], threshold))
        for case in common
    ]
    alone = old_rows.keys() ^ new_rows.keys()
    return Comparison(changes, [row for case, row in {**old_rows, **new_rows}.items() if case in alone])


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """All cases, those that got slower first."""
    console = console or Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title="pars-fast bench compare", box=SIMPLE)
    for header in ("op", "provider", "shape"):
        table.add_column(header)
    for header in ("before p50 us", "after p50 us", "change", ""):
        table.add_column(header, justify="right")
    for change in sorted(comparison.changes, key=lambda change: change.verdict != "slower"):
        before, after = change.before.time_us, change.after.time_us
        assert before is not None
        assert after is not None
        table.add_row(
            change.before.op,
            change.before.provider,
            shape_text(change.before),
            f"{before[1]:,.2f}",
            f"{after[1]:,.2f}",
            f"{change.ratio - 1:+.1%}",
            "" if change.verdict == "same" else change.verdict,
        )
    console.print(table)
    for row in comparison.uncompared:
        console.print(
            f"measured in one file only: {row.op}, {row.provider}, {shape_text(row)}", highlight=False
        )
    console.print(f"{len(comparison.slower)} of {len(comparison.changes)} cases got slower")


def _verdict(before: Row, after: Row, threshold: float) -> Verdict:
    assert before.time_us is not None
    assert after.time_us is not None
    if after.time_us[0] > (1 + threshold) * before.time_us[2]:
        return "slower"
    return "faster" if before.time_us[0] > (1 + threshold) * after.time_us[2] else "same"
