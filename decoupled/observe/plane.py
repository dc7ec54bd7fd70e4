"""One more chart for the report: lines and dots over two axes, each linear, logarithmic, or a row of names.

Like those of charts.py it decides geometry and leaves colour to the page's style sheet. A line is named at its right
end; dots are what the line was chosen from. Lines under the pointer come to the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from decoupled.observe.charts import CHARACTER, LINE, WIDTH, Axis, _line, _svg, _text, short, spread, tag, ticks

FORM = {"top": 26.0, "left": 52.0}


@dataclass(frozen=True)
class Curve:
    """One line with its name, and dots beside it; points are (x, y)."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float]] = ()
    text: str = ""  # stands behind the label, such as the last value


@dataclass(frozen=True)
class Scale:
    """How an axis is drawn: its name, and either logarithmic, or with `names` at 0, 1, 2, ..."""

    name: str
    log: bool = False
    names: Sequence[str] = ()

    def __call__(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, axis: Axis) -> list[tuple[float, str]]:
        """(place on the axis, text); `axis` has this scale's transformed values."""
        if self.names:
            return [(float(i), name) for i, name in enumerate(self.names)]
        if not self.log:
            return [(value, f"{value:,.6g}") for value in ticks(axis.low, axis.high)]
        if axis.high - axis.low < 0.7:  # few powers and their fractions would be inside: round numbers instead
            found = [value for value in ticks(10**axis.low, 10**axis.high) if value > 0]
            return [(math.log10(value), f"{value:,.6g}") for value in found]
        decades = range(math.floor(axis.low), math.ceil(axis.high) + 1)
        steps = (1, 2, 5) if axis.high - axis.low < 2 else (1, 3) if axis.high - axis.low < 4 else (1,)
        found = [(math.log10(s * 10.0**d), f"{s * 10.0**d:,.6g}") for d in decades for s in steps]
        return [(place, text) for place, text in found if axis.low <= place <= axis.high]


def plane(curves: Sequence[Curve], title: str, x_scale: Scale, y_scale: Scale) -> Markup:
    """Draw the curves; at least one of them has a point."""
    named = [curve for curve in curves if curve.points]
    room = min(max(len(curve.label) + len(curve.text) + 1 for curve in named) * CHARACTER, 178)
    left, right, top = FORM["left"], WIDTH - room - 32, FORM["top"]
    bottom = max(300.0, len(named) * LINE + 48)
    every = [point for curve in curves for point in (*curve.points, *curve.dots)]
    x = _axis([x_scale(a) for a, _ in every], left, right)
    y = _axis([y_scale(b) for _, b in every], bottom, top)
    marks = [_text(0, 12, y_scale.name, kind="axis"), _text(right, bottom + 32, x_scale.name, "end", "axis")]
    for place, text in y_scale.ticks(y):
        marks += [_line(left, y(place), right, y(place), "grid"), _text(left - 7, y(place) + 4, text, "end", "tick")]
    marks += _numbers(x_scale, x, top, bottom)
    ordered = sorted(named, key=lambda curve: y(y_scale(curve.points[-1][1])))
    places = dict(zip(map(id, ordered), spread(_ends(ordered, y, y_scale), LINE, top, bottom), strict=True))
    for curve in curves:
        spots = [(x(x_scale(a)), y(y_scale(b))) for a, b in curve.dots]
        group = [tag("title", curve.label)]
        group += [tag("circle", cx=a, cy=b, r=2.0, class_="dot faint") for a, b in spots]
        if curve.points:
            way = [(x(x_scale(a)), y(y_scale(b))) for a, b in curve.points]
            group += _named_line(way, curve, room, right, places[id(curve)])
        marks.append(tag("g", *group, class_=f"series {curve.style}"))
    return _svg(WIDTH, bottom + 42, title, *marks, kind="lines")


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis with a little room at both ends."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low)
    return Axis(low - margin, high + margin, start, end)


def _ends(curves: Sequence[Curve], y: Axis, scale: Scale) -> list[float]:
    return [y(scale(curve.points[-1][1])) for curve in curves]


def _numbers(scale: Scale, x: Axis, top: float, bottom: float) -> list[Markup]:
    """Grid lines of the x axis, and below them the numbers or names that fit side by side."""
    marks, free = [], -math.inf  # where the next text may begin
    for place, text in scale.ticks(x):
        marks.append(_line(x(place), top, x(place), bottom, "grid"))
        shown = short(text, x.end - x.start)
        width = len(shown) * CHARACTER
        begin = max(min(x(place) - width / 2, x.end - width), 0.0)
        if begin > free:
            marks.append(_text(begin, bottom + 16, shown, kind="tick"))
            free = begin + width + CHARACTER
    return marks


def _named_line(
    way: Sequence[tuple[float, float]], curve: Curve, room: float, right: float, place: float
) -> list[Markup]:
    """The line with a dot at every point, and a leader from its last point to its key and name."""
    name = short(curve.label, room - (len(curve.text) + 1) * CHARACTER) + " "
    path = "M" + " L".join(f"{a:.1f},{b:.1f}" for a, b in way)
    (a, b) = way[-1]
    return [
        tag("path", d=path, class_="hit"),
        tag("path", d=path, class_="line"),
        *(tag("circle", cx=a, cy=b, r=3.0, class_="dot") for a, b in way),
        tag("path", d=f"M{a:.1f},{b:.1f} L{right + 7:.1f},{place:.1f}", class_="leader"),
        tag("path", d=f"M{right + 7:.1f},{place:.1f} h18", class_="line"),
        tag("text", name, tag("tspan", curve.text, class_="value"), x=right + 30, y=place + 4, class_="label"),
    ]
