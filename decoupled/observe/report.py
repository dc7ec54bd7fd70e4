"""The comparison as one self-contained HTML page: `results.json` in, page out; no script, no network, no image file.

    records (method x seed) --summary.py--> one Summary per method --+--> table, findings
                                                                    +--> charts.py (inline SVG)  --> report.html.j2

Numbers over seeds are means with the range min to max; a value that a record lacks (controls, failed runs) is left out
of the mean and shown as a dash where nothing remains. The words stand in the template, which escapes all text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from decoupled.files import write_whole
from decoupled.observe import charts, claims, conditions, frontier, learning, sweeps
from decoupled.observe.charts import KIB, byte_unit, fixed, percent, significant
from decoupled.observe.points import held
from decoupled.observe.summary import Measure, Summary, apart, findings, merged, of, summarise
from decoupled.observe.trace import KINDS, Span, opening, operation_kind

_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_PAGES.filters["percent"] = percent


@dataclass(frozen=True)
class Column:
    """One column of the main table; the small second number is the range over seeds, or `second` with its name."""

    head: str
    unit: str
    measure: Measure
    show: Callable[[float], str] = significant
    best: Callable[..., Any] | None = None  # max or min: the end that is marked
    second: tuple[str, Measure, Callable[[float], str]] | None = None


def _columns(summaries: Sequence[Summary]) -> list[Column]:
    unit, size = byte_unit(max((sum(held(r)) for m in summaries for r in m.runs), default=0))
    all_held, largest = (lambda r, total=total: total(held(r)) / size if held(r) else None for total in (sum, max))
    most = of("staleness", lambda blocks: max(merged(blocks), default=None))
    auxiliary = of("auxiliary_parameters", lambda count: count or None)
    work, heads = (of(f"{part}flops_per_sample", lambda x: sum(x) / 1e6 or None) for part in ("", "head_"))
    up, down = (of(f"bytes_{way}_per_sample", lambda x: sum(x) / KIB) for way in ("up", "down"))
    same = ", same point" if apart(summaries) else ""
    own = list(dict.fromkeys(name for m in summaries for r in m.runs for name in r.get("measures") or {}))
    columns = [
        Column("Test accuracy", "%", of("test_accuracy"), percent, max),
        Column("Test loss", "", of("test_loss"), fixed(3), min),
        Column("Speed-up", f"× baseline{same}", of("speedup_over_backprop"), fixed(2), max),
        Column("Throughput", "samples/s", of("samples_per_second"), significant, max),
        Column("Training", "s", of("wall_seconds"), significant, min),
        Column("Utilisation", "%, mean", of("utilisation", fmean), percent, max),
        Column("Held at peak", f"{unit}, sum of blocks", all_held, significant, min, ("max", largest, significant)),
        Column("Traffic up", "KiB/sample", up, significant, None, ("down", down, significant)),
        Column("Staleness", "mean", of("staleness", _mean_staleness), fixed(2), None, ("max", most, fixed(0))),
        Column("Work", "MFLOP/sample, counted", work, significant, min, ("heads", heads, significant)),
        Column("Parameters", "of the network", of("parameters"), fixed(0), None, ("+", auxiliary, fixed(0))),
    ]
    as_trained = Column("As trained", "%, BatchNorm not estimated again", of("test_accuracy_as_trained"), percent, max)
    columns[1:1] = [as_trained] if any(m.stat(as_trained.measure) for m in summaries) else []
    if not own:
        return columns
    # What else these runs measure of themselves; a column that none of them fills is left out then.
    more = [Column(name, "", of("measures", lambda found, name=name: found.get(name)), significant) for name in own]
    return more + [c for c in columns if any(m.stat(c.measure) for m in summaries)]


def _mean_staleness(histograms: Sequence[Mapping[str, int]]) -> float | None:
    counts = merged(histograms)
    return sum(v * n for v, n in counts.items()) / counts.total() if counts else None


def table(summaries: Sequence[Summary]) -> tuple[list[Column], list[dict[str, Any]]]:
    """The columns, and one row per method: its summary and cells (text, small second text, whether it is the best)."""
    columns = _columns(summaries)
    rows = [{"of": summary, "cells": []} for summary in summaries]
    for column in columns:
        stats = [summary.stat(column.measure) for summary in summaries]
        texts = [column.show(stat.mean) if stat else "–" for stat in stats]
        ranked = [(s.mean, t) for s, t, m in zip(stats, texts, summaries, strict=True) if s and m.kind != "control"]
        ranked = [(number, text) for number, text in ranked if math.isfinite(number)]
        best = column.best(ranked, key=lambda x: x[0])[1] if column.best and len(ranked) > 1 else None
        for row, stat, text in zip(rows, stats, texts, strict=True):
            low, high = (column.show(stat.low), column.show(stat.high)) if stat else ("", "")
            note = f"{low}–{high}" if low != high else ""
            if column.second:
                other = row["of"].stat(column.second[1])
                note = f"{column.second[0]} {column.second[2](other.high)}" if other else ""
            marked = text == best and row["of"].kind != "control"
            row["cells"].append({"text": text, "note": note, "best": marked})
    return columns, rows


def _bars(summaries: Sequence[Summary]) -> dict[str, Markup]:
    throughput, memory, traffic, reference = [], [], [], None
    kept = {m.label: m.per_block(held) for m in summaries}
    unit, size = byte_unit(max(map(sum, kept.values()), default=0))
    for m in summaries:
        if rate := m.stat(of("samples_per_second")):
            faster = m.stat(of("speedup_over_backprop"))
            text = significant(rate.mean) + (f" ({faster.mean:.2f}×)" if faster else "")
            throughput.append(charts.Bar(m.label, m.style, [rate.mean], text, rate.low, rate.high))
            reference = rate.mean if m.kind == "baseline" else reference
        if kept[m.label]:
            parts = [part / size for part in kept[m.label]]
            memory.append(charts.Bar(m.label, m.style, parts, significant(sum(parts))))
        ways = [m.per_block(f"bytes_{way}_per_sample") for way in ("up", "down")]
        if any(ways):
            parts = [sum(way) / KIB for way in ways]
            traffic.append(charts.Bar(m.label, m.style, parts, " + ".join(map(significant, parts))))
    if apart(summaries):  # a line at the baseline's best point is not what all speed-ups are over
        reference = None
    shares = [(m.label, m.style, share) for m in summaries if (share := m.per_block("utilisation"))]
    drawn = {
        "throughput": throughput and charts.bar_chart(throughput, "Throughput", "samples per second", reference),
        "utilisation": shares and charts.block_bars(shares, "Utilisation per block"),
        "memory": memory and charts.bar_chart(memory, "Peak held memory", unit),
        "traffic": traffic and charts.bar_chart(traffic, "Traffic per sample", "KiB per sample, up + down"),
    }
    return {key: figure for key, figure in drawn.items() if figure}


def _staleness(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Histograms of the methods that have any staleness, the others by name."""
    stale = {m.label: (m, blocks) for m in summaries if (blocks := m.staleness()) and any(blocks)}
    shown = {label: pair for label, pair in stale.items() if max(map(max, filter(None, pair[1]))) > 0}
    highest = max((v for _, blocks in shown.values() for block in blocks for v in block), default=0)
    figures = []
    for label, (m, blocks) in shown.items():
        shares = [{v: n / block.total() for v, n in block.items()} for block in blocks]
        figures.append((label, charts.histograms(shares, highest, m.style, f"Staleness of {label}")))
    return {"figures": figures, "none": [label for label in stale if label not in shown]}


def _timelines(summaries: Sequence[Summary]) -> dict[str, Any]:
    figures: list[tuple[str, Markup]] = []
    words: dict[str, list[str]] = {}
    for m in summaries:
        for run in [run for run in m.runs if run.get("timeline")][:1]:
            spans = opening([Span("", e["actor"], e["op"], e["start"], e["end"]) for e in run["timeline"]], 18)
            for letter, kind in {(span.name[:1], operation_kind(span.name, span.track)) for span in spans}:
                if kind != "other" and kind not in words.setdefault(letter, []):
                    words[letter].append(kind)
            figures.append((f"{m.label}, seed {run['seed']}", charts.gantt(spans, f"First steps of {m.label}")))
    known = [*KINDS, *sorted({*words} - {*KINDS})]
    return {"figures": figures, "legend": {x: " / ".join(sorted(words[x])) for x in known if x in words}}


def render(results: dict[str, Any]) -> str:
    """The page for one results.json as HTML text."""
    summaries = summarise(results)
    styles = {m.label: m.style for m in summaries}
    columns, rows = table(summaries)
    return _PAGES.get_template("report.html.j2").render(
        results=results,
        machines=len({json.dumps(r.get("environment"), sort_keys=True) for r in results.get("records") or []}),
        found=findings(summaries),
        columns=columns,
        rows=rows,
        figures=learning.figures(summaries) | _bars(summaries),
        staleness=_staleness(summaries),
        timelines=_timelines(summaries),
        sweep=sweeps.section(results, styles),
        frontier=frontier.section(results, styles),
        claims=claims.findings(results),
        said=conditions.said(results),
        settings=conditions.settings(results.get("config") or {}, conditions.points(results)),
        options=[(m.label, conditions.settings([*m.runs, *m.failures][0].get("config") or {})) for m in summaries],
    )


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the page of `results` to `path`; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(results))
