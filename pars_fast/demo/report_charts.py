"""The charts of the demo's page, inline SVG, with the sentences that stand beside them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pars_fast.demo.records import ServedRequest
from pars_fast.demo.report_data import DESCRIPTIONS, OURS, Data, light_interval, light_runs, unique_requests
from pars_fast.page import DASH as _DASH
from pars_fast.page import Axis as _Axis
from pars_fast.page import Markup as _Markup
from pars_fast.page import as_float as _as_float
from pars_fast.page import join as _join
from pars_fast.page import number as _number
from pars_fast.page import percent as _percent
from pars_fast.page import seconds as _seconds
from pars_fast.page import svg as _svg
from pars_fast.page import tag as _tag
from pars_fast.page import text as _text
from pars_fast.page import x_axis as _x_axis
from pars_fast.page import y_axis as _y_axis

_MARKERS = (  # drawn around (0, 0) at radius 1; with the colour they tell sources apart without colour vision
    "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z",
    "M-.9 -.9H.9V.9H-.9Z",
    "M0 -1.2L1.15 .85H-1.15Z",
    "M0 -1.3L1.3 0L0 1.3L-1.3 0Z",
)
_SOURCE_COLOURS = 8
_NARROW = 360  # drawing width for phones; every chart is drawn twice so that its text stays readable


@dataclass(frozen=True)
class _Steps:
    """A step function of x for one policy: the value is `ys[i]` from `xs[i]` on, and 0 before."""

    policy: str
    label: str
    xs: np.ndarray
    ys: np.ndarray

    def at(self, x: np.ndarray) -> np.ndarray:
        padded = np.concatenate([[0.0], self.ys])
        return np.asarray(padded[np.searchsorted(self.xs, x, side="right")])

    def path(self, x: _Axis, y: _Axis) -> str:
        """SVG path; steps too small to see are merged."""
        parts, shown_x, shown_y = [f"M{x.start:.1f} {y(0):.1f}"], x.start, y(0)
        for px, py in zip(map(x, self.xs), map(y, self.ys), strict=True):
            if abs(px - shown_x) < 0.4 and abs(py - shown_y) < 0.4:
                continue
            parts.append(f"H{px:.1f}V{py:.1f}")
            shown_x, shown_y = px, py
        return "".join([*parts, f"H{x.end:.1f}"])


def _responsive(draw: Callable[[int, str], _Markup], wide: int) -> _Markup:
    """The chart drawn for a wide and for a narrow screen; CSS shows one."""
    return _join([draw(wide, "wide"), draw(_NARROW, "narrow")])


def _curves(data: Data, curves: Sequence[_Steps], x: _Axis, y: _Axis) -> _Markup:
    """Step lines, the baseline at the back, each named where there is room beside it."""
    drawn = [_tag("path", d=curve.path(x, y), data_key=curve.policy,
                  class_=f"curve {data.style(curve.policy)}") for curve in curves]
    return _join([*drawn, *_direct_labels(data, curves, x, y)])


def _direct_labels(data: Data, curves: Sequence[_Steps], x: _Axis, y: _Axis) -> list[_Markup]:
    """Place each curve's name close to it, off all curves and off the other names."""
    room = _Room.around(curves, x, y)
    labels: list[_Markup] = []
    taken: list[_Box] = []
    for row in sorted(range(len(curves)), key=lambda row: curves[row].policy != OURS):  # ours chooses first
        box, anchor = room.best(row, 7.8 * len(curves[row].label) + 4, taken)
        taken.append(box)
        labels.append(_label(data, curves[row], box, anchor))
    return labels


_Box = tuple[float, float, float, float]  # left, top, right, bottom
_Point = tuple[float, float]


@dataclass(frozen=True)
class _Room:
    """A plot's curves in pixels, a row a curve, a column every two pixels, to find room for their names."""

    heights: np.ndarray
    tops: np.ndarray  # a step covers all heights between its ends
    bottoms: np.ndarray
    frame: _Box

    @classmethod
    def around(cls, curves: Sequence[_Steps], x: _Axis, y: _Axis) -> "_Room":
        columns = np.arange(x.start, x.end, 2.0)
        values = np.array([_invert(x, float(column)) for column in columns])
        heights = np.array([[y(value) for value in curve.at(values)] for curve in curves])
        ends = np.stack([heights[:, :-1], heights[:, 1:]])
        return cls(heights, ends.min(axis=0), ends.max(axis=0), (x.start, y.end, x.end, y.start))

    def best(self, row: int, width: float, taken: Sequence[_Box]) -> tuple[_Box, _Point]:
        """The cheapest place for a label of that width and the point of its curve that it belongs to."""
        left, top, _, _ = self.frame
        best: tuple[float, _Box, _Point] = (math.inf, (left, top, left + width, top + 18), (left, top))
        for column in range(0, self.heights.shape[1], max(4, self.heights.shape[1] // 40)):
            anchor = left + 2.0 * column, float(self.heights[row, column])
            gaps = np.abs(self.heights[:, column] - anchor[1])
            crowd = float(np.maximum(0.0, 14 - gaps).sum())  # named best where it is alone
            for box in self._boxes(anchor, width):
                cost = crowd + abs((box[1] + box[3]) / 2 - anchor[1]) / 14
                if cost >= best[0] or any(_overlap(box, other) for other in taken):
                    continue
                cost += self._cost(row, box)
                if cost < best[0]:
                    best = cost, box, anchor
        return best[1], best[2]

    def _boxes(self, anchor: _Point, width: float) -> list[_Box]:
        """Places for a label around a point, inside the frame."""
        left, top, right, bottom = self.frame
        boxes = [(anchor[0] + dx, anchor[1] + dy - 9, anchor[0] + dx + width, anchor[1] + dy + 9)
                 for dx in (-width - 10, -width / 2, 10.0) for dy in (-44, -28, -14, 0, 14, 28, 44)]
        return [box for box in boxes if left + 2 <= box[0] and box[2] <= right
                and top - 4 <= box[1] and box[3] <= bottom - 3]

    def _cost(self, row: int, box: _Box) -> float:
        """How much of the curves a label there covers, and how much nearer another curve is than its own."""
        near = slice(max(0, int((box[0] - 5 - self.frame[0]) // 2)), int((box[2] + 5 - self.frame[0]) // 2))
        gaps = np.maximum(self.tops[:, near] - box[3], box[1] - self.bottoms[:, near])
        nearest = np.maximum(gaps.min(axis=1), 0.0)
        own, nearest[row] = float(nearest[row]), 1e3
        return 3.0 * int(np.count_nonzero(gaps < 3)) + max(0.0, own + 10 - float(nearest.min()))


def _overlap(box: _Box, other: _Box) -> bool:
    """True if two labels touch or nearly do."""
    return (box[0] < other[2] + 8 and other[0] < box[2] + 8
            and box[1] < other[3] + 4 and other[1] < box[3] + 4)


def _label(data: Data, curve: _Steps, box: _Box, anchor: _Point) -> _Markup:
    left, top, right, bottom = box
    name = _text(left + 2, bottom - 4.5, curve.label, data_key=curve.policy,
                 class_=f"name {data.style(curve.policy)}")
    near = min(max(anchor[0], left), right), min(max(anchor[1], top), bottom)
    if math.dist(near, anchor) <= 16:
        return name
    leader = _tag("line", x1=float(near[0]), y1=float(near[1]), x2=float(anchor[0]), y2=float(anchor[1]),
                  class_=f"leader {data.style(curve.policy)}", data_key=curve.policy)
    return _join([leader, name])


def _invert(axis: _Axis, pixel: float) -> float:
    share = (pixel - axis.start) / (axis.end - axis.start)
    if axis.log:
        return float(axis.low * (axis.high / axis.low) ** share)
    return axis.low + (axis.high - axis.low) * share


def _no_data() -> _Markup:
    return _tag("p", "No data.", class_="note")


def policy_name(policy: str, width: float) -> str:
    """A policy's name, with its meaning where there is room."""
    return f"{policy} ({DESCRIPTIONS[policy]})" if policy in DESCRIPTIONS and width > _NARROW else policy


def _waiting(requests: Sequence[ServedRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Times and the number waiting from each on; who never got a first token waits to the end."""
    arrivals = [(request.arrival_s, 1) for request in requests]
    starts = [(request.first_token_s, -1) for request in requests if request.first_token_s is not None]
    events = sorted([*arrivals, *starts])
    times = np.array([time for time, _ in events])
    return times, np.cumsum([change for _, change in events]).astype(float)


def queue_text(data: Data) -> str:
    runs = data.first_repeat()
    peaks = [f"{_waiting(runs[policy].requests)[1].max():.0f} under {policy}" for policy in data.policies
             if policy in runs and runs[policy].requests]
    return f"Most waiting at once: {', '.join(peaks) or _DASH}."


def queue_chart(data: Data) -> _Markup:
    runs = {policy: run for policy, run in data.first_repeat().items() if run.requests}
    if not runs:
        return _no_data()
    series = {policy: _waiting(runs[policy].requests) for policy in data.policies if policy in runs}
    arrivals = [request.arrival_s for request in next(iter(runs.values())).requests]
    desc = f"{queue_text(data)} Bars at the foot count arrivals."

    def draw(width: int, variant: str) -> _Markup:
        curves = [_Steps(policy, policy_name(policy, width), xs, ys) for policy, (xs, ys) in series.items()]
        foot, bottom = (54.0, 330.0) if width > _NARROW else (44.0, 250.0)
        left, right = 44.0, width - 8.0
        x = _Axis(0, max(float(curve.xs.max()) for curve in curves) * 1.01 or 1.0, left, right)
        y = _Axis(0, max(float(curve.ys.max()) for curve in curves) * 1.06 or 1.0, bottom, 26.0)
        bars = _arrival_bars(arrivals, x, top=bottom + 10, base=bottom + foot, above=26.0)
        return _svg("queue", variant, width, bottom + foot + 42, "Requests waiting over time", desc,
                    bars, _x_axis(x, 26.0, bottom + foot, x.ticks(8 if width > _NARROW else 4), _clock),
                    _y_axis(y, left, right, y.ticks(5), lambda tick: f"{tick:.0f}"),
                    _text(left - 8, 12, "waiting", text_anchor="start", dx=-28),
                    _text(right, bottom + foot + 38, "time since the first arrival", text_anchor="end"),
                    _curves(data, curves, x, y))

    return _tag("div", _responsive(draw, 1040), data_scope="")


def _clock(seconds: float) -> str:
    return f"{seconds:g} s"


def _arrival_bars(arrivals: Sequence[float], x: _Axis, *, top: float, base: float, above: float) -> _Markup:
    """A histogram of arrivals under the queue, the burst named if one bin stands out."""
    bins = 60 if x.end - x.start > 600 else 36
    counts, edges = np.histogram(arrivals, bins=bins, range=(0.0, x.high))
    unit = (base - top) / counts.max()
    bars = [_tag("rect", x=x(edges[k]) + 0.5, width=x(edges[k + 1]) - x(edges[k]) - 1.0, class_="arrivals",
                 y=float(base - unit * count), height=float(unit * count))
            for k, count in enumerate(counts) if count]
    parts = [_text(x.end, top + 12, "arrivals", text_anchor="end"), *bars]
    burst = _burst(counts)
    if burst is None:
        return _join(parts)
    first, last = burst
    start, end = x(edges[first]), x(edges[last + 1])
    total, length = int(counts[first:last + 1].sum()), float(edges[last + 1] - edges[first])
    shade = _tag("rect", x=start, width=end - start, y=above, height=base - above, class_="burst")
    text = f"burst: {total} arrivals in {_number(length, 2)} s"
    fits = start + 7 * len(text) < x.end
    name = _text(start, 12, text) if fits else _text(end, 12, text, text_anchor="end")
    return _join([shade, *parts, name])


def _burst(counts: np.ndarray) -> tuple[int, int] | None:
    """First and last of the bins around the peak that stand well over the usual; None without a burst."""
    busy = counts[counts > 0]
    usual = float(np.median(busy))
    peak = int(counts.argmax())
    if counts[peak] < max(2.5 * usual, usual + 4):
        return None
    first = last = peak
    while first > 0 and counts[first - 1] >= 2 * usual:
        first -= 1
    while last + 1 < len(counts) and counts[last + 1] >= 2 * usual:
        last += 1
    return first, last


def cdf_chart(data: Data, name: str, title: str, latency: Callable[[ServedRequest], float]) -> _Markup:
    """Share of requests done within a latency, log x; who never finished stays in the denominator."""
    series: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for policy in data.policies:
        requests = data.requests(policy)
        values = np.sort([latency(request) for request in requests if request.completed])
        if len(values):
            series[policy] = np.maximum(values, 1e-4), np.arange(1, len(values) + 1) / len(requests)
    if not series:
        return _no_data()
    medians = {policy: float(np.median(xs)) for policy, (xs, _) in series.items()}
    desc = "Medians: " + ", ".join(f"{policy} {_seconds(median)}" for policy, median in medians.items()) + "."
    low = min(float(np.quantile(xs, 0.01)) for xs, _ in series.values())
    high = max(float(xs[-1]) for xs, _ in series.values())

    def draw(width: int, variant: str) -> _Markup:
        labels = {policy: f"{policy} · median {_seconds(median, 2)}" if width > _NARROW else policy
                  for policy, median in medians.items()}
        curves = [_Steps(policy, labels[policy], xs, ys) for policy, (xs, ys) in series.items()]
        height, left = (320.0, 48.0) if width > _NARROW else (290.0, 44.0)
        x = _Axis(low * 0.85, high * 1.18, left, width - 8.0, log=True)
        y = _Axis(0, 1, height - 44, 12.0)
        return _svg(name, variant, width, height, f"{title}: share of requests within a time", desc,
                    _x_axis(x, 12.0, height - 44, x.ticks(7 if width > _NARROW else 5), _short_seconds),
                    _y_axis(y, left, width - 8.0, (0, 0.25, 0.5, 0.75, 0.9, 1), _percent),
                    _text(width - 8.0, height - 4, f"{title.lower()}, log scale", text_anchor="end"),
                    _curves(data, curves, x, y))

    return _tag("div", _responsive(draw, 500), data_scope="")


def _short_seconds(value: float) -> str:
    return f"{value * 1e3:g} ms" if value < 0.999 else f"{value:g} s"


def scatter_text(data: Data) -> str:
    tau, within = (_number(_as_float(data.get(key)), 2) for key in ("tau", "tau_within_source"))
    return (f"Kendall's tau {tau} over all requests; {within} within a source, where the kind of task gives "
            "nothing away. 1 is a perfect order, 0 a random one. The queue uses the order of the "
            "predictions; their size feeds the bound on overtaking.")


def scatter_chart(data: Data) -> _Markup:
    points = [(request, expected) for index, request in unique_requests(data).items()
              if (expected := data.expected(index)) is not None and request.output_tokens > 0]
    if not points:
        return _no_data()
    lengths = [value for request, expected in points for value in (request.output_tokens, expected)]
    low, high = min(lengths) * 0.8, max(lengths) * 1.25

    def draw(width: int, variant: str) -> _Markup:
        left, bottom = 48.0, width - 52.0
        x, y = _Axis(low, high, left, width - 8.0, log=True), _Axis(low, high, bottom, 22.0, log=True)
        ticks = x.ticks(5)
        marks = [source_mark(data, request.source, x(request.output_tokens), y(expected), width / 110 + 0.4,
                       f"{request.source}: predicted {expected:,.0f}, real {request.output_tokens:,} tokens")
                 for request, expected in points]
        return _svg("scatter-plot", variant, width, width - 8, "Predicted against real answer length",
                    f"{len(points)} requests on logarithmic axes; on the diagonal the prediction is exact.",
                    _x_axis(x, 22.0, bottom, ticks, lambda tick: f"{tick:,.0f}"),
                    _y_axis(y, left, width - 8.0, ticks, lambda tick: f"{tick:,.0f}"),
                    _tag("line", x1=x(low), y1=y(low), x2=x(high), y2=y(high), class_="diagonal"),
                    *marks, _text(0, 12, "predicted tokens"),
                    _text(width - 8, width - 13, "real tokens", text_anchor="end"))

    return _tag("div", _responsive(draw, 500))


def source_mark(
    data: Data, source: str, x: float, y: float, radius: float, title: str | None = None
) -> _Markup:
    """A source's sign: one of 8 colours and one of 4 shapes, in step, so that 8 sources differ in both."""
    place = data.sources.index(source) if source in data.sources else 0
    shape = {"d": _MARKERS[place % len(_MARKERS)], "class_": f"mark s{place % _SOURCE_COLOURS}",
             "transform": f"translate({x:.1f} {y:.1f}) scale({radius:.1f})",
             "vector_effect": "non-scaling-stroke"}
    if title is None:
        return _tag("path", **shape)
    return _tag("g", _tag("title", title), _tag("path", **shape), data_key=source)


def light_title(data: Data) -> str:
    """A claim only where both figures carry it."""
    runs, ratio = light_runs(data), light_interval(data)
    quiet = bool(runs) and not any(run.scored_total for run in runs) and ratio is not None and ratio[1] <= 1
    return "Under light load it stays out of the way" if quiet else "Under light load"


def light_ratio_text(data: Data) -> str:
    ratio = light_interval(data)
    mean = _as_float(data.get("light_ttft_ratio", "mean"))
    if ratio is None:
        return f"Mean time to first token, pars_fast over fcfs, paired: {_number(mean)}; no interval."
    mean, low, high = ratio
    verdict = ("the interval holds 1, so no difference is seen" if low <= 1 <= high else
               "below 1: pars_fast is faster" if high < 1 else "above 1: pars_fast is slower")
    return (f"Mean time to first token, pars_fast over fcfs, paired: {mean:.3f}, 95 % interval "
            f"{low:.3f} to {high:.3f}; {verdict}.")


def light_chart(data: Data) -> _Markup:
    """The ratio with its interval against 1."""
    ratio = light_interval(data)
    if ratio is None:
        return _Markup("")
    mean, low, high = ratio
    reach = max(abs(low - 1), abs(high - 1), 0.02) * 1.35

    def draw(width: int, variant: str) -> _Markup:
        x = _Axis(1 - reach, 1 + reach, 14.0, width - 14.0)
        ticks = x.ticks(5)  # with fewer there may be one alone, at 1
        digits = max(2, -math.floor(math.log10(ticks[1] - ticks[0])))
        return _svg("light-ratio", variant, width, 104, "Ratio of mean time to first token at light load",
                    light_ratio_text(data), _x_axis(x, 30.0, 80.0, ticks, lambda tick: f"{tick:.{digits}f}"),
                    _text(14, 16, "← pars_fast faster"),
                    _text(width - 14, 16, "fcfs faster →", text_anchor="end"),
                    _tag("line", x1=x(1), x2=x(1), y1=26.0, y2=80.0, class_="diagonal"),
                    _tag("line", x1=x(low), x2=x(high), y1=55.0, y2=55.0, class_="interval"),
                    _tag("circle", cx=x(mean), cy=55.0, r=6.0, class_="mean"))

    return _tag("div", _responsive(draw, 480))
