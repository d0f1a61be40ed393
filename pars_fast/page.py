"""Markup and axes of the project's pages: escaped HTML, SVG charts, numbers as text."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

DASH, MINUS = "\u2013", "\u2212"


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(text: str) -> Markup:
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def join(parts: Any, separator: str = "") -> Markup:
    return Markup(separator.join(escape(part) for part in parts))


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """An element; children and values are escaped; `class_` stands for class and `data_key` for data-key."""
    given = {key.rstrip("_").replace("_", "-"): attribute(value) for key, value in attributes.items()}
    head = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    if name in VOID:
        return Markup(f"<{name}{head} />")
    return Markup(f"<{name}{head}>{join(children)}</{name}>")


VOID = frozenset({"path", "line", "rect", "circle", "wbr"})


def attribute(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent: 0.0123, 4.56, 1,234."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    return DASH if share is None else f"{share * 100:.0f} %".replace("-", MINUS)


def seconds(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"{number(value * 1e3, digits)} ms" if abs(value) < 1 else f"{number(value, digits)} s"


def against_arrival_order(what: str, ratio: float) -> tuple[str, str, str]:
    """A headline: what comes first, what is emphasised, what follows. Within 2 % it is the same."""
    if 0.98 < ratio < 1.02:
        return what, "about the same", " as in arrival order"
    factor = f"{number(max(ratio, 1 / ratio), 2)}\u00d7 {'lower' if ratio < 1 else 'higher'}"
    return what, factor, " than in arrival order"


def as_float(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


@dataclass(frozen=True)
class Axis:
    """Data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (self.low, self.high, value)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values inside the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                ticks = [step * 10.0**decade for decade in decades for step in steps]
                inside = [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]
                if len(inside) <= count + 1:
                    break
            return inside
        step = round_step((self.high - self.low) / count)
        return [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


def svg(name: str, variant: str, width: int, height: float, title: str, desc: str,
        *children: str) -> Markup:
    ids = f"{name}-{variant}-title", f"{name}-{variant}-desc"
    return tag("svg", tag("title", title, id=ids[0]), tag("desc", desc, id=ids[1]), *children, role="img",
               class_=variant, viewBox=f"0 0 {width} {attribute(height)}", aria_labelledby=" ".join(ids))


def text(x: float, y: float, text: str, **attributes: Any) -> Markup:
    return tag("text", text, x=float(x), y=float(y), **attributes)


def x_axis(axis: Axis, top: float, bottom: float, ticks: Sequence[float],
           label: Callable[[float], str]) -> Markup:
    lines = [tag("line", x1=axis(tick), x2=axis(tick), y1=top, y2=bottom, class_="gridline")
             for tick in ticks]
    texts = [text(axis(tick), bottom + 19, label(tick), text_anchor="middle") for tick in ticks]
    base = tag("line", x1=axis.start, x2=axis.end, y1=bottom, y2=bottom, class_="axis")
    return join([*lines, base, *texts])


def y_axis(axis: Axis, left: float, right: float, ticks: Sequence[float],
           label: Callable[[float], str]) -> Markup:
    lines = [tag("line", x1=left, x2=right, y1=axis(tick), y2=axis(tick), class_="gridline")
             for tick in ticks]
    texts = [text(left - 8, axis(tick) + 4.5, label(tick), text_anchor="end") for tick in ticks]
    return join([*lines, *texts])
