"""The page of a sweep: one self-contained HTML file of small multiples, drawn from its rows.

What is relative is relative to arrival order (fcfs) on the same requests at the same load. Values are means
over seeds. The look is the demo's, by its own style sheet; the same rows give the same bytes.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from pars_fast.guards import guard_text
from pars_fast.page import DASH, Markup, against_arrival_order, escape, join, number, percent, tag
from pars_fast.policies import POLICIES
from pars_fast.simulation.charts import Point, figure, line_chart, section
from pars_fast.simulation.page_rows import guard_name, values_of
from pars_fast.simulation.sweep import served_alike

_Row = Mapping[str, Any]
_BASELINE, _OURS, _ORACLE = "fcfs", "pars_fast", "oracle"
_FRONTIERS = (  # title, column across, its name, column up, its name
    ("End to end: mean against p99", "p99_e2e_s", "p99", "mean_e2e_s", "mean"),
    ("Per token, against the longest wait", "max_wait_s", "longest wait", "mean_latency_per_token_s", "mean"),
)
_PARETO = (  # title, column across, column up
    ("End to end", "p99_e2e_s", "mean_e2e_s"),
    ("Per token", "p99_latency_per_token_s", "mean_latency_per_token_s"),
)
_POLICIES_TO_COMPARE = 4
_POLICY_STYLES = {"fcfs": "fcfs", "pars_fast": "pars_fast", "oracle": "oracle", "srpt": "oracle"}
_CURVES = (  # column, title, what the horizontal axis says, whether larger is better
    ("tau", "Quality of the ranking", "Kendall's tau of the scores"),
    ("ranker_delay_s", "Delay of the ranker", "seconds from prompt to score"),
    ("unscored_share", "Requests without a score", "share of all requests"),
)
_TABLE = (  # column, title
    ("mean_latency_per_token_s", "mean s/token"), ("mean_ttft_s", "mean TTFT"), ("mean_e2e_s", "mean e2e"),
    ("p99_e2e_s", "p99 e2e"), ("max_wait_s", "max wait"),
    ("throughput_to_last_arrival_tok_s", "tok/s to last arrival"),
    ("preemptions", "preempted"), ("recomputed_tokens", "computed again"),
    ("prefix_hit_tokens", "found in cache"), ("completed", "completed"),
)


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of a sweep, `result` being what `pars-fast simulate --json` writes."""
    path.write_text(render_report(result), encoding="utf-8")


def render_report(result: Mapping[str, Any]) -> str:
    """The page of `write_report` as text."""
    rows = _mean_over_seeds(result["runs"])
    before, emphasis, after = _headline(rows)
    frame = files("pars_fast.simulation").joinpath("report.html").read_text(encoding="utf-8")
    style, script = (files("pars_fast.demo").joinpath(f"report.{kind}").read_text(encoding="utf-8")
                     for kind in ("css", "js"))
    return Template(frame).substitute(
        title=escape(before + emphasis + after), css=style, js=script,
        kicker=escape(f"pars-fast simulate · {result['workload']} · {result['requests']:,} requests · "
                      f"{result['simulator']} simulator · {result['date']}"),
        headline=join([before, tag("em", emphasis), after]),
        lead=escape(_lead(rows)),
        sections=join([_pareto_section(rows), *_frontier_sections(rows), *_curve_sections(rows),
                       _fleet_section(rows)]),
        table=_table(rows),
        provenance=_provenance(result),
    )


# --- Rows ---------------------------------------------------------------------------------------------------


def _mean_over_seeds(runs: Sequence[_Row]) -> list[dict[str, Any]]:
    """One row for each case but for its seed; numbers are means of those that are there."""
    groups: dict[tuple[Any, ...], list[_Row]] = {}
    for run in runs:
        names = ("policy", "guard", "load", "tau", "ranker_delay_s", "unscored_share", "engines", "router")
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    return [{name: _mean([run[name] for run in group]) for name in group[0]} for group in groups.values()]


def _mean(values: Sequence[Any]) -> Any:
    present = [value for value in values if value is not None]
    if not present or isinstance(present[0], str):
        return present[0] if present else None
    return float(np.mean(present)) if len(present) > 1 else present[0]


def _baseline(rows: Sequence[_Row], row: _Row) -> _Row | None:
    """Arrival order where `row` was run."""
    same = [other for other in rows
            if other["policy"] == _BASELINE and served_alike(other) == served_alike(row)]
    return same[0] if same else None


def _ratio(rows: Sequence[_Row], row: _Row, column: str) -> float | None:
    base = _baseline(rows, row)
    if base is None or not base[column] or row[column] is None:
        return None
    return float(row[column] / base[column])


def _one(rows: Sequence[_Row]) -> list[_Row]:
    """Rows of a single engine with a prompt ranker and every request scored."""
    return [row for row in rows
            if (row["engines"], row["ranker_delay_s"], row["unscored_share"]) == (1, 0.0, 0.0)]


def _best_tau(rows: Sequence[_Row]) -> float | None:
    """The tau that the frontier is drawn for, if scores are noisy: the one nearest to a real ranker's."""
    taus = values_of([row for row in rows if row["policy"] == _OURS], "tau")
    return min(taus, key=lambda tau: abs(tau - 0.5)) if taus else None


# --- Head ---------------------------------------------------------------------------------------------------


def _headline(rows: Sequence[_Row]) -> tuple[str, str, str]:
    row = _shown(rows)
    ratio = None if row is None else _ratio(rows, row, "mean_latency_per_token_s")
    if row is None or ratio is None:
        return "Policies and guards, ", "simulated", ""
    return against_arrival_order(f"At load {row['load']:g}, mean latency per token ", ratio)


def _shown(rows: Sequence[_Row]) -> _Row | None:
    """pars_fast at the load nearest to 1.2, with its own guard if it was run."""
    ours = [row for row in _one(rows) if row["policy"] == _OURS and row["tau"] == _best_tau(rows)]
    own = guard_text(POLICIES[_OURS].default_guard)
    return min(ours, key=lambda row: (abs(row["load"] - 1.2), row["guard"] != own), default=None)


def _lead(rows: Sequence[_Row]) -> str:
    row = _shown(rows)
    if row is None:
        return "Below is what was simulated."
    ratios = [f"{title} {number(ratio, 2)}\u00d7" for column, title in (
        ("mean_e2e_s", "mean end-to-end latency"), ("p99_e2e_s", "its 99th percentile"),
        ("max_wait_s", "the longest wait")) if (ratio := _ratio(rows, row, column)) is not None]
    said = [f"pars_fast with {row['guard']}, against arrival order: {', '.join(ratios) or DASH}."]
    kept = [f"{percent(row[column])} {where}" for column, where in (
        ("gain_captured", "per token"), ("gain_captured_e2e", "end to end")) if row[column] is not None]
    if kept:
        said.append(f"Of what an oracle without a guard gains, it keeps {' and '.join(kept)}.")
    return " ".join(said)


# --- Sections -----------------------------------------------------------------------------------------------


def _pareto_section(rows: Sequence[_Row]) -> Markup:
    """Every policy under its own guard; of those that cannot know lengths, the ones that none beats in both
    are ringed."""
    tau = _best_tau(rows)
    own = [row for row in _one(rows) if row["tau"] in (None, tau)
           and row["guard"] == guard_text(POLICIES[row["policy"]].default_guard)]
    if len({row["policy"] for row in own}) < _POLICIES_TO_COMPARE:
        return Markup("")
    figures = []
    for load in values_of(own, "load"):
        for title, across, up in _PARETO:
            points = {row["policy"]: (x, y) for row in own if row["load"] == load
                      and (x := _ratio(rows, row, across)) and (y := _ratio(rows, row, up))}
            honest = [point for policy, point in points.items() if not POLICIES[policy].knows_lengths]
            best = [point for point in honest if not any(
                other != point and other[0] <= point[0] and other[1] <= point[1] for other in honest)]
            chart = line_chart(f"pareto-{across}-{load:g}", f"{title}, load {load:g}",
                               {policy: [point] for policy, point in points.items()},
                               "p99, times arrival order's", "mean, times arrival order's",
                               lambda tick: f"{tick:g}", log=True, include=(1.0, 1.0), ringed=best,
                               styles=_POLICY_STYLES)
            figures.append(figure(f"{title} \u00b7 load {load:g}", chart))
    lead = ("Each point is one policy under its own guard; 1 is arrival order. Lower is faster on average, "
            "further left is kinder to those who wait longest. No policy is better in both than one that is "
            "ringed; the two that know the lengths are left out of that.")
    return section("pareto", "Policies: mean against p99", lead, *figures)


def _frontier_sections(rows: Sequence[_Row]) -> list[Markup]:
    single, tau = _one(rows), _best_tau(rows)
    sections = []
    for policy, meaning in ((_ORACLE, "An oracle's order, guarded"), (_OURS, "A ranker's order, guarded")):
        chosen = [row for row in single if row["policy"] == policy and row["tau"] in (None, tau)]
        if len({row["guard"] for row in chosen}) < 2:
            continue
        noisy = policy == _OURS and tau is not None
        title = f"{meaning} (tau {tau:g})" if noisy else meaning
        figures = [_frontier(rows, chosen, load, frontier) for load in values_of(chosen, "load")
                   for frontier in _FRONTIERS]
        lead = ("Each line is one guard from tight to loose; a point is one setting. 1 is arrival order. "
                "Lower is faster on average, further left is kinder to those who wait longest.")
        sections.append(section(f"frontier-{policy}", title, lead, *figures))
    return sections


def _frontier(rows: Sequence[_Row], chosen: Sequence[_Row], load: float,
              frontier: tuple[str, str, str, str, str]) -> Markup:
    title, across, across_name, up, up_name = frontier
    lines: dict[str, list[Point]] = {}
    for row in chosen:
        point = _ratio(rows, row, across), _ratio(rows, row, up)
        if row["load"] == load and point[0] and point[1]:
            lines.setdefault(guard_name(row), []).append((point[0], point[1]))
    for points in lines.values():
        points.sort()
    chart = line_chart(f"{chosen[0]['policy']}-{across}-{load:g}", f"{title}, load {load:g}", lines,
                   f"{across_name}, times arrival order's", f"{up_name}, times arrival order's",
                   lambda tick: f"{tick:g}", log=True, include=(1.0, 1.0))
    return figure(f"{title} · load {load:g}", chart)


def _curve_sections(rows: Sequence[_Row]) -> list[Markup]:
    sections = []
    for column, title, axis in _CURVES:
        neutral = {"tau": _best_tau(rows), "ranker_delay_s": 0.0, "unscored_share": 0.0}
        ours = [row for row in rows if row["policy"] == _OURS and row["engines"] == 1
                and all(row[name] == value for name, value in neutral.items() if name != column)]
        by_guard = [[row for row in ours if row["guard"] == guard] for guard in values_of(ours, "guard")]
        chosen = max(by_guard, key=lambda group: len(values_of(group, column)), default=[])
        if len(values_of(chosen, column)) < 2:
            continue
        figures = []
        for load in values_of(chosen, "load"):
            lines = {name: sorted((float(row[column]), float(row[gain])) for row in chosen
                                  if row["load"] == load and row[gain] is not None)
                     for name, gain in (("per token", "gain_captured"), ("end to end", "gain_captured_e2e"))}
            kept = {name: points for name, points in lines.items() if len(points) > 1}
            if kept:
                figures.append(figure(f"Load {load:g}", line_chart(
                    f"{column}-{load:g}", f"{title}, load {load:g}", kept, axis, "share of the oracle's gain",
                    percent, include=(None, 0.0))))
        if figures:
            lead = (f"pars_fast with {chosen[0]['guard']}: how much of what the oracle without a guard gains "
                    "over arrival order is kept. Below 0 ranking does harm.")
            sections.append(section(column, title, lead, *figures))
    return sections


def _fleet_section(rows: Sequence[_Row]) -> Markup:
    if len(values_of(rows, "engines")) < 2:
        return Markup("")
    figures = []
    tau = _best_tau(rows)
    for load in values_of(rows, "load"):
        for policy in (_BASELINE, _OURS):
            chosen = [row for row in rows if row["load"] == load and row["policy"] == policy
                      and row["tau"] in (None, tau)]
            lines: dict[str, list[Point]] = {}
            for row in chosen:
                if row["mean_e2e_s"] and row["engines"] > 1:
                    lines.setdefault(row["router"], []).append((float(row["engines"]), row["mean_e2e_s"]))
            kept = {name: sorted(points) for name, points in lines.items()}
            if kept:
                figures.append(figure(f"{policy} · load {load:g}", line_chart(
                    f"fleet-{policy}-{load:g}", f"Mean end-to-end latency of {policy}, load {load:g}", kept,
                    "engines", "mean end-to-end latency, s", number, log=True)))
    lead = ("The same load per engine. A router sends each request to one engine and is done; the "
            "engine's queue orders what it got.")
    return section("fleet", "Many engines behind one router", lead, *figures) if figures else Markup("")


# --- Table and footer ---------------------------------------------------------------------------------------


def _table(rows: Sequence[_Row]) -> Markup:
    """All rows by load, what makes them differ in front."""
    given = [name for name in ("tau", "ranker_delay_s", "unscored_share", "engines", "router")
             if len({row[name] for row in rows}) > 1]
    heads = ["policy", "guard", *(name.replace("_", " ") for name in given), *(title for _, title in _TABLE),
             "gain/token", "gain e2e"]
    bodies = []
    for load in values_of(rows, "load"):
        body = [tag("tr", tag("th", f"Load {load:g}", colspan=len(heads), scope="rowgroup"))]
        body += [_table_row(row, given) for row in rows if row["load"] == load]
        bodies.append(tag("tbody", *body))
    head = tag("tr", *(tag("th", title, scope="col") for title in heads))
    return tag("table", tag("caption", "All columns, seconds"), tag("thead", head), *bodies)


def _table_row(row: _Row, given: Sequence[str]) -> Markup:
    cells = [tag("td", _cell(row[name]), class_="text") for name in given]
    cells += [tag("td", _cell(row[column])) for column, _ in _TABLE]
    cells += [tag("td", percent(row[column])) for column in ("gain_captured", "gain_captured_e2e")]
    guard = tag("td", join(str(row["guard"]).split(","), Markup(",<wbr />")), class_="text")
    return tag("tr", tag("th", row["policy"], scope="row"), guard, *cells)


def _cell(value: Any) -> str:
    if value is None:
        return DASH
    return value if isinstance(value, str) else number(float(value))


def _provenance(result: Mapping[str, Any]) -> Markup:
    hashes = {run["arrivals_sha256"][:12] for run in result["runs"]}
    engine = ", ".join(f"{name} {value:,}" for name, value in result["engine"].items())
    times = ", ".join(f"{name} {value:g}" for name, value in result["step_time"].items() if name != "source")
    entries = [
        ("Engine", engine), ("Step time", times), ("Its source", result["step_time"]["source"]),
        ("Load 1", f"{number(result['capacity_tok_s'], 4)} output tokens/s of one engine, closed loop, fcfs"),
        ("Scores", f"{result['scores']}, tau {number(result['real_tau'])}" if result["scores"] == "real"
         else "noisy, at the tau given"),
        ("Seeds", ", ".join(str(seed) for seed in sorted({run["seed"] for run in result["runs"]}))),
        ("Requests, sha256", f"{', '.join(sorted(hashes)[:6])}{' …' if len(hashes) > 6 else ''}"),
        ("Made by", f"pars-fast {result['version']}, {result['date']}"),
    ]
    return join(join([tag("dt", name), tag("dd", value)]) for name, value in entries)
