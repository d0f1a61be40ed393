"""The demo's page: one self-contained HTML file, drawn from the recorded runs.

Here are its head, sentences and tables; `report_charts` draws, `report_data` is what both read. The frame is
in `report.html`, `report.css` and `report.js` beside this file. All markup goes through `_tag`, which escapes
whatever is not markup already. The same input gives the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from pars_fast.demo.records import Load, Run, ServedRequest, gain_captured
from pars_fast.demo.report_charts import (
    cdf_chart,
    light_chart,
    light_ratio_text,
    light_title,
    policy_name,
    queue_chart,
    queue_text,
    scatter_chart,
    scatter_text,
    source_mark,
)
from pars_fast.demo.report_data import (
    BASELINE,
    ORACLE,
    OURS,
    Data,
    end_to_end_latency,
    latency_per_token,
    light_runs,
    mean_waits,
    unique_requests,
)
from pars_fast.page import DASH as _DASH
from pars_fast.page import Markup as _Markup
from pars_fast.page import as_float as _as_float
from pars_fast.page import escape as _escape
from pars_fast.page import join as _join
from pars_fast.page import number as _number
from pars_fast.page import percent as _percent
from pars_fast.page import seconds as _seconds
from pars_fast.page import tag as _tag

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
_SAME = "about the same"
_LONGEST_PER_GROUP = 6
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
    data = Data.of(runs, expected_tokens, summary)
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
        "queue_text": _escape(queue_text(data)),
        "queue_chart": queue_chart(data),
        "per_token_chart": cdf_chart(data, "per-token", "Latency per output token", latency_per_token),
        "e2e_chart": cdf_chart(data, "e2e", "End-to-end latency", end_to_end_latency),
        "longest_table": _longest_table(data),
        "scatter_text": _escape(scatter_text(data)),
        "scatter_chart": scatter_chart(data),
        "sources_table": _sources_table(data),
        "light_title": _escape(light_title(data)),
        "light_text": _light_text(data),
        "light_chart": light_chart(data),
        "saturated_table": _columns_table(data, "saturated", "Saturated"),
        "light_table": _columns_table(data, "light", "Light load"),
        "provenance": _provenance(data),
    }
    return Template(_asset("report.html")).substitute(parts)


def _asset(name: str) -> str:
    return files("pars_fast.demo").joinpath(name).read_text(encoding="utf-8")


def _breakable(name: str) -> _Markup:
    """A name that may break after each underscore, for narrow columns."""
    return _join(name.split("_"), _join(["_", _tag("wbr")]))


def _items(texts: Sequence[str]) -> _Markup:
    return _join(_tag("li", text) for text in texts)


def _count(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.0f}"


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


def _headline(data: Data) -> tuple[tuple[str, str, str], str]:
    """The result (before, emphasis, after) and the text under it, whichever way the numbers went."""
    base, ours = (data.mean(policy, "mean_latency_per_token_s") for policy in (BASELINE, OURS))
    change = _change(base, ours)
    if change == _DASH:
        return ("No comparison: a policy has no completed request", "", ""), "Below is what was recorded."
    headline = "Mean latency per token ", change, f" {'as' if change == _SAME else 'than'} in arrival order"
    return headline, " ".join([_gain_sentence(data), _repeats_sentence(data), _tail_sentence(data)]).strip()


def _gain_sentence(data: Data) -> str:
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


def _repeats_sentence(data: Data) -> str:
    by_repeat = [{row["repeat"]: row["mean_latency_per_token_s"] for row in data.rows
                  if (row["policy"], row["load"]) == (policy, "saturated")} for policy in (BASELINE, OURS)]
    pairs = [(base, by_repeat[1].get(repeat)) for repeat, base in by_repeat[0].items()]
    usable = [(base, ours) for base, ours in pairs if base is not None and ours is not None]
    if len(usable) < 2:
        return ""
    lower = sum(ours < base for base, ours in usable)
    return f"Lower in {lower} of {len(usable)} repeats."


def _tail_sentence(data: Data) -> str:
    change = _change(data.mean(BASELINE, "max_wait_s"), data.mean(OURS, "max_wait_s"))
    if change == _DASH:
        return ""
    return f"The longest wait is {'about as long' if change == _SAME else change}."


def _panel(data: Data, column: str, title: str) -> _Markup:
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


def _panel_note(data: Data) -> str:
    count = max((len(run.requests) for run in data.runs if run.load == "saturated"), default=0)
    repeats = len({run.repeat for run in data.runs if run.load == "saturated"})
    return (f"Saturated server: the same {count} requests at the same moments under each policy, mean over "
            f"{repeats} repeat{'s' * (repeats != 1)}. fcfs is arrival order, as a stock server does it; "
            "pars_fast runs what is expected to be short first and bounds overtaking; oracle knows every "
            "length.")


def _warning(data: Data) -> _Markup:
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


def _real(data: Data) -> list[str]:
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


def _stand_in(data: Data) -> list[str]:
    capacity = _number(_as_float(data.get("capacity_tok_s")))
    achieved = data.get("achieved_load") or {}
    shown = ", ".join(f"{policy} {_number(_as_float(achieved.get(policy)))}" for policy in data.policies)
    return [
        f"Served model: {data.text('served_model')}.",
        f"Machine: {data.text('device')}. Its seconds are its own; compare policies.",
        f"Arrivals: Poisson with one burst, at 1.2 of the measured capacity of {capacity} tok/s; "
        "light load at 0.5 of it.",
        f"Load achieved, tokens served until the last arrival over the capacity: {shown or _DASH}.",
        _switch_check(data),
    ]


def _switch_check(data: Data) -> str:
    stock, switched = (_as_float(data.get("switch_check", key)) for key in ("stock", "switched_fcfs"))
    text = ("One server switches policy between runs. Mean end-to-end latency of stock vLLM "
            f"{_seconds(stock)}, of fcfs under the switch {_seconds(switched)}")
    return f"{text} ({_change(stock, switched)})." if stock and switched else f"{text}."


def _sources_table(data: Data) -> _Markup:
    """The scatter's legend and the make-up of the sample in one."""
    given = {str(entry.get("source")): entry for entry in data.get("sources") or []}
    counts: dict[str, int] = {}
    for request in unique_requests(data).values():
        counts[request.source] = counts.get(request.source, 0) + 1
    rows = []
    for source in sorted({*data.sources, *given}):
        entry = given.get(source, {})
        marker = _tag("svg", source_mark(data, source, 7, 7, 5.0), class_="key", viewBox="0 0 14 14",
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


def _longest_table(data: Data) -> _Markup:
    """Those who waited longest in arrival order and under pars_fast: who gains and who pays, side by side."""
    waits = {policy: mean_waits(data, policy) for policy in data.policies}
    requests = unique_requests(data)
    scale = max((wait for by_index in waits.values() for wait in by_index.values()), default=0.0)
    bodies = []
    for policy in (BASELINE, OURS):
        by_wait = sorted(waits.get(policy, {}).items(), key=lambda item: (-item[1], item[0]))
        rows = [_longest_row(data, requests[index], waits, scale)
                for index, _ in by_wait[:_LONGEST_PER_GROUP]]
        title = f"Longest under {policy_name(policy, math.inf)}"
        bodies.append(_group(title, 3 + len(data.policies), rows))
    head = [_tag("th", "Source", scope="col"), _tag("th", "Tokens", scope="col"),
            _tag("th", "Predicted", scope="col", class_="optional"), *_policy_heads(data)]
    caption = _tag("caption", "The longest waits for a first token")
    return _tag("table", caption, _tag("thead", _tag("tr", *head)), *bodies)


def _group(title: str, width: int, rows: Sequence[_Markup]) -> _Markup:
    """Table rows under a heading of their own."""
    heading = _tag("tr", _tag("th", title, colspan=width, scope="rowgroup"))
    return _tag("tbody", heading, *rows)


def _longest_row(data: Data, request: ServedRequest, waits: Mapping[str, Mapping[int, float]],
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


def _policy_heads(data: Data) -> list[_Markup]:
    return [_tag("th", policy, scope="col", class_=f"policy {data.style(policy)}")
            for policy in data.policies]


def _columns_table(data: Data, load: Load, caption: str) -> _Markup:
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


def _counts_row(data: Data, load: Load, column: str, title: str) -> _Markup:
    """A count as a table row: the sum over repeats, since a rounded mean would hide a single lost request."""
    cells = []
    for policy in data.policies:
        values = data.values(policy, load, column)
        cells.append(_tag("td", _count(sum(values)) if values else _DASH, class_=data.style(policy)))
    return _tag("tr", _tag("th", f"{title}, all repeats", scope="row"), *cells)


def _columns_row(data: Data, load: Load, column: str, title: str, unit: str) -> _Markup:
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


def _light_text(data: Data) -> _Markup:
    runs = light_runs(data)
    if not runs:
        return _tag("p", "No run at light load was recorded.")
    scored, requests = sum(run.scored_total for run in runs), sum(len(run.requests) for run in runs)
    said = "Nothing was scored" if scored == 0 else f"{scored} prompts were scored"
    first = (f"{said}: the server's counter says {scored} after {requests} requests at half the capacity. "
             "Scoring starts only when requests are left waiting.")
    return _join([_tag("p", first), _tag("p", light_ratio_text(data))])


def _provenance(data: Data) -> _Markup:
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
