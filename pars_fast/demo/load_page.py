"""The page of `pars-fast load`: latency against load, a burst, light load, and every column.

One self-contained HTML file with the demo's look, drawn from what the command writes as JSON; the same
figures give the same bytes.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from pars_fast.page import DASH, Markup, against_arrival_order, escape, join, number, percent, tag
from pars_fast.simulation.charts import Point, figure, line_chart, section

_Row = Mapping[str, Any]
_BASELINE, _OURS, _ORACLE = "fcfs", "pars_fast", "oracle"
_SHOWN_LOAD = 1.2
_CURVES = (  # column, title
    ("mean_latency_per_token_s", "Mean latency per output token"),
    ("p99_latency_per_token_s", "99th percentile of latency per output token"),
    ("mean_e2e_s", "Mean end-to-end latency"),
    ("p99_e2e_s", "99th percentile of end-to-end latency"),
    ("mean_ttft_s", "Mean time to first token"),
    ("max_wait_s", "Longest wait for a first token"),
)
_BURST = (  # column, title
    ("mean_latency_per_token_s", "Mean latency per output token"),
    ("mean_e2e_s", "Mean end-to-end latency"),
    ("p99_e2e_s", "99th percentile of it"),
    ("max_wait_s", "Longest wait for a first token"),
)
_LATENCIES = (  # stem, title
    ("latency_per_token_s", "Latency per output token"), ("ttft_s", "Time to first token"),
    ("tpot_s", "Time per output token after the first"), ("e2e_s", "End-to-end latency"),
)
_TOTALS = (  # column, title
    ("max_wait_s", "Longest wait, s"), ("throughput_to_last_arrival_tok_s", "Tokens/s to the last arrival"),
    ("throughput_tok_s", "Tokens/s to the end"), ("makespan_s", "Makespan, s"),
    ("preemptions", "Preemptions"), ("step_overhead_us_p50", "Added to a step, p50, µs"),
    ("scored_total", "Prompts scored"), ("mean_score_latency_s", "Until a score, mean, s"),
    ("fallback_total", "Fallbacks"), ("offered_load", "Load offered"), ("achieved_load", "Load achieved"),
    ("requests", "Requests"), ("completed", "Completed"), ("repeats", "Runs"),
)
_GAINS = (("gain_captured", "Gain per token"), ("gain_captured_e2e", "Gain end to end"))


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page, `result` being what `pars-fast load --json` writes."""
    path.write_text(render_page(result), encoding="utf-8")


def render_page(result: Mapping[str, Any]) -> str:
    """The page of `write_page` as text."""
    means = result["means"]
    before, emphasis, after = _headline(means)
    frame, style, script = (files("pars_fast.demo").joinpath(name).read_text(encoding="utf-8")
                            for name in ("load.html", "report.css", "report.js"))
    kicker = ("pars-fast load", result["engine"], result["device"], result["date"])
    return Template(frame).substitute(
        title=escape(before + emphasis + after), css=style, js=script, kicker=escape(" · ".join(kicker)),
        headline=join([before, tag("em", emphasis), after]), lead=escape(_lead(result)),
        warning=_warning(means), sections=join([_curves(result), _burst(result), _light(result)]),
        tables=join(_table(result, load) for load in result["loads"]), provenance=_provenance(result))


def _styles(policies: Sequence[str]) -> dict[str, str]:
    """CSS class of each policy: its colour on the whole page."""
    known = (_BASELINE, _OURS, _ORACLE)
    others = [policy for policy in policies if policy not in known]
    colours = ("s1", "s0", "s3", "s2", "s5", "s6", "s7", "s4")
    chosen = {policy: colours[place % len(colours)] for place, policy in enumerate(others)}
    return chosen | {policy: policy for policy in known}


def _at(means: Sequence[_Row], load: Any, policy: str) -> _Row | None:
    found = [row for row in means if (row["load"], row["policy"]) == (load, policy)]
    return found[0] if found else None


def _seconds(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{number(value * 1e3)} ms" if value < 1 else f"{number(value)} s"


def _times(ratio: float | None) -> str:
    return DASH if ratio is None else f"{number(ratio)}\u00d7"


# --- Head ---------------------------------------------------------------------------------------------------


def _shown(means: Sequence[_Row]) -> _Row | None:
    """pars_fast at the load nearest to `_SHOWN_LOAD`; in a burst where there is no other."""
    ours = [row for row in means if row["policy"] == _OURS and row["mean_latency_per_token_s_ratio"]]
    rates = [row for row in ours if row["load"] != "burst"]
    return min(rates, key=lambda row: abs(row["load"] - _SHOWN_LOAD)) if rates else next(iter(ours), None)


def _where(load: Any) -> str:
    return "In a burst" if load == "burst" else f"At load {load:g}"


def _headline(means: Sequence[_Row]) -> tuple[str, str, str]:
    row = _shown(means)
    if row is None:
        return "A real server, ", "measured", ""
    ratio = row["mean_latency_per_token_s_ratio"]
    return against_arrival_order(f"{_where(row['load'])}, mean latency per token ", ratio)


def _lead(result: Mapping[str, Any]) -> str:
    row = _shown(result["means"])
    said = [f"A real vLLM server, {result['served_model']}. All policies get the same arrivals, in turns."]
    if row is not None:
        ratios = (f"{title} {_times(row[f'{column}_ratio'])}" for column, title in (
            ("mean_e2e_s", "mean end-to-end latency"), ("p99_e2e_s", "its 99th percentile"),
            ("max_wait_s", "the longest wait"), ("throughput_tok_s", "throughput")))
        said.append(f"{_where(row['load'])} pars_fast against arrival order: {', '.join(ratios)}.")
        if row["gain_captured"] is not None and row["gain_captured_e2e"] is not None:
            said.append(f"That is {percent(row['gain_captured'])} of an oracle's gain per token and "
                        f"{percent(row['gain_captured_e2e'])} end to end.")
    return " ".join(said)


def _warning(means: Sequence[_Row]) -> Markup:
    """Said at the top: a policy must not look fast by dropping work."""
    lost = [f"{row['policy']} at load {row['load']}" for row in means if row["completed"] < row["requests"]]
    if not lost:
        return Markup("")
    return tag("p", f"Not every request completed: {', '.join(lost)}. Latencies leave those out.",
               class_="warning")


# --- Sections -----------------------------------------------------------------------------------------------


def _curves(result: Mapping[str, Any]) -> Markup:
    """Each measure against load, a line a policy; with one load there is nothing to draw."""
    loads = [load for load in result["loads"] if load != "burst"]
    if len(loads) < 2:
        return Markup("")
    styles, figures = _styles(result["policies"]), []
    for column, title in _CURVES:
        lines: dict[str, Sequence[Point]] = {}
        for policy in result["policies"]:
            points = [(float(load), float(row[column])) for load in sorted(loads)
                      if (row := _at(result["means"], load, policy)) is not None and row[column]]
            if points:
                lines[policy] = points
        if lines:
            figures.append(figure(title, line_chart(
                column, title, lines, "load: offered over capacity", "seconds", number, log=True,
                styles=styles)))
    lead = (f"Poisson arrivals of {result['requests']} prompts with their recorded answer lengths. Load 1 is "
            f"{number(result['capacity_tok_s'], 4)} output tokens a second, what the engine does in arrival "
            "order when it never waits for work. Where the range is wide, the scale is logarithmic.")
    return section("curves", "Latency against load", lead, *figures)


def _burst(result: Mapping[str, Any]) -> Markup:
    if "burst" not in result["loads"]:
        return Markup("")
    panels = [_panel(result, column, title) for column, title in _BURST]
    lead = (f"{result['burst_requests']:,} requests at the same moment: the sample's prompts again and "
            f"again, with {result['burst_lengths']:g} of their answers' lengths.")
    return tag("section", tag("h2", f"{result['burst_requests']:,} at once", id="burst"), tag("p", lead),
               tag("div", *panels, class_="panels"), aria_labelledby="burst")


def _panel(result: Mapping[str, Any], column: str, title: str) -> Markup:
    """One question, answered by a bar per policy."""
    styles = _styles(result["policies"])
    values = {policy: row[column] for policy in result["policies"]
              if (row := _at(result["means"], "burst", policy)) is not None}
    longest = max((value for value in values.values() if value), default=0.0)
    bars = [tag("div", tag("div", tag("span", policy), tag("span", _seconds(value))),
                tag("i", style=f"--w:{100 * value / longest:.1f}%" if value else "--w:0%"),
                class_=f"row {styles[policy]}") for policy, value in values.items()]
    return tag("div", tag("h3", title), *bars, class_="card panel")


def _light(result: Mapping[str, Any]) -> Markup:
    if not result["light"]:
        return Markup("")
    head = tag("tr", *(tag("th", title, scope="col") for title in (
        "load", "policy", "TTFT", "95 % interval", "TPOT", "95 % interval", "prompts scored")))
    rows = []
    for light in result["light"]:
        cells = []
        for name in ("ttft_ratio", "tpot_ratio"):
            ratio = light[name]
            low, high = (None, None) if ratio is None else ratio["ci95"]
            cells += [tag("td", _times(ratio and ratio["mean"])),
                      tag("td", f"{number(low)} to {number(high)}")]
        mean = _at(result["means"], light["load"], light["policy"])
        rows.append(tag("tr", tag("th", f"{light['load']:g}", scope="row"),
                        tag("td", light["policy"], class_="text"), *cells,
                        tag("td", number(mean["scored_total"] if mean else None))))
    lead = ("Mean time to first token and mean time per token after it, over arrival order's. Requests are "
            "paired and resampled; what differs between two runs as a whole is not in the interval.")
    table = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="card scroll")
    return tag("section", tag("h2", "Below capacity", id="light"), tag("p", lead), table,
               aria_labelledby="light")


# --- Tables and footer --------------------------------------------------------------------------------------


def _table(result: Mapping[str, Any], load: Any) -> Markup:
    styles = _styles(result["policies"])
    rows = {policy: row for policy in result["policies"]
            if (row := _at(result["means"], load, policy)) is not None}
    width = 1 + len(rows)

    def line(title: str, cell: Any) -> Markup:
        cells = (tag("td", *cell(row), class_=styles[policy]) for policy, row in rows.items())
        return tag("tr", tag("th", title, scope="row"), *cells)

    def value(column: str) -> Any:
        def cell(row: _Row) -> list[str]:
            ratio = [tag("small", _times(row[f"{column}_ratio"]))] if f"{column}_ratio" in row else []
            return [number(row[column]), *ratio]

        return cell

    bodies = []
    for stem, title in _LATENCIES:
        lines = [line(f"{statistic}, s", value(f"{statistic}_{stem}"))
                 for statistic in ("mean", "p50", "p90", "p99")]
        bodies.append(tag("tbody", tag("tr", tag("th", title, colspan=width, scope="rowgroup")), *lines))
    totals = [line(title, value(column)) for column, title in _TOTALS]
    totals += [line(title, lambda row, name=name: [percent(row[name])]) for name, title in _GAINS]
    bodies.append(tag("tbody", tag("tr", tag("th", "Run", colspan=width, scope="rowgroup")), *totals))
    head = tag("tr", tag("td"), *(tag("th", policy, scope="col", class_=f"policy {styles[policy]}")
                                  for policy in rows))
    title = f"{result['burst_requests']:,} at once" if load == "burst" else f"Load {load:g}"
    table = tag("table", tag("caption", title), tag("thead", head), *bodies)
    return tag("details", tag("summary", title), tag("div", table, class_="card scroll"))


def _provenance(result: Mapping[str, Any]) -> Markup:
    entries = [
        ("Engine", result["engine"]), ("Arguments", " ".join(result["engine_arguments"])),
        ("Served model", result["served_model"]), ("Ranker", result["ranker"]), ("Device", result["device"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        ("Commit", result["commit"]), ("Seed, repeats", f"{result['seed']}, {result['repeats']}"),
        ("Arrivals, sha256", result["arrivals_sha256"]), ("Date", result["date"]),
    ]
    return join(join([tag("dt", name), tag("dd", value)]) for name, value in entries)
