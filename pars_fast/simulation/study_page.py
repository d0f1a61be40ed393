"""The page of a study: what its tables say, one self-contained HTML file of small multiples.

What is relative is relative to arrival order (fcfs) on the same requests at the same load; what a guard keeps
is its share of the mean that the same order gains without a guard. The same tables give the same bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from pars_fast.errors import DataError
from pars_fast.guards import guard_text
from pars_fast.page import Axis, Markup, escape, join, number, percent, svg, tag, text, x_axis
from pars_fast.policies import POLICIES
from pars_fast.simulation.charts import STYLES, Point, figure, line_chart, section
from pars_fast.simulation.page_rows import guard_name, values_of
from pars_fast.simulation.study import BASELINE, ORACLE, OURS, TABLES, TAU, read_table

_Row = Mapping[str, Any]
_LOAD = 1.2  # at which guards are compared
_PER_TOKEN, _END_TO_END = "mean_latency_per_token_s", "mean_e2e_s"
_PAIRS = (  # column across, its name, column up, its name
    ("max_wait_s", "longest wait", _PER_TOKEN, "mean latency per token"),
    ("p99_e2e_s", "99th percentile end to end", _END_TO_END, "mean end to end"),
)
_VARIED = {  # title, what the horizontal axis says
    "tau": ("Quality of the ranking", "Kendall's tau of the scores with the real lengths"),
    "ranker_delay_s": ("Delay of the ranker", "seconds from prompt to score"),
    "unscored_share": ("Requests without a score", "share of all requests"),
}
_WIDTH, _ROW, _LABELS, _KEPT = 1060, 26.0, 290.0, 170.0  # of the strip of guards
_LOOSEST = 1.5  # longest wait over arrival order's that the typical trace may have, for the strip


def write_page(path: Path, folder: Path) -> None:
    """Draw the tables in a folder. Raises: DataError: if there is no frontier.csv."""
    tables = {name: read_table(folder / f"{name}.csv") for name in TABLES}
    path.write_text(render_page(tables), encoding="utf-8")


def render_page(tables: Mapping[str, Sequence[_Row]]) -> str:
    """The page of `write_page` as text, of tables by name; one that is empty is left out."""
    if not tables.get("frontier"):
        raise DataError("no frontier.csv; make it by `pars-fast study frontier --traces DIR --out DIR`")
    relative = _relative(tables["frontier"])
    before, emphasis, after = _headline(relative)
    frame = files("pars_fast.simulation").joinpath("study_page.html").read_text(encoding="utf-8")
    style, script = (files("pars_fast.demo").joinpath(f"report.{kind}").read_text(encoding="utf-8")
                     for kind in ("css", "js"))
    others = ((_robustness, "robustness"), (_no_harm, "no_harm"), (_fleet, "fleet"),
              (_agreement, "agreement"))
    sections = [_strip_section(relative), _frontiers(relative),
                *(make(tables[name]) for make, name in others if tables.get(name))]
    return Template(frame).substitute(
        title=escape(before + emphasis + after), css=style, js=script,
        headline=join([before, tag("em", emphasis), after]), lead=escape(_lead(relative)),
        sections=join(sections), provenance=_provenance(tables))


# --- Rows of the frontier -----------------------------------------------------------------------------------


def _relative(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """Rows with each latency over arrival order's, and what is kept of the gain without a guard."""
    ends = {(row["workload"], row["load"], row["policy"]): row for row in rows if row["guard"] == "none"}
    relative = []
    for row in rows:
        base, loose = (ends[row["workload"], row["load"], policy] for policy in (BASELINE, row["policy"]))
        if row["policy"] != BASELINE:
            ratios = {name: row[name] / base[name] for pair in _PAIRS for name in pair[::2]}
            kept = {f"kept_{name}": _share(base[name] - row[name], base[name] - loose[name], base[name])
                    for name in (_PER_TOKEN, _END_TO_END)}
            relative.append({**row, **ratios, **kept})
    return relative


def _share(part: float, whole: float, scale: float) -> float | None:
    """None where there is under 5 % to gain."""
    return part / whole if whole > 0.05 * scale else None


def _own(row: _Row) -> bool:
    return bool(row["guard"] == guard_text(POLICIES[OURS].default_guard))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _compared(rows: Sequence[_Row], policy: str = OURS) -> list[_Row]:
    return [row for row in rows if row["load"] == _LOAD and row["policy"] == policy]


# --- Head ---------------------------------------------------------------------------------------------------


def _headline(rows: Sequence[_Row]) -> tuple[str, str, str]:
    own = [row for row in _compared(rows) if _own(row)]
    if not own:
        return "Policies and guards, ", "simulated", ""
    longest = max(row["max_wait_s"] for row in own)
    lower = 1 - (_mean(row[_PER_TOKEN] for row in own) or 0)
    return ("Shortest answer first: latency per token ", f"{percent(lower)} lower",
            f", and on no trace does anyone wait more than {number(longest, 2)}\u00d7 as long")


def _lead(rows: Sequence[_Row]) -> str:
    own = [row for row in _compared(rows) if _own(row)]
    waits = [row["max_wait_s"] for row in _compared(rows) if row["guard"] == "none"]
    if not own:
        return "Below is what was simulated."
    kept = _mean(row[f"kept_{_PER_TOKEN}"] for row in own)
    return (f"{len(own)} recorded traces at load {_LOAD:g}, scores of tau {TAU:g}, one setting of one guard. "
            f"Without a guard the longest wait is {number(min(waits), 2)} to {number(max(waits), 2)} times "
            f"that of arrival order. The guard keeps {percent(kept)} of the gain per token, on average.")


# --- One setting for every trace ----------------------------------------------------------------------------


def _strip_section(rows: Sequence[_Row]) -> Markup:
    """Of each guard, the setting that keeps most among those tight enough in the median of all runs."""
    compared = [row for row in rows if row["policy"] == OURS and row["guard"] != "none"]
    best: dict[str, list[_Row]] = {}
    for setting in values_of(compared, "guard"):
        of_it = [row for row in compared if row["guard"] == setting]
        waits = sorted(row["max_wait_s"] for row in of_it)
        if waits[len(waits) // 2] <= _LOOSEST and _kept(of_it) > _kept(best.get(guard_name(of_it[0]), [])):
            best[guard_name(of_it[0])] = of_it
    if not best:
        return Markup("")
    lead = ("Each dot is a trace at one load, bursts included; each row one guard, with the setting that "
            f"keeps most while the median longest wait is within {_LOOSEST:g} times arrival order's. A "
            "setting is worth having if its dots lie close together: it then means the same on a trace that "
            "nobody tuned it for.")
    strip = _strip(sorted(best.values(), key=_kept, reverse=True))
    return tag("section", tag("h2", "One setting for every trace", id="strip"), tag("p", lead),
               tag("div", strip, class_="card"), aria_labelledby="strip")


def _kept(rows: Sequence[_Row]) -> float:
    return _mean(row[f"kept_{_PER_TOKEN}"] for row in rows) or 0.0 if rows else -1.0


def _strip(guards: Sequence[Sequence[_Row]]) -> Markup:
    top, bottom = 34.0, 34.0 + _ROW * len(guards)
    waits = [row["max_wait_s"] for rows in guards for row in rows]
    x = Axis(min(0.9, *waits), 1.05 * max(waits), _LABELS, _WIDTH - _KEPT, log=True)
    parts = [x_axis(x, top, bottom, x.ticks(6), lambda tick: f"{tick:g}\u00d7"),
             tag("line", x1=x(1.0), x2=x(1.0), y1=top, y2=bottom, class_="diagonal"),
             text(_LABELS, 14, "longest wait, times arrival order's"),
             text(_WIDTH, 14, "gain kept: per token, end to end", text_anchor="end")]
    for place, rows in enumerate(guards):
        y, style = top + _ROW * (place + 0.5), STYLES.get(guard_name(rows[0]), "other0")
        ends = [x(pick(row["max_wait_s"] for row in rows)) for pick in (min, max)]
        kept = ", ".join(percent(_mean(row[f"kept_{column}"] for row in rows))
                         for column in (_PER_TOKEN, _END_TO_END))
        setting = str(rows[0]["guard"]).partition(":")[2].split(",")[0].replace("=", " ").replace("_", " ")
        parts += [text(0, y + 4.5, guard_name(rows[0]).replace("_", " "), class_=f"name {style}"),
                  text(_LABELS - 16, y + 4.5, setting, text_anchor="end"),
                  tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_=f"leader {style}"),
                  *(tag("circle", cx=float(x(row["max_wait_s"])), cy=y, r=4.5, class_=f"mark {style}")
                    for row in rows),
                  text(_WIDTH, y + 4.5, kept, text_anchor="end", class_=f"name {style}")]
    desc = "; ".join(f"{rows[0]['guard']}: " + ", ".join(
        f"{row['workload']} {number(row['max_wait_s'], 2)}" for row in rows) for rows in guards)
    return svg("strip", "chart", _WIDTH, bottom + 28, "Longest wait by guard and trace", desc, *parts)


# --- Frontiers ----------------------------------------------------------------------------------------------


def _frontiers(rows: Sequence[_Row]) -> Markup:
    lead = ("A line is one guard from tight to loose, a point one setting; the ring is the default. Lower is "
            "faster on average, further left is kinder to who waits longest; both are multiples of arrival "
            "order's.")
    titles = {OURS: f"Guards on a ranker's order (tau {TAU:g}), load {_LOAD:g}",
              ORACLE: f"Guards on an oracle's order, load {_LOAD:g}: what no ranker can beat"}
    sections = []
    for policy, title in titles.items():
        compared = _compared(rows, policy)
        figures = [_frontier(compared, workload, _LOAD, pair, workload)
                   for workload in values_of(compared, "workload") for pair in _PAIRS]
        if figures:
            sections.append(section(f"frontier-{policy}", title, lead, *figures))
    ours = [row for row in rows if row["policy"] == OURS]
    others = [(workload, load) for workload, load in sorted({(row["workload"], row["load"]) for row in ours})
              if load != _LOAD and ("conv" in workload or "burst" in workload)]
    figures = [_frontier(ours, workload, load, _PAIRS[0], f"{workload}, load {load:g}")
               for workload, load in others]
    if figures:
        said = "A ranker's order again, per token."
        sections.append(section("loads", "Other loads, and bursts", said, *figures))
    return join(sections)


def _frontier(rows: Sequence[_Row], workload: str, load: float, pair: tuple[str, str, str, str],
              caption: str) -> Markup:
    across, across_name, up, up_name = pair
    chosen = [row for row in rows if (row["workload"], row["load"]) == (workload, load)]
    lines: dict[str, list[Point]] = {}
    for row in chosen:
        lines.setdefault(guard_name(row), []).append((row[across], row[up]))
    name = f"{chosen[0]['policy']}-{workload}-{load:g}-{across}".replace(" ", "-")
    chart = line_chart(name, f"{caption}: {up_name}", {guard: sorted(at) for guard, at in lines.items()},
                       f"{across_name}, times arrival order's", f"{up_name}, times arrival order's",
                       lambda tick: f"{tick:g}", log=True, include=(1.0, 1.0),
                       ringed=[(row[across], row[up]) for row in chosen if _own(row)])
    return figure(caption.replace("_", " "), chart)


# --- The other tables ---------------------------------------------------------------------------------------


def _robustness(rows: Sequence[_Row]) -> Markup:
    lead = ("What pars_fast with its own guard captures of the gain of an oracle without one, at load "
            f"{_LOAD:g}. Below 0 ranking does harm.")
    sections = []
    for varied, (title, axis) in _VARIED.items():
        chosen = [row for row in rows if row["varied"] == varied and row["load"] == _LOAD]
        figures = []
        for column, name in (("gain_captured", "per token"), ("gain_captured_e2e", "end to end")):
            lines: dict[str, list[Point]] = {}
            for row in chosen:
                if row[column] is not None:
                    lines.setdefault(str(row["workload"]), []).append((row["value"], row[column]))
            if lines:
                chart = line_chart(f"{varied}-{column}", f"{title}, {name}",
                                   {workload: sorted(points) for workload, points in lines.items()}, axis,
                                   "share of the oracle's gain", percent, include=(None, 0.0))
                figures.append(figure(name, chart))
        if figures:
            sections.append(section(varied, title, lead, *figures))
    return join(sections)


def _no_harm(rows: Sequence[_Row]) -> Markup:
    worse = [row for row in rows if row["low"] > 0]
    cells = [(row["workload"], f"{row['load']:g}", f"{row['tau']:g}", row["column"], number(row["fcfs"]),
              f"{row['change']:+.1%}", f"{row['low']:+.1%} to {row['high']:+.1%}") for row in worse]
    loads = ", ".join(f"{load:g}" for load in values_of(rows, "load"))
    said = (f"{len(worse)} of {len(rows)} columns are worse beyond their 95 % interval, with scores of tau 0 "
            f"and {TAU:g}, at loads {loads}; paired over {rows[0]['pieces']:g} pieces of each trace. By "
            "chance alone it would be one in 40.")
    heads = ("trace", "load", "tau", "column", "fcfs, s", "change", "95 % interval")
    return _table("no-harm", "Below saturation", said, heads, cells)


def _fleet(rows: Sequence[_Row]) -> Markup:
    figures = []
    for policy in (BASELINE, OURS):
        lines: dict[str, list[Point]] = {}
        for row in rows:
            if row["policy"] == policy and row["engines"] > 1:
                lines.setdefault(row["router"], []).append((row["engines"], row[_END_TO_END]))
        chart = line_chart(f"fleet-{policy}", f"Mean end-to-end latency of {policy} by engines",
                           {router: sorted(points) for router, points in lines.items()}, "engines",
                           "mean end-to-end latency, s", number, log=True)
        figures.append(figure(policy, chart))
    lead = ("The same load per engine. A router sends each request to one engine and is done; the engine's "
            "queue orders what it got.")
    return section("fleet", "Many engines behind one router", lead, *figures)


def _agreement(rows: Sequence[_Row]) -> Markup:
    worst: dict[tuple[Any, ...], _Row] = {}
    for row in rows:
        case = row["workload"], row["policy"]
        if case not in worst or abs(row["error"]) > abs(worst[case]["error"]):
            worst[case] = row
    cells = [(workload, policy, f"{row['requests']:,.0f}", row["column"], number(row["faithful_s"]),
              number(row["fast_s"]), f"{row['error']:+.1%}") for (workload, policy), row in worst.items()]
    said = ("Mean and 99th percentile of latency per token, time to first token and end-to-end latency; of "
            "each run the column in which the fast simulator is furthest from vLLM's own scheduler.")
    heads = ("trace", "policy", "requests", "worst column", "vLLM's, s", "fast, s", "error")
    return _table("agreement", "The two simulators", said, heads, cells)


def _table(name: str, title: str, said: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Markup:
    head = tag("tr", *(tag("th", head, scope="col") for head in heads))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
            for row in cells]
    table = tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="card scroll")
    return tag("section", tag("h2", title, id=name), tag("p", said), table if cells else "",
               aria_labelledby=name)


def _provenance(tables: Mapping[str, Sequence[_Row]]) -> Markup:
    entries = []
    for name, rows in tables.items():
        if rows:
            made = (f"{column} {rows[0][column]}" for column in ("profile", "version", "commit", "date"))
            entries.append((f"{name}.csv", ", ".join([f"{len(rows):,} rows", *made])))
    return join(join([tag("dt", name), tag("dd", value)]) for name, value in entries)
