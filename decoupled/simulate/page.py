"""Simulations as one self-contained HTML page: lines over the blocks, or over the values of a sweep; no script.

Every figure has one line per method, from zero; the table beneath says the same in numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from decoupled.observe.charts import Axis, significant, tag, tick_texts, ticks
from decoupled.simulate import Simulation

Points = Sequence[tuple[float, float]]
COLOURS = ("#0064a8", "#c24a00", "#00906a", "#94296f", "#cf9a00", "#4aabe6")
DASHES = ("none", "7 4", "2 3")
WIDTH, HEIGHT = 520, 250
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1160px;margin:2rem auto;padding:0 1rem;color:#1b1e23}"
    "main{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}figcaption{font-weight:600}svg{font-size:12px}"
    "table{border-collapse:collapse;margin-top:2rem;font-size:13px}td,th{padding:.3rem .7rem;text-align:right;"
    "border-bottom:1px solid #dcdfe4}td:first-child,th:first-child{text-align:left}"
)


def chart(title: str, x_name: str, lines: Mapping[str, Points]) -> Markup:
    """Lines by name over common axes, y from zero, with a legend beneath."""
    points = [point for line in lines.values() for point in line]
    x = Axis(min(p[0] for p in points), max(p[0] for p in points), 58, WIDTH - 12)
    y = Axis(0.0, max((p[1] for p in points), default=0.0) * 1.04, HEIGHT, 12)
    marks: list[Markup] = []
    for values, axis in ((ticks(y.low, y.high), y), (ticks(x.low, x.high), x)):
        for value, text in zip(values, tick_texts(values) if len(values) > 1 else map(str, values), strict=True):
            at = axis(value)
            if axis is y:
                marks.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, stroke="#dcdfe4"))
                marks.append(tag("text", text, x=x.start - 7, y=at + 4, text_anchor="end", fill="#616873"))
            else:
                marks.append(tag("text", text, x=at, y=HEIGHT + 17.0, text_anchor="middle", fill="#616873"))
    marks.append(tag("text", x_name, x=x.end, y=HEIGHT + 34.0, text_anchor="end", fill="#616873"))
    for number, (name, line) in enumerate(lines.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        look = {"stroke": colour, "stroke_width": 2, "stroke_dasharray": dash}
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        marks.append(tag("polyline", tag("title", name), points=path, fill="none", **look))
        if len(line) <= 40:
            marks += [tag("circle", cx=x(a), cy=y(b), r=3, fill=colour) for a, b in line]
        left, row = 58.0 + number % 2 * 230, HEIGHT + 54.0 + number // 2 * 17
        marks.append(tag("line", x1=left, x2=left + 22, y1=row - 4, y2=row - 4, **look))
        marks.append(tag("text", name[:32], x=left + 28, y=row))
    height = HEIGHT + 58 + (len(lines) + 1) // 2 * 17
    svg = tag("svg", *marks, viewBox=f"0 0 {WIDTH} {height}", width=WIDTH, height=height, role="img", aria_label=title)
    return tag("figure", tag("figcaption", title), svg)


def over_blocks(found: Mapping[str, Simulation]) -> list[Markup]:
    """What each block does, one line per simulation."""

    def lines(of: Callable[[Simulation], Sequence[float]]) -> dict[str, Points]:
        return {name: list(enumerate(of(one))) for name, one in found.items()}

    return [
        chart("Utilisation", "block", lines(lambda s: s.utilisation)),
        chart("Delay: updates between forward and backward, mean", "block", lines(lambda s: delays(s)[0])),
        chart("Memory, with what is held for passes", "block", lines(lambda s: s.memory)),
        chart("Sent per minibatch, up and down", "block", lines(sent)),
        chart("Time on the critical path", "block", lines(lambda s: s.critical_path["blocks"])),
    ]


def over_values(key: str, found: Mapping[str, Mapping[float, Simulation]]) -> list[Markup]:
    """A sweep of `key`, one line per method."""

    def lines(of: Callable[[Simulation], float]) -> dict[str, Points]:
        return {name: [(value, of(one)) for value, one in row.items()] for name, row in found.items()}

    return [
        chart("Utilisation, mean over blocks", key, lines(lambda s: sum(s.utilisation) / s.blocks)),
        chart("Minibatches per unit of time", key, lines(lambda s: s.batches_per_time)),
        chart("Delay of the block that waits longest, mean", key, lines(lambda s: max(delays(s)[0]))),
        chart("Memory of the largest block", key, lines(lambda s: max(s.memory))),
        chart("Sent per minibatch, all blocks", key, lines(lambda s: sum(sent(s)))),
    ]


def delays(one: Simulation) -> tuple[list[float], list[int]]:
    """Updates between forward and backward of each block: mean, and the most."""
    means = [sum(d * n for d, n in late.items()) / max(1, sum(late.values())) for late in one.staleness]
    return means, [max(late, default=0) for late in one.staleness]


def sent(one: Simulation) -> list[float]:
    """Bytes each block sends per minibatch."""
    return [up + down for up, down in zip(one.bytes_up, one.bytes_down, strict=True)]


def write_page(path: Path, title: str, figures: Sequence[Markup], rows: Sequence[Sequence[str]]) -> None:
    """Write the page; the first row is the head of the table."""
    cells = [tag("tr", *(tag("th" if not i else "td", cell) for cell in row)) for i, row in enumerate(rows)]
    body = tag("h1", title) + tag("main", *figures) + tag("table", *cells)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{body}</body></html>\n",
        encoding="utf-8",
    )


def number(value: float) -> str:
    """A number for a table."""
    return significant(value, 4)
