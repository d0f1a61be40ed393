"""Plots of a file of results: one SVG an op, from the CSV alone, the same bytes each time.

Times against the op's largest numeric size, p20 to p80 as a band, the hardware's limit dotted where it is
known; bars where an op was measured at one size only.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pars_fast.bench_results import Report, Row
from pars_fast.errors import DataError, make_writable, require_extra


def plot(report: Report, out: Path) -> list[Path]:
    """Write `OP.svg` into the folder `out` for each op that was measured; their paths.

    Raises: MissingExtraError: without matplotlib. DataError: if nothing was measured. OutputError: if the
        folder cannot be written.
    """
    require_extra("matplotlib", "bench")
    rows_of: dict[str, list[Row]] = defaultdict(list)
    for row in report.rows:
        if row.time_us is not None:
            rows_of[row.op].append(row)
    if not rows_of:
        raise DataError("nothing to plot: no case of the file was measured")
    make_writable(out)
    return [_plot_op(report, op, rows, out / f"{op}.svg") for op, rows in rows_of.items()]


def size_axis(rows: Sequence[Row]) -> str | None:
    """The numeric shape column that takes most values among the rows; None if none takes two."""
    sizes: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        for name, size in row.shape.items():
            if isinstance(size, int):
                sizes[name].add(size)
    axis = max(sizes, key=lambda name: len(sizes[name]), default=None)
    return axis if axis is not None and len(sizes[axis]) > 1 else None


def _plot_op(report: Report, op: str, rows: list[Row], path: Path) -> Path:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": op, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        axis = size_axis(rows)
        if axis is None:
            _draw_bars(axes, rows)
        else:
            _draw_lines(axes, report, rows, axis)
        machine = report.provenance["gpu"] or report.provenance["cpu"]
        axes.set_title(
            f"{op}: {machine}, {report.provenance['date']}, {report.provenance['commit']}", fontsize=9
        )
        figure.savefig(path, metadata={"Date": None})
    return path


def _draw_bars(axes: Any, rows: Sequence[Row]) -> None:
    labels = [_label(row, None) for row in rows]
    times = [row.time_us for row in rows if row.time_us is not None]
    below = [p50 - p20 for p20, p50, _ in times]
    above = [p80 - p50 for _, p50, p80 in times]
    axes.barh(labels, [time[1] for time in times], xerr=[below, above])
    axes.invert_yaxis()
    axes.set_xlabel("time, us (p50; p20 to p80)")


def _draw_lines(axes: Any, report: Report, rows: Sequence[Row], axis: str) -> None:
    lines: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for row in rows:
        size = row.shape.get(axis)
        if isinstance(size, int):
            lines[_label(row, axis)].append((size, row))
    limits: dict[int, float] = {}
    for label, points in lines.items():
        points.sort(key=lambda point: point[0])
        sizes = [size for size, _ in points]
        p20, p50, p80 = zip(*(row.time_us for _, row in points if row.time_us is not None), strict=True)
        (line,) = axes.plot(sizes, p50, marker="o", markersize=3, label=label)
        axes.fill_between(sizes, p20, p80, color=line.get_color(), alpha=0.2, linewidth=0)
        limits |= {size: limit for size, row in points if (limit := report.limit_us(row)) is not None}
    if limits:
        axes.plot(sorted(limits), [limits[size] for size in sorted(limits)], "k:", label="hardware limit")
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="time, us (p50; p20 to p80)")
    axes.legend(fontsize=8)


def _label(row: Row, axis: str | None) -> str:
    """Provider, and what beside the axis tells rows apart: sizes in words, such as a model's name."""
    words = [str(size) for name, size in row.shape.items() if isinstance(size, str) and name != axis]
    return ", ".join([row.provider, *words])
