"""Drawings of a graph: SVG with nothing else needed, and the text that Graphviz reads.

columns    distance from the inputs; a loop's way back is a dashed curve below
colours    workers, once nodes have been placed; nodes with weights have a thick border
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from decoupled.graph.build import NodeGraph
from decoupled.graph.transform import PPT

COLOURS = ("#dbe9f6", "#fde3c8", "#dff0d8", "#eadcf0", "#f9dcdc", "#e6e6e6")
WIDTH, HEIGHT, ACROSS, DOWN, MARGIN = 110, 30, 150, 54, 20  # pixels: of a node, from node to node, around all
STYLE = "font: 12px sans-serif; text-anchor: middle; dominant-baseline: central"


def columns(graph: NodeGraph) -> dict[str, int]:
    """Node -> its distance from the inputs, the longest way without repeating a loop."""
    depth: dict[str, int] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above or depth.get(name, -1) >= len(above):
            return
        depth[name] = len(above)
        for port in range(graph.nodes[name].outputs):
            for target, _ in graph.targets.get((name, port), ()):
                visit(target, (*above, name))

    for name, node in graph.nodes.items():
        if not node.inputs:
            visit(name, ())
    return depth


def svg(graph: NodeGraph, places: Mapping[str, int] | None = None) -> str:
    """A drawing as an SVG document; `places`: node -> number of its worker."""
    depth, rows, at = columns(graph), dict[int, int](), dict[str, tuple[int, int]]()
    for name in graph.nodes:
        column = depth.get(name, 0)
        row = rows[column] = rows.get(column, -1) + 1
        at[name] = (MARGIN + column * ACROSS, MARGIN + row * DOWN + (column % 2) * DOWN // 3)
    width = max(x for x, _ in at.values()) + WIDTH + MARGIN
    height = max(y for _, y in at.values()) + HEIGHT + DOWN + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" style="{STYLE}">',
        f"<title>{escape(graph.name)}</title>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    parts += [_edge(at[source], at[target], height) for source, _, target, _ in graph.edges()]
    for name, (x, y) in at.items():
        node, place = graph.nodes[name], (places or {}).get(name)
        fill = "#ffffff" if place is None else COLOURS[place % len(COLOURS)]
        border = 2.5 if isinstance(node, PPT) else 1
        text = name if name.startswith(node.kind) else f"{name} ({node.kind})"
        where = "" if place is None else f", worker {place}"
        parts.append(
            f'<g><title>{escape(f"{node.kind} {name}{where}")}</title><rect x="{x}" y="{y}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="6" fill="{fill}" stroke="#333" stroke-width="{border}"/>'
            f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT / 2}" textLength="{min(WIDTH - 8, 7 * len(text))}" '
            f'lengthAdjust="spacingAndGlyphs">{escape(text)}</text></g>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _edge(a: tuple[int, int], b: tuple[int, int], height: int) -> str:
    (x, y), (u, v) = (a[0] + WIDTH, a[1] + HEIGHT // 2), (b[0], b[1] + HEIGHT // 2)
    if u > x:
        path, dashes = f"M{x} {y} C{x + 20} {y} {u - 20} {v} {u} {v}", ""
    else:
        low = height - MARGIN
        path, dashes = f"M{x} {y} C{x + 60} {low} {u - 60} {low} {u} {v}", ' stroke-dasharray="5 3"'
    return f'<path d="{path}" fill="none" stroke="#555"{dashes} marker-end="url(#a)"/>'


def dot(graph: NodeGraph, places: Mapping[str, int] | None = None) -> str:
    """The same for Graphviz: `dot -Tpdf`."""
    lines = [f'digraph "{graph.name}" {{', '  rankdir=LR; node [shape=box, style="rounded,filled", fillcolor=white];']
    for name, node in graph.nodes.items():
        place = (places or {}).get(name)
        colour = "" if place is None else f', fillcolor="{COLOURS[place % len(COLOURS)]}"'
        width = ", penwidth=2.5" if isinstance(node, PPT) else ""
        lines.append(f'  {name} [label="{name}\\n{node.kind}"{colour}{width}];')
    lines += [f'  {a} -> {b} [label="{out}"];' if out else f"  {a} -> {b};" for a, out, b, _ in graph.edges()]
    return "\n".join([*lines, "}", ""])
