"""A picture of lines in panels side by side, as SVG; axes are shared, x is logarithmic or not, y begins at 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#999999", "#cc79a7", "#e69f00")  # told apart by the colour-blind, too
_WIDTH, _HEIGHT, _GAP = 260, 240, 22  # of a panel, and between panels
_LEFT, _TOP, _BOTTOM, _ROW = 52, 34, 46, 20  # margins; height of a row of the legend

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One set of axes: `lines` by name; `limit` is drawn grey and dotted beneath them."""

    title: str
    lines: Mapping[str, Points]
    limit: Points = ()


@dataclass(frozen=True)
class Axes:
    """What all panels share."""

    x_label: str
    y_label: str
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    log: bool = True

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels within a panel, the origin at its upper left corner."""
        low, high, x = (math.log(n) if self.log else n for n in (min(self.x_ticks), max(self.x_ticks), x))
        right = (x - low) / ((high - low) or 1.0)
        up = min(y, max(self.y_ticks)) / max(self.y_ticks)
        return (0.04 + 0.92 * right) * _WIDTH, (1.0 - up) * _HEIGHT


def draw(panels: Sequence[Panel], axes: Axes) -> str:
    """The whole picture; a line has the same colour in every panel."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    columns = max(1, len(panels))
    width = _LEFT + columns * (_WIDTH + _GAP)
    below = _TOP + _HEIGHT + _BOTTOM
    height = below + _ROW * math.ceil(len(names) / columns) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text transform="translate(14 {_TOP + _HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y_label)}</text>",
    ]
    for number, panel in enumerate(panels):
        x = _LEFT + number * (_WIDTH + _GAP)
        parts += [f'<g transform="translate({x} {_TOP})">', *_panel(panel, axes, colours, number == 0), "</g>"]
    for number, name in enumerate(names):
        x = _LEFT + (number % columns) * (_WIDTH + _GAP)
        y = below + (number // columns) * _ROW
        parts += [f'<g transform="translate({x} {y})">', *_key(name, colours[name]), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, axes: Axes, colours: Mapping[str, str], first: bool) -> list[str]:
    parts = [f'<text x="{_WIDTH / 2}" y="-12" text-anchor="middle" font-weight="bold">{escape(panel.title)}</text>']
    for tick in axes.y_ticks:
        _, y = axes.place(axes.x_ticks[0], tick)
        parts.append(f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        if first:
            parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in axes.x_ticks:
        x, _ = axes.place(tick, 0)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEIGHT}" y2="{_HEIGHT + 4}" stroke="#888888"/>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 17}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 34}" text-anchor="middle">{escape(axes.x_label)}</text>')
    if panel.limit:
        parts.append(_line(panel.limit, axes, '#888888" stroke-dasharray="2 3'))
    for name, points in panel.lines.items():
        parts.append(_line(points, axes, f'{colours[name]}" stroke-width="2'))
        spots = [axes.place(*point) for point in points]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>' for x, y in spots]
    return parts


def _line(points: Points, axes: Axes, stroke: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.place(*point) for point in sorted(points)))
    return f'<polyline points="{path}" fill="none" stroke="{stroke}"/>'


def _key(name: str, colour: str) -> list[str]:
    return [
        f'<line x1="0" x2="22" y1="8" y2="8" stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="11" cy="8" r="3" fill="{colour}"/>',
        f'<text x="28" y="12">{escape(name)}</text>',
    ]
