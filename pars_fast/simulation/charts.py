"""Charts of the simulators' pages: lines with a mark at each point, named at their ends."""

from collections.abc import Callable, Mapping, Sequence

from pars_fast.page import Axis, Markup, number, svg, tag, text, x_axis, y_axis

Point = tuple[float, float]
STYLES = {  # one colour for each guard, router and measure on all pages
    "passing_limit": "pars_fast", "none": "oracle", "overtaking_budget": "s4", "fixed_threshold": "s1",
    "idle_quantum": "s2", "relative_ageing": "s3", "uniboost": "s5", "round_robin": "fcfs",
    "least_loaded": "s1", "predicted_work": "pars_fast", "per token": "pars_fast", "end to end": "s1",
}
_OTHER = "other0"
_WIDTH, _HEIGHT, _NAMES = 500, 290.0, 132.0  # of one chart; room for the names of its lines
_NAME_HEIGHT = 17


def section(name: str, title: str, lead: str, *figures: Markup) -> Markup:
    return tag("section", tag("h2", title, id=name), tag("p", lead), tag("div", *figures, class_="pair"),
               aria_labelledby=name)


def figure(caption: str, chart: Markup) -> Markup:
    return tag("figure", tag("figcaption", caption), chart, class_="card")


def line_chart(name: str, title: str, lines: Mapping[str, Sequence[Point]], x_title: str, y_title: str,
           y_label: Callable[[float], str], *, log: bool = False,
           include: tuple[float | None, float | None] = (None, None), ringed: Sequence[Point] = (),
           styles: Mapping[str, str] = STYLES) -> Markup:
    """Lines with a mark at each point, each named in its colour at the right; `log` where a range is wide.

    `include` are values that the axes hold, with a dotted line; `ringed` points are the ones to look at;
    `styles` are the lines' CSS classes.
    """
    xs, ys = ([point[k] for points in lines.values() for point in points]
              + [value for value in (include[k],) if value is not None] for k in (0, 1))
    height = max(_HEIGHT, 72 + _NAME_HEIGHT * len(lines))  # room for all names
    right, bottom, top, left = _WIDTH - _NAMES, height - 46, 26.0, 46.0
    x, y = _axis(xs, left, right, log), _axis(ys, bottom, top, log)
    desc = "; ".join(f"{label}: " + ", ".join(f"({number(a)}, {y_label(b)})" for a, b in points)
                     for label, points in lines.items())
    drawn = [part for label, points in lines.items()
             for part in _line(label, points, x, y, styles.get(label, _OTHER))]
    drawn += [tag("circle", cx=float(x(a)), cy=float(y(b)), r=8.0, class_="ring") for a, b in ringed]
    if include[0] is not None and include[1] is not None:
        drawn.append(tag("line", x1=x(include[0]), x2=x(include[0]), y1=top, y2=bottom, class_="diagonal"))
    if include[1] is not None:
        drawn.append(tag("line", x1=left, x2=right, y1=y(include[1]), y2=y(include[1]), class_="diagonal"))
    chart = svg(name, "chart", _WIDTH, height, title, desc,
                x_axis(x, top, bottom, x.ticks(5), lambda tick: f"{tick:g}"),
                y_axis(y, left, right, y.ticks(5), y_label),
                text(0, 12, y_title), text(right, height - 6, x_title, text_anchor="end"),
                *drawn, *_names(lines, styles, x, y, right, top, bottom))
    return tag("div", chart, data_scope="")


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> Axis:
    low, high = min(values), max(values)
    if log and high > 4 * low > 0:
        return Axis(low / 1.06, high * 1.06, start, end, log=True)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low if low == 0 else low - margin, high + margin, start, end)


def _line(label: str, points: Sequence[Point], x: Axis, y: Axis, style: str) -> list[Markup]:
    path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
    marks = [tag("circle", cx=float(x(a)), cy=float(y(b)), r=3.2, class_=f"mark {style}") for a, b in points]
    return [tag("g", tag("path", d=f"M{path}", class_=f"curve {style}"), *marks, data_key=label)]


def _names(lines: Mapping[str, Sequence[Point]], styles: Mapping[str, str], x: Axis, y: Axis, right: float,
           top: float, bottom: float) -> list[Markup]:
    """Each line's name beside its last point, moved apart where they would touch, with a thin line to it."""
    ends = sorted((y(points[-1][1]), x(points[-1][0]), label) for label, points in lines.items())
    heights: list[float] = []
    for place, (height, _, _) in enumerate(ends):
        heights.append(max(height, heights[-1] + _NAME_HEIGHT if place else top))
    lowest = bottom
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], lowest)
        lowest = heights[place] - _NAME_HEIGHT
    parts = []
    for (height, end, label), at in zip(ends, heights, strict=True):
        style = styles.get(label, _OTHER)
        parts.append(tag("line", x1=float(end + 4), y1=float(height), x2=right + 6, y2=float(at),
                         class_=f"leader faint {style}", data_key=label))
        parts.append(text(right + 9, at + 4.5, label.replace("_", " "), class_=f"name {style}",
                          data_key=label))
    return parts
