"""Inline SVG drawing for the report: lines, bars, block bars, histograms and Gantt charts, without any library.

Each function returns one finished `<svg>` as escaped Markup. Geometry is decided here, colour is not: a mark carries
classes (`k3 d1`: hue 3, dash pattern 1; `op-F`: forward) and the page's style sheet gives them their light, dark and
print colours. Charts scale with their column. Text is measured by a cautious width per character, so that a label is
placed, shortened or left out before it can touch another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from decoupled.observe.trace import Span, natural_key, operation_kind

WIDTH = 500  # drawn width; the page scales it to its column
CHARACTER = 6.6  # width of one character of the 12 px labels, taken on the wide side
LINE = 15  # height of one label
HUES, DASHES = 6, 4
KIB = 1024


@dataclass(frozen=True)
class Series:
    """One line: points are (x, mean y, lowest y, highest y)."""

    label: str
    style: str
    points: Sequence[tuple[float, float, float, float]]
    text: str = ""  # stands behind the label, such as the last value


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: stacked parts, or one part with a whisker from `low` to `high`."""

    label: str
    style: str
    parts: Sequence[float]
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """Maps values low..high to pixels start..end; an empty range is widened so that it has a length."""

    low: float
    high: float
    start: float
    end: float

    def __post_init__(self) -> None:
        if not self.high > self.low:
            margin = 0.1 * abs(self.low)
            object.__setattr__(self, "low", self.low - margin)
            object.__setattr__(self, "high", self.high + (margin or 1.0))

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def style_of(number: int) -> str:
    """Classes of the `number`-th method: six hues that colour-blind readers can tell apart, then another dash."""
    return f"k{number % HUES} d{number // HUES % DASHES}"


def tag(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """One element, its attributes and plain text escaped; `class_` becomes `class`, every other `_` becomes `-`."""
    text = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{v:.2f}" if isinstance(v, float) else v)
        for key, v in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), text, Markup("").join(children))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """The round numbers (1, 2 or 5 times a power of ten apart, about `count` of them) inside low..high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """All ticks with the digits that their step needs, thousands separated."""
    step = values[1] - values[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value + 0.0:,.{digits}f}" for value in values]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending positions as near to `wanted` (ascending) as a distance of `gap` allows, inside low..high."""
    groups: list[tuple[float, int]] = []  # (sum, count) of wanted[i] - i * gap, pooled until the means ascend
    for i, y in enumerate(wanted):
        total, count = y - i * gap, 1
        while groups and groups[-1][0] / groups[-1][1] > total / count:
            total, count = total + groups[-1][0], count + groups.pop()[1]
        groups.append((total, count))
    means = [total / count for total, count in groups for _ in range(count)]
    top = high - gap * (len(means) - 1)
    return [max(low, min(mean, top)) + i * gap for i, mean in enumerate(means)]


def significant(number: float, digits: int = 3) -> str:
    """`number` with so many significant digits and thousands separated: 12345.6 -> 12,300."""
    if not math.isfinite(number):
        return "not finite"
    places = digits - 1 - math.floor(math.log10(abs(number))) if number else 0
    return f"{round(number, places):,.{max(0, places)}f}"


def fixed(digits: int, scale: float = 1.0, unit: str = "") -> Callable[[float], str]:
    """A format with so many digits after the point, of the number times `scale`."""
    return lambda number: f"{number * scale:,.{digits}f}{unit}" if math.isfinite(number) else "not finite"


percent = fixed(1, 100)


def byte_unit(most: float) -> tuple[str, float]:
    """Unit and its bytes in which `most` bytes read well."""
    power = min(3, int(math.log(most, KIB))) if most >= 1 else 0
    return ("B", "KiB", "MiB", "GiB")[power], float(KIB**power)


def short(text: str, room: float) -> str:
    """`text`, with an ellipsis for its middle where `room` pixels are too few: long labels differ at their ends."""
    most = max(1, int(room / CHARACTER + 1e-6))  # room is often just so many characters
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"


def _svg(width: float, height: float, title: str, *children: Markup, kind: str) -> Markup:
    box, kind = f"0 0 {width:.0f} {height:.0f}", f"chart {kind}"
    return tag("svg", *children, viewBox=box, role="img", aria_label=title, class_=kind)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> Markup:
    return tag("text", text, x=float(x), y=float(y), text_anchor=anchor, class_=kind or "label")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=kind)


def _rect(x: float, y: float, width: float, height: float, kind: str, *children: Markup) -> Markup:
    size = {"width": float(max(width, 0)), "height": float(max(height, 0))}
    return tag("rect", *children, x=float(x), y=float(y), **size, class_=kind)


def _x_axis(x: Axis, top: float, bottom: float, name: str, count: int = 5, unit: str = "") -> list[Markup]:
    """Vertical grid lines with their numbers, as many as fit side by side, and the axis name below."""
    values = ticks(x.low, x.high, count)
    texts = [text + unit for text in tick_texts(values)]
    every = math.ceil((max(map(len, texts)) + 1.5) * CHARACTER / (x(values[1]) - x(values[0])))
    named = list(zip(values, texts, strict=True))[::every]
    marks = [_line(x(value), top, x(value), bottom, "grid") for value in values]
    marks += [_text(x(value), bottom + 16, text, "middle", "tick") for value, text in named]
    return [*marks, _text(x.end, bottom + 32, name, "end", "axis")] if name else marks


def line_chart(series: Sequence[Series], title: str, x_name: str, y_name: str) -> Markup:
    """Lines over common axes, each named at its right end; its range over seeds shows under the pointer."""
    label_room = min(max(len(s.label) + len(s.text) + 1 for s in series) * CHARACTER, 178)
    left, right, top = 40.0, WIDTH - label_room - 32, 26.0
    bottom = max(358.0, len(series) * LINE + 48)
    points = [p for s in series for p in s.points]
    lasts = [s.points[-1][0] for s in series]
    x = Axis(0, min(max(lasts), 3 * median(lasts)), left, right)  # a few slow ones do not squeeze the others
    ends, lowest = [s.points[-1][1] for s in series], min(p[2] for p in points)
    cut = min(ends) - max(0.4 * (max(ends) - min(ends)), 0.25 * (max(ends) - lowest))  # so that the ends stay apart
    y = Axis(max(cut, lowest) if len(series) > 1 else lowest, max(p[3] for p in points), bottom, top)
    marks = [*_x_axis(x, top, bottom, x_name), _text(0, 12, y_name, kind="axis")]
    y_ticks = ticks(y.low, y.high, 8)
    for value, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
        marks += [_line(left, y(value), right, y(value), "grid"), _text(left - 7, y(value) + 4, text, "end", "tick")]
    ordered = sorted(series, key=lambda s: y(s.points[-1][1]))
    places = spread([y(s.points[-1][1]) for s in ordered], LINE, top, bottom)
    size = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    window = size | {"viewBox": f"{left} {top} {right - left} {bottom - top}"}  # cuts what lies outside the axes
    for s, place in zip(ordered, places, strict=True):
        middle, high, low = ([f"{x(p[0]):.1f},{y(p[i]):.1f}" for p in s.points] for i in (1, 3, 2))
        path = f"M{' L'.join(middle)}"
        band = tag("path", d=f"M{' L'.join(high + low[::-1])}Z", class_="band")
        lines = [band, tag("path", d=path, class_="hit"), tag("path", d=path, class_="line")]
        end = (min(x(s.points[-1][0]), right), y(s.points[-1][1]))
        leader = tag("path", d=f"M{end[0]:.1f},{end[1]:.1f} L{right + 7:.1f},{place:.1f}", class_="leader")
        key = tag("path", d=f"M{right + 7:.1f},{place:.1f} h18", class_="line")
        label = [short(s.label, label_room - (len(s.text) + 1) * CHARACTER) + " ", tag("tspan", s.text, class_="value")]
        group = [tag("title", f"{s.label} {s.text}"), tag("svg", *lines, **window), leader, key]
        group += [tag("circle", cx=end[0], cy=end[1], r=3, class_="dot")] if s.points[-1][0] <= x.high else []
        group += [tag("text", *label, x=right + 30, y=place + 4, class_="label")]
        marks.append(tag("g", *group, class_=f"series {s.style}"))
    return _svg(WIDTH, bottom + 42, title, *marks, kind="lines")


def bar_chart(bars: Sequence[Bar], title: str, x_name: str, reference: float | None = None) -> Markup:
    """Horizontal bars from zero, one row each, the value's text behind the bar; `reference` is a dashed line."""
    names = min(max(len(bar.label) for bar in bars) * CHARACTER + 14, 156)
    values = max(len(bar.text) for bar in bars) * CHARACTER + 10
    top, row = 4.0, 22.0
    bottom = top + row * len(bars) + 4
    x = Axis(0, max(max(sum(bar.parts), bar.high or 0) for bar in bars), names, WIDTH - values)
    marks, texts = _x_axis(x, top, bottom, x_name), []
    for i, bar in enumerate(bars):
        y, start, group = top + 4 + i * row, 0.0, [tag("title", f"{bar.label}: {bar.text}")]
        for n, part in enumerate(bar.parts):
            gap = 1.0 if n and x(part) - x.start > 3 else 0.0
            group.append(_rect(x(start) + gap, y + 2, x(part) - x.start - gap, 14, f"bar part{n % 2}"))
            start += part
        end = x(start)
        if bar.low is not None and bar.high is not None and bar.high > bar.low:
            group.append(_line(x(bar.low), y + 9, x(bar.high), y + 9, "whisker"))
            group += [_line(x(v), y + 6, x(v), y + 12, "whisker") for v in (bar.low, bar.high)]
            end = max(end, x(bar.high))
        marks.append(tag("g", *group, class_=bar.style))
        texts += [
            _text(names - 8, y + 13, short(bar.label, names - 14), "end"),
            _text(end + 6, y + 13, bar.text, kind="value"),
        ]
    if reference is not None:
        marks.append(_line(x(reference), top, x(reference), bottom, "reference"))
    return _svg(WIDTH, bottom + 38, title, *marks, *texts, kind="bars")


def block_bars(rows: Sequence[tuple[str, str, Sequence[float]]], title: str) -> Markup:
    """Shares (0..1) per block: one row per (label, style, shares), one full-scale bar per block."""
    names = min(max(len(label) for label, _, _ in rows) * CHARACTER + 14, 156)
    count, row, top = max(len(shares) for _, _, shares in rows), 22.0, 24.0
    cell = (WIDTH - names) / count
    room = 44.0 if cell >= 84 else 0.0  # for the number behind the bar
    every = math.ceil(60 / cell)
    named = [b for b in range(0, count, every) if names + b * cell + 60 <= WIDTH]
    marks = [_text(names + b * cell, 13, f"block {b}", kind="tick") for b in named]
    for i, (label, style, shares) in enumerate(rows):
        y = top + i * row
        group = [_text(names - 8, y + 13, short(label, names - 14), "end")]
        for b, share in enumerate(shares):
            x, full = names + b * cell, cell - room - (0 if room else min(6, cell / 5))
            group += [_rect(x, y + 2, full, 14, "track")]
            hint = tag("title", f"{label}, block {b}: {share:.0%}")
            group += [_rect(x, y + 2, full * min(share, 1), 14, "bar part0", hint)]
            group += [_text(x + full + 6, y + 13, f"{share:.0%}", kind="value")] if room else []
        marks.append(tag("g", *group, class_=style))
    return _svg(WIDTH, top + row * len(rows) + 4, title, *marks, kind="bars")


def histograms(blocks: Sequence[Mapping[int, float]], highest: int, style: str, title: str) -> Markup:
    """One small histogram per block over staleness 0..highest: share of the updates (0..1) at each staleness."""
    width, left = 270, 54.0
    row, plot = (50.0, 30.0) if len(blocks) <= 12 else (24.0, 14.0)
    size = math.ceil((highest + 1) / 13)  # staleness values in one bar
    bins = highest // size + 1
    step = min((width - left - 6) / bins, 42.0)
    marks = []
    for b, shares in enumerate(blocks):
        base = 8 + b * row + plot + 8
        group = [_text(0, base - 2, f"block {b}", kind="tick"), _line(left, base, left + step * bins, base, "rule")]
        for n in range(bins):
            share = sum(shares.get(v, 0.0) for v in range(n * size, (n + 1) * size))
            name = f"{n * size}" if size == 1 else f"{n * size} to {(n + 1) * size - 1}"
            hint = tag("title", f"block {b}, staleness {name}: {share:.1%} of the updates")
            if share > 0:
                tall = max(1.0, plot * share)
                group.append(_rect(left + n * step + 1, base - tall, step - 2, tall, "bar part0", hint))
                if share >= 0.005 and step >= 4 * CHARACTER and row > 30:
                    group.append(_text(left + (n + 0.5) * step, base - tall - 3, f"{share:.0%}", "middle", "tiny"))
        marks.append(tag("g", *group, class_=style))
    end = 8 + (len(blocks) - 1) * row + plot + 22
    every = math.ceil((len(str(highest)) + 1.5) * CHARACTER / step)
    marks += [_text(left + (n + 0.5) * step, end, f"{n * size}", "middle", "tick") for n in range(0, bins, every)]
    return _svg(width, end + 6, title, *marks, kind="bars")


def gantt(spans: Sequence[Span], title: str) -> Markup:
    """Operations as boxes on measured time (ms), one row per track; a box carries its name where the name fits."""
    tracks = sorted({span.track for span in spans}, key=natural_key)
    first = min(span.start for span in spans)
    left = min(max(map(len, tracks)) * CHARACTER + 8, 120)
    row = 26.0 if len(tracks) <= 12 else 14.0
    top, bottom = 4.0, 4.0 + row * len(tracks) + 2
    x = Axis(0, max(span.end - first for span in spans) * 1e3, left, WIDTH - 24)
    marks = _x_axis(x, top, bottom, "", 6, " ms")
    for i, track in enumerate(tracks):
        marks.append(_text(left - 8, top + (i + 0.5) * row + 4, short(track, left - 8), "end", "tick"))
        marks += [_line(left, top + i * row, x.end, top + i * row, "grid")] if i else []
    for span in spans:
        y = top + tracks.index(span.track) * row + 2
        begin, end = x((span.start - first) * 1e3), x((span.end - first) * 1e3)
        kind = span.name[:1] if operation_kind(span.name, span.track) != "other" else "other"
        hint = tag("title", f"{span.track} {span.name}: {(span.end - span.start) * 1e3:.3g} ms")
        marks.append(_rect(begin, y, max(end - begin, 0.6), row - 4, f"op op-{kind}", hint))
        if len(span.name) * CHARACTER + 3 <= end - begin and row > 20:
            marks.append(_text((begin + end) / 2, y + row / 2 + 2, span.name, "middle", "op-name"))
    return _svg(WIDTH, bottom + 22, title, *marks, kind="gantt")
