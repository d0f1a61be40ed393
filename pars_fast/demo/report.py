"""The demo's page: one self-contained HTML file, drawn from the recorded runs.

Charts are inline SVG made here; `report.html`, `report.css` and `report.js` beside this file hold the frame.
All markup goes through `_tag`, which escapes whatever is not markup already. The same input gives the same
bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from pars_fast.demo.records import Load, Run, ServedRequest, gain_captured
from pars_fast.page import DASH as _DASH
from pars_fast.page import Axis as _Axis
from pars_fast.page import Markup as _Markup
from pars_fast.page import as_float as _as_float
from pars_fast.page import escape as _escape
from pars_fast.page import join as _join
from pars_fast.page import number as _number
from pars_fast.page import percent as _percent
from pars_fast.page import svg as _svg
from pars_fast.page import tag as _tag
from pars_fast.page import text as _text
from pars_fast.page import x_axis as _x_axis
from pars_fast.page import y_axis as _y_axis

BASELINE, OURS, ORACLE = "fcfs", "pars_fast", "oracle"
_DESCRIPTIONS = {BASELINE: "arrival order", ORACLE: "knows every length"}
_PANELS = (  # column, title: the four answers of the page's head
    ("mean_latency_per_token_s", "Mean latency per output token"),
    ("mean_e2e_s", "Mean end-to-end latency"),
    ("mean_ttft_s", "Mean time to first token"),
    ("max_wait_s", "Longest wait for a first token"),
)
_LATENCIES = (  # column stem, title
    ("latency_per_token_s", "Latency per output token"),
    ("ttft_s", "Time to first token"),
    ("e2e_s", "End-to-end latency"),
    ("tpot_s", "Time per output token after the first"),
)
_TOTALS = (  # column, title, unit
    ("max_wait_s", "Longest wait", "s"),
    ("throughput_tok_s", "Throughput", "tok/s"),
    ("makespan_s", "Makespan", "s"),
    ("step_overhead_us_p50", "Added to a scheduling step, p50", "µs"),
)
_COUNTS = (  # column, title
    ("requests", "Requests"),
    ("completed", "Completed"),
    ("scored_total", "Prompts scored"),
    ("fallback_total", "Fallbacks"),
)
_MARKERS = (  # drawn around (0, 0) at radius 1; with the colour they tell sources apart without colour vision
    "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z",
    "M-.9 -.9H.9V.9H-.9Z",
    "M0 -1.2L1.15 .85H-1.15Z",
    "M0 -1.3L1.3 0L0 1.3L-1.3 0Z",
)
_SAME = "about the same"
_SOURCE_COLOURS = 8
_LONGEST_PER_GROUP = 6
_NARROW = 360  # drawing width for phones; every chart is drawn twice so that its text stays readable
_TIMES = "\u00d7"


def write_report(path: Path, *, runs: Sequence[Run], expected_tokens: Sequence[float],
                 summary: Mapping[str, Any]) -> None:
    """Write the page of a demo.

    Args:
        path: the HTML file to write; its folder must exist.
        runs: every policy, load and repeat; the run marked `stock` enters only through the summary.
        expected_tokens: the ranker's expected output tokens by request index.
        summary: what was run and the figures made from it; a missing or None value shows as a dash.
    """
    page = render_report(runs=runs, expected_tokens=expected_tokens, summary=summary)
    path.write_text(page, encoding="utf-8")


def render_report(*, runs: Sequence[Run], expected_tokens: Sequence[float],
                  summary: Mapping[str, Any]) -> str:
    """The page of `write_report` as text."""
    data = _Data.of(runs, expected_tokens, summary)
    headline, lead = _headline(data)
    parts = {
        "title": _escape("".join(headline)),
        "css": _asset("report.css"),
        "js": _asset("report.js"),
        "kicker": _escape(" · ".join(["pars-fast demo", *map(data.text, ("engine", "device", "date"))])),
        "headline": _join([headline[0], _tag("em", headline[1]), headline[2]]),
        "lead": _escape(lead),
        "warning": _warning(data),
        "panels": _join(_panel(data, column, title) for column, title in _PANELS),
        "panel_note": _escape(_panel_note(data)),
        "real": _items(_real(data)),
        "stand_in": _items(_stand_in(data)),
        "queue_text": _escape(_queue_text(data)),
        "queue_chart": _queue_chart(data),
        "per_token_chart": _cdf_chart(data, "per-token", "Latency per output token", _latency_per_token),
        "e2e_chart": _cdf_chart(data, "e2e", "End-to-end latency", _end_to_end_latency),
        "longest_table": _longest_table(data),
        "scatter_text": _escape(_scatter_text(data)),
        "scatter_chart": _scatter_chart(data),
        "sources_table": _sources_table(data),
        "light_title": _escape(_light_title(data)),
        "light_text": _light_text(data),
        "light_chart": _light_chart(data),
        "saturated_table": _columns_table(data, "saturated", "Saturated"),
        "light_table": _columns_table(data, "light", "Light load"),
        "provenance": _provenance(data),
    }
    return Template(_asset("report.html")).substitute(parts)


def _asset(name: str) -> str:
    return files("pars_fast.demo").joinpath(name).read_text(encoding="utf-8")


# --- Data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """The input, with what several parts of the page need from it."""

    runs: tuple[Run, ...]  # without stock runs
    rows: tuple[dict[str, Any], ...]  # columns of each run
    expected_tokens: tuple[float, ...]
    summary: Mapping[str, Any]
    policies: tuple[str, ...]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], expected_tokens: Sequence[float], summary: Mapping[str, Any]) -> "_Data":
        kept = tuple(run for run in runs if not run.stock)
        known = (BASELINE, OURS, ORACLE)
        found = {run.policy for run in kept}
        policies = tuple(p for p in known if p in found) + tuple(sorted(found.difference(known)))
        sources = tuple(sorted({request.source for run in kept for request in run.requests}))
        rows = tuple(run.columns() for run in kept)
        return cls(kept, rows, tuple(expected_tokens), summary, policies, sources)

    def values(self, policy: str, load: Load, column: str) -> list[float]:
        """One value per repeat, repeats without one left out."""
        return [row[column] for row in self.rows
                if (row["policy"], row["load"]) == (policy, load) and row[column] is not None]

    def mean(self, policy: str, column: str, load: Load = "saturated") -> float | None:
        values = self.values(policy, load, column)
        return float(np.mean(values)) if values else None

    def requests(self, policy: str, load: Load = "saturated") -> list[ServedRequest]:
        """Requests of all repeats, end to end."""
        runs = [run for run in self.runs if (run.policy, run.load) == (policy, load)]
        return [request for run in runs for request in run.requests]

    def first_repeat(self) -> dict[str, Run]:
        """The saturated run of each policy in the first repeat that all of them have."""
        by_repeat: dict[int, dict[str, Run]] = {}
        for run in self.runs:
            if run.load == "saturated":
                by_repeat.setdefault(run.repeat, {})[run.policy] = run
        if not by_repeat:
            return {}
        return by_repeat[min(by_repeat, key=lambda repeat: (-len(by_repeat[repeat]), repeat))]

    def expected(self, index: int) -> float | None:
        if not 0 <= index < len(self.expected_tokens):
            return None
        value = self.expected_tokens[index]
        return value if value is not None and math.isfinite(value) and value > 0 else None

    def get(self, *keys: str) -> Any:
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def text(self, *keys: str) -> str:
        value = self.get(*keys)
        return _DASH if value is None else str(value)

    def style(self, policy: str) -> str:
        """CSS class of a policy: its one colour on the whole page."""
        if policy in (BASELINE, OURS, ORACLE):
            return policy
        others = [p for p in self.policies if p not in (BASELINE, OURS, ORACLE)]
        return f"other{others.index(policy) % 2}"


def _end_to_end_latency(request: ServedRequest) -> float:
    return request.end_to_end_latency


def _latency_per_token(request: ServedRequest) -> float:
    return request.end_to_end_latency / request.output_tokens


# --- Markup -------------------------------------------------------------------------------------------------


def _breakable(name: str) -> _Markup:
    """A name that may break after each underscore, for narrow columns."""
    return _join(name.split("_"), _join(["_", _tag("wbr")]))


def _items(texts: Sequence[str]) -> _Markup:
    return _join(_tag("li", text) for text in texts)


# --- Numbers as text ----------------------------------------------------------------------------------------


def _count(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.0f}"


def _seconds(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return _DASH
    return f"{_number(value * 1e3, digits)} ms" if abs(value) < 1 else f"{_number(value, digits)} s"


def _change(base: float | None, value: float | None) -> str:
    """How `value` stands to `base`, in words: '3.1x lower', '12 % higher', 'about the same'."""
    if not base or not value:
        return _DASH
    direction = "lower" if value < base else "higher"
    factor = max(base, value) / min(base, value)
    if factor < 1.02:
        return _SAME
    if factor < 1.5:
        return f"{_percent(abs(value / base - 1))} {direction}"
    return f"{_number(factor, 2)}{_TIMES} {direction}"


# --- Head of the page ---------------------------------------------------------------------------------------


def _headline(data: _Data) -> tuple[tuple[str, str, str], str]:
    """The result (before, emphasis, after) and the text under it, whichever way the numbers went."""
    base, ours = (data.mean(policy, "mean_latency_per_token_s") for policy in (BASELINE, OURS))
    change = _change(base, ours)
    if change == _DASH:
        return ("No comparison: a policy has no completed request", "", ""), "Below is what was recorded."
    headline = "Mean latency per token ", change, f" {'as' if change == _SAME else 'than'} in arrival order"
    return headline, " ".join([_gain_sentence(data), _repeats_sentence(data), _tail_sentence(data)]).strip()


def _gain_sentence(data: _Data) -> str:
    per_token, e2e = _as_float(data.get("gain_captured")), _as_float(data.get("gain_captured_e2e"))
    if per_token is None:
        means = [data.mean(policy, "mean_latency_per_token_s") for policy in (BASELINE, OURS, ORACLE)]
        known = [mean for mean in means if mean is not None]
        if len(known) == 3 and gain_captured(*known) is None:
            return "An oracle that knows every answer's length gains too little here to state a share of it."
        return f"Share of the gain of an oracle that knows every answer's length: {_DASH}."
    if per_token < 0:
        return "An oracle that knows every answer's length gains here; pars_fast loses against arrival order."
    return (f"That is {_percent(per_token)} of what an oracle that knows every answer's length gains "
            f"({_percent(e2e)} on end-to-end latency).")


def _repeats_sentence(data: _Data) -> str:
    by_repeat = [{row["repeat"]: row["mean_latency_per_token_s"] for row in data.rows
                  if (row["policy"], row["load"]) == (policy, "saturated")} for policy in (BASELINE, OURS)]
    pairs = [(base, by_repeat[1].get(repeat)) for repeat, base in by_repeat[0].items()]
    usable = [(base, ours) for base, ours in pairs if base is not None and ours is not None]
    if len(usable) < 2:
        return ""
    lower = sum(ours < base for base, ours in usable)
    return f"Lower in {lower} of {len(usable)} repeats."


def _tail_sentence(data: _Data) -> str:
    change = _change(data.mean(BASELINE, "max_wait_s"), data.mean(OURS, "max_wait_s"))
    if change == _DASH:
        return ""
    return f"The longest wait is {'about as long' if change == _SAME else change}."


def _panel(data: _Data, column: str, title: str) -> _Markup:
    """One question, answered by a bar per policy."""
    means = {policy: data.mean(policy, column) for policy in data.policies}
    longest = max((mean for mean in means.values() if mean is not None), default=0.0)
    bars = [_tag("div", _tag("div", _tag("span", policy), _tag("span", _seconds(mean))),
                 _tag("i", style=f"--w:{_share(mean, longest)}"), class_=f"row {data.style(policy)}")
            for policy, mean in means.items()]
    change = _tag("p", _change(means.get(BASELINE), means.get(OURS)), class_="change")
    return _tag("div", _tag("h3", title), change, *bars, class_="card panel")


def _share(value: float | None, whole: float) -> str:
    return f"{100 * value / whole:.1f}%" if value and whole else "0%"


def _panel_note(data: _Data) -> str:
    count = max((len(run.requests) for run in data.runs if run.load == "saturated"), default=0)
    repeats = len({run.repeat for run in data.runs if run.load == "saturated"})
    return (f"Saturated server: the same {count} requests at the same moments under each policy, mean over "
            f"{repeats} repeat{'s' * (repeats != 1)}. fcfs is arrival order, as a stock server does it; "
            "pars_fast runs what is expected to be short first and bounds overtaking; oracle knows every "
            "length.")


def _warning(data: _Data) -> _Markup:
    """Said at the top if any request did not finish: a policy must not look fast by dropping work."""
    lost = []
    for policy in data.policies:
        requests = [request for run in data.runs if run.policy == policy for request in run.requests]
        missing = sum(not request.completed for request in requests)
        if missing:
            lost.append(f"{policy} {missing} of {len(requests)}")
    if not lost:
        return _Markup("")
    text = f"Not completed: {', '.join(lost)}. Latencies leave these requests out."
    return _tag("p", text, class_="warning")


def _real(data: _Data) -> list[str]:
    count = max((len(run.requests) for run in data.runs), default=0)
    named = data.get("sources") or []
    models = {entry.get("model_column") for entry in named} - {None}
    origin = f" of {len(models)} named model{'s' * (len(models) != 1)}" if models else ""
    return [
        f"Prompts: {count} from the test split of {len(data.sources)} public sources; the ranker was not "
        "trained on them.",
        f"Answer lengths: from recorded answers{origin}, replayed to the token.",
        f"Engine: {data.text('engine')}, its scheduler and its HTTP server; only the order of the waiting "
        "queue changes.",
        "Ranker: the one that ships with pars-fast. It sees prompts, never lengths.",
    ]


def _stand_in(data: _Data) -> list[str]:
    capacity = _number(_as_float(data.get("capacity_tok_s")))
    achieved = data.get("achieved_load") or {}
    shown = ", ".join(f"{policy} {_number(_as_float(achieved.get(policy)))}" for policy in data.policies)
    return [
        f"Served model: {data.text('served_model')}.",
        f"Machine: {data.text('device')}. Its seconds are its own; compare policies.",
        f"Arrivals: Poisson with one burst, at 1.2 of the measured capacity of {capacity} tok/s; "
        "light load at 0.5 of it.",
        f"Load achieved: {shown or _DASH}.",
        _switch_check(data),
    ]


def _switch_check(data: _Data) -> str:
    stock, switched = (_as_float(data.get("switch_check", key)) for key in ("stock", "switched_fcfs"))
    text = ("One server switches policy between runs. Mean end-to-end latency of stock vLLM "
            f"{_seconds(stock)}, of fcfs under the switch {_seconds(switched)}")
    return f"{text} ({_change(stock, switched)})." if stock and switched else f"{text}."


# --- Charts -------------------------------------------------------------------------------------------------


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


def _curves(data: _Data, curves: Sequence[_Steps], x: _Axis, y: _Axis) -> _Markup:
    """Step lines, the baseline at the back, each named where there is room beside it."""
    drawn = [_tag("path", d=curve.path(x, y), data_key=curve.policy,
                  class_=f"curve {data.style(curve.policy)}") for curve in curves]
    return _join([*drawn, *_direct_labels(data, curves, x, y)])


def _direct_labels(data: _Data, curves: Sequence[_Steps], x: _Axis, y: _Axis) -> list[_Markup]:
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


def _label(data: _Data, curve: _Steps, box: _Box, anchor: _Point) -> _Markup:
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


def _name(policy: str, width: float) -> str:
    """A policy's name, with its meaning where there is room."""
    return f"{policy} ({_DESCRIPTIONS[policy]})" if policy in _DESCRIPTIONS and width > _NARROW else policy


# Queue over time

def _waiting(requests: Sequence[ServedRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Times and the number waiting from each on; who never got a first token waits to the end."""
    arrivals = [(request.arrival_s, 1) for request in requests]
    starts = [(request.first_token_s, -1) for request in requests if request.first_token_s is not None]
    events = sorted([*arrivals, *starts])
    times = np.array([time for time, _ in events])
    return times, np.cumsum([change for _, change in events]).astype(float)


def _queue_text(data: _Data) -> str:
    runs = data.first_repeat()
    peaks = [f"{_waiting(runs[policy].requests)[1].max():.0f} under {policy}" for policy in data.policies
             if policy in runs and runs[policy].requests]
    return f"Most waiting at once: {', '.join(peaks) or _DASH}."


def _queue_chart(data: _Data) -> _Markup:
    runs = {policy: run for policy, run in data.first_repeat().items() if run.requests}
    if not runs:
        return _no_data()
    series = {policy: _waiting(runs[policy].requests) for policy in data.policies if policy in runs}
    arrivals = [request.arrival_s for request in next(iter(runs.values())).requests]
    desc = f"{_queue_text(data)} Bars at the foot count arrivals."

    def draw(width: int, variant: str) -> _Markup:
        curves = [_Steps(policy, _name(policy, width), xs, ys) for policy, (xs, ys) in series.items()]
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


# Latency CDFs

def _cdf_chart(data: _Data, name: str, title: str, latency: Callable[[ServedRequest], float]) -> _Markup:
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


# Predicted against real length

def _unique_requests(data: _Data) -> dict[int, ServedRequest]:
    found: dict[int, ServedRequest] = {}
    for run in data.runs:
        if run.load == "saturated":
            for request in run.requests:
                found.setdefault(request.index, request)
    return dict(sorted(found.items()))


def _scatter_text(data: _Data) -> str:
    tau, within = (_number(_as_float(data.get(key)), 2) for key in ("tau", "tau_within_source"))
    return (f"Kendall's tau {tau} over all requests; {within} within a source, where the kind of task gives "
            "nothing away. 1 is a perfect order, 0 a random one. The queue uses the order of the "
            "predictions; their size feeds the bound on overtaking.")


def _scatter_chart(data: _Data) -> _Markup:
    points = [(request, expected) for index, request in _unique_requests(data).items()
              if (expected := data.expected(index)) is not None and request.output_tokens > 0]
    if not points:
        return _no_data()
    lengths = [value for request, expected in points for value in (request.output_tokens, expected)]
    low, high = min(lengths) * 0.8, max(lengths) * 1.25

    def draw(width: int, variant: str) -> _Markup:
        left, bottom = 48.0, width - 52.0
        x, y = _Axis(low, high, left, width - 8.0, log=True), _Axis(low, high, bottom, 22.0, log=True)
        ticks = x.ticks(5)
        marks = [_mark(data, request.source, x(request.output_tokens), y(expected), width / 110 + 0.4,
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


def _mark(data: _Data, source: str, x: float, y: float, radius: float, title: str | None = None) -> _Markup:
    """A source's sign: one of 8 colours and one of 4 shapes, in step, so that 8 sources differ in both."""
    place = data.sources.index(source) if source in data.sources else 0
    shape = {"d": _MARKERS[place % len(_MARKERS)], "class_": f"mark s{place % _SOURCE_COLOURS}",
             "transform": f"translate({x:.1f} {y:.1f}) scale({radius:.1f})",
             "vector_effect": "non-scaling-stroke"}
    if title is None:
        return _tag("path", **shape)
    return _tag("g", _tag("title", title), _tag("path", **shape), data_key=source)


def _sources_table(data: _Data) -> _Markup:
    """The scatter's legend and the make-up of the sample in one."""
    given = {str(entry.get("source")): entry for entry in data.get("sources") or []}
    counts: dict[str, int] = {}
    for request in _unique_requests(data).values():
        counts[request.source] = counts.get(request.source, 0) + 1
    rows = []
    for source in sorted({*data.sources, *given}):
        entry = given.get(source, {})
        marker = _tag("svg", _mark(data, source, 7, 7, 5.0), class_="key", viewBox="0 0 14 14",
                      aria_hidden="true")
        model = entry.get("model_column")
        rows.append(_tag("tr", _tag("td", marker), _tag("th", _breakable(source), scope="row"),
                         _tag("td", _count(entry.get("requests", counts.get(source)))),
                         _tag("td", _percent(_as_float(entry.get("share")))),
                         _tag("td", _DASH if model is None else str(model), class_="text"), data_key=source))
    head = _tag("tr", _tag("td"), _tag("th", "Source", scope="col", class_="text"),
                _tag("th", "Requests", scope="col"), _tag("th", "Share", scope="col"),
                _tag("th", "Lengths of", scope="col", class_="text"))
    return _tag("table", _tag("caption", "The sample"), _tag("thead", head), _tag("tbody", *rows))


# --- Tables -------------------------------------------------------------------------------------------------


def _mean_waits(data: _Data, policy: str) -> dict[int, float]:
    waits: dict[int, list[float]] = {}
    for request in data.requests(policy):
        if request.first_token_s is not None:
            waits.setdefault(request.index, []).append(request.time_to_first_token)
    return {index: float(np.mean(values)) for index, values in waits.items()}


def _longest_table(data: _Data) -> _Markup:
    """Those who waited longest in arrival order and under pars_fast: who gains and who pays, side by side."""
    waits = {policy: _mean_waits(data, policy) for policy in data.policies}
    requests = _unique_requests(data)
    scale = max((wait for by_index in waits.values() for wait in by_index.values()), default=0.0)
    bodies = []
    for policy in (BASELINE, OURS):
        by_wait = sorted(waits.get(policy, {}).items(), key=lambda item: (-item[1], item[0]))
        rows = [_longest_row(data, requests[index], waits, scale)
                for index, _ in by_wait[:_LONGEST_PER_GROUP]]
        title = f"Longest under {_name(policy, math.inf)}"
        bodies.append(_group(title, 3 + len(data.policies), rows))
    head = [_tag("th", "Source", scope="col"), _tag("th", "Tokens", scope="col"),
            _tag("th", "Predicted", scope="col", class_="optional"), *_policy_heads(data)]
    caption = _tag("caption", "The longest waits for a first token")
    return _tag("table", caption, _tag("thead", _tag("tr", *head)), *bodies)


def _group(title: str, width: int, rows: Sequence[_Markup]) -> _Markup:
    """Table rows under a heading of their own."""
    heading = _tag("tr", _tag("th", title, colspan=width, scope="rowgroup"))
    return _tag("tbody", heading, *rows)


def _longest_row(data: _Data, request: ServedRequest, waits: Mapping[str, Mapping[int, float]],
                 scale: float) -> _Markup:
    cells = []
    for policy in data.policies:
        wait = waits[policy].get(request.index)
        bar = _tag("i", style=f"--w:{_share(wait, scale)}")
        text = _DASH if wait is None else f"{wait:.2f} s" if wait < 100 else f"{wait:,.0f} s"
        cells.append(_tag("td", text, bar, class_=f"bar {data.style(policy)}"))
    return _tag("tr", _tag("th", _breakable(request.source), scope="row"),
                _tag("td", _count(request.output_tokens)),
                _tag("td", _count(data.expected(request.index)), class_="optional"), *cells)


def _policy_heads(data: _Data) -> list[_Markup]:
    return [_tag("th", policy, scope="col", class_=f"policy {data.style(policy)}")
            for policy in data.policies]


def _columns_table(data: _Data, load: Load, caption: str) -> _Markup:
    groups = []
    for stem, title in _LATENCIES:
        rows = [_columns_row(data, load, f"{statistic}_{stem}", statistic, "s") for statistic in
                ("mean", "p50", "p90", "p99")]
        groups.append((title, rows))
    totals = [_columns_row(data, load, column, title, unit) for column, title, unit in _TOTALS]
    totals += [_counts_row(data, load, column, title) for column, title in _COUNTS]
    bodies = [_group(title, 1 + len(data.policies), rows) for title, rows in [*groups, ("Server", totals)]]
    head = _tag("tr", _tag("td"), *_policy_heads(data))
    return _tag("table", _tag("caption", caption), _tag("thead", head), *bodies)


def _counts_row(data: _Data, load: Load, column: str, title: str) -> _Markup:
    """A count as a table row: the sum over repeats, since a rounded mean would hide a single lost request."""
    cells = []
    for policy in data.policies:
        values = data.values(policy, load, column)
        cells.append(_tag("td", _count(sum(values)) if values else _DASH, class_=data.style(policy)))
    return _tag("tr", _tag("th", f"{title}, all repeats", scope="row"), *cells)


def _columns_row(data: _Data, load: Load, column: str, title: str, unit: str) -> _Markup:
    """One column of the records as a table row: mean over repeats, lowest and highest repeat under it."""
    values = {policy: data.values(policy, load, column) for policy in data.policies}
    largest = max((value for series in values.values() for value in series), default=0.0)
    factor, unit = (1e3, "ms") if unit == "s" and largest < 1 else (1.0, unit)
    cells = []
    for policy, series in values.items():
        scaled = [value * factor for value in series]
        low, high = (_number(pick(scaled, default=None)) for pick in (min, max))
        spread = [_tag("small", f"{low} to {high}")] if low != high else []
        cells.append(_tag("td", _number(float(np.mean(scaled))) if scaled else _DASH, *spread,
                          class_=data.style(policy)))
    return _tag("tr", _tag("th", f"{title}, {unit}" if unit else title, scope="row"), *cells)


# --- Light load and footer ----------------------------------------------------------------------------------


def _light_interval(data: _Data) -> tuple[float, float, float] | None:
    """Mean, low and high of the paired ratio of TTFT."""
    interval = data.get("light_ttft_ratio", "ci95")
    mean = _as_float(data.get("light_ttft_ratio", "mean"))
    if mean is None or not isinstance(interval, Sequence) or len(interval) != 2:
        return None
    low, high = _as_float(interval[0]), _as_float(interval[1])
    return None if low is None or high is None else (mean, low, high)


def _light_title(data: _Data) -> str:
    """A claim only where both figures carry it."""
    runs, ratio = _light_runs(data), _light_interval(data)
    quiet = bool(runs) and not any(run.scored_total for run in runs) and ratio is not None and ratio[1] <= 1
    return "Under light load it stays out of the way" if quiet else "Under light load"


def _light_runs(data: _Data) -> list[Run]:
    return [run for run in data.runs if (run.policy, run.load) == (OURS, "light")]


def _light_text(data: _Data) -> _Markup:
    runs = _light_runs(data)
    if not runs:
        return _tag("p", "No run at light load was recorded.")
    scored, requests = sum(run.scored_total for run in runs), sum(len(run.requests) for run in runs)
    said = "Nothing was scored" if scored == 0 else f"{scored} prompts were scored"
    first = (f"{said}: the server's counter says {scored} after {requests} requests at half the capacity. "
             "Scoring starts only when requests are left waiting.")
    return _join([_tag("p", first), _tag("p", _light_ratio_text(data))])


def _light_ratio_text(data: _Data) -> str:
    ratio = _light_interval(data)
    mean = _as_float(data.get("light_ttft_ratio", "mean"))
    if ratio is None:
        return f"Mean time to first token, pars_fast over fcfs, paired: {_number(mean)}; no interval."
    mean, low, high = ratio
    verdict = ("the interval holds 1, so no difference is seen" if low <= 1 <= high else
               "below 1: pars_fast is faster" if high < 1 else "above 1: pars_fast is slower")
    return (f"Mean time to first token, pars_fast over fcfs, paired: {mean:.3f}, 95 % interval "
            f"{low:.3f} to {high:.3f}; {verdict}.")


def _light_chart(data: _Data) -> _Markup:
    """The ratio with its interval against 1."""
    ratio = _light_interval(data)
    if ratio is None:
        return _Markup("")
    mean, low, high = ratio
    reach = max(abs(low - 1), abs(high - 1), 0.02) * 1.35

    def draw(width: int, variant: str) -> _Markup:
        x = _Axis(1 - reach, 1 + reach, 14.0, width - 14.0)
        ticks = x.ticks(5)  # with fewer there may be one alone, at 1
        digits = max(2, -math.floor(math.log10(ticks[1] - ticks[0])))
        return _svg("light-ratio", variant, width, 104, "Ratio of mean time to first token at light load",
                    _light_ratio_text(data), _x_axis(x, 30.0, 80.0, ticks, lambda tick: f"{tick:.{digits}f}"),
                    _text(14, 16, "← pars_fast faster"),
                    _text(width - 14, 16, "fcfs faster →", text_anchor="end"),
                    _tag("line", x1=x(1), x2=x(1), y1=26.0, y2=80.0, class_="diagonal"),
                    _tag("line", x1=x(low), x2=x(high), y1=55.0, y2=55.0, class_="interval"),
                    _tag("circle", cx=x(mean), cy=55.0, r=6.0, class_="mean"))

    return _tag("div", _responsive(draw, 480))


def _provenance(data: _Data) -> _Markup:
    versions = data.get("versions") or {}
    repeats = data.get("repeats")
    command = data.get("command") or f"pars-fast demo{'' if repeats is None else f' --repeats {repeats}'}"
    entries: list[tuple[str, str]] = [
        ("Engine", data.text("engine")),
        ("Served model", data.text("served_model")),
        ("Device", data.text("device")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or _DASH),
        ("Seed, repeats", f"{data.text('seed')}, {data.text('repeats')}"),
        ("Arrivals, sha256", data.text("arrivals_sha256")),
        ("Date", data.text("date")),
        ("Made by", _tag("code", str(command))),
    ]
    return _join(_join([_tag("dt", name), _tag("dd", value)]) for name, value in entries)
