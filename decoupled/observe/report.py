"""The comparison as one self-contained HTML page: `results.json` in, page out; no script, no network, no image file.

    records (method x seed) --summarise--> one Summary per method --+--> table, findings
                                                                    +--> charts.py (inline SVG)  --> report.html.j2

Numbers over seeds are means with the range min to max; a value that a record lacks (controls, failed runs) is left out
of the mean and shown as a dash where nothing remains. The words stand in the template, which escapes all text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from decoupled.observe import charts, claims, frontier, learning, sweeps
from decoupled.observe.charts import KIB, byte_unit, fixed, percent, significant
from decoupled.observe.points import Record, best, describe, held
from decoupled.observe.trace import KINDS, Span, opening, operation_kind

Measure = Callable[[Record], float | None]
SAID = {
    "suite", "data", "model", "blocks", "runtime", "baseline", "seeds", "seed", "method", "controls", "sweep", "claims",
}  # fmt: skip
_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_PAGES.filters["percent"] = percent


@dataclass(frozen=True)
class Stat:
    """Mean, least and greatest value over `count` seeds."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Summary:
    """All runs of one label; kind is method, baseline or control; style: classes of its colour on the whole page."""

    name: str
    label: str
    kind: str
    family: str
    style: str
    runs: Sequence[Record]
    failures: Sequence[Record]
    point: str = ""  # of a sweep: where these runs are

    def stat(self, measure: Measure) -> Stat | None:
        """`measure` over the seeds that have it, or None where none has."""
        values = [float(v) for v in map(measure, self.runs) if v is not None]
        return Stat(fmean(values), min(values), max(values), len(values)) if values else None

    @property
    def accuracy(self) -> Stat | None:
        return self.stat(_of("test_accuracy"))

    @property
    def speedup(self) -> Stat | None:
        return self.stat(_of("speedup_over_backprop"))

    def per_block(self, of: str | Callable[[Record], Sequence[float]]) -> list[float]:
        """Mean over seeds of a per-block (or per-edge) list, block by block; `of`: its key, or what reads it."""
        rows = [run.get(of) or [] if isinstance(of, str) else of(run) for run in self.runs]
        return [fmean([row[k] for row in rows if len(row) > k]) for k in range(max(map(len, rows), default=0))]

    def staleness(self) -> list[Counter[int]]:
        """Histogram per block, summed over seeds: updates between forward and backward -> how often."""
        rows = [run.get("staleness") or [] for run in self.runs]
        return [_merged(row[k] for row in rows if len(row) > k) for k in range(max(map(len, rows), default=0))]


def _of(key: str, reduce: Callable[[Any], float | None] = lambda value: value) -> Measure:
    """The record's `key`, reduced; None where the record has nothing there."""
    return lambda record: None if record.get(key) in (None, []) else reduce(record[key])


def _merged(histograms: Iterable[Mapping[str, int] | None]) -> Counter[int]:
    return sum((Counter({int(v): n for v, n in (h or {}).items()}) for h in histograms), Counter())


def _mean_staleness(histograms: Sequence[Mapping[str, int]]) -> float | None:
    counts = _merged(histograms)
    return sum(v * n for v, n in counts.items()) / counts.total() if counts else None


def summarise(results: Mapping[str, Any]) -> list[Summary]:
    """One summary per label, at its best point, controls last; these and the baseline wear no hue."""
    groups: dict[str, list[Record]] = {}
    for record in results.get("records") or []:
        groups.setdefault(record.get("label") or record["method"], []).append(record)
    wanted = results.get("baseline")
    base = wanted if wanted in groups else next((x for x, r in groups.items() if r[0]["method"] == wanted), None)
    summaries, hues, greys = [], iter(range(len(groups))), iter(range(len(groups)))
    for label, every in sorted(groups.items(), key=lambda item: item[1][0].get("kind") == "control"):
        records = best(every)
        kind = "baseline" if label == base else records[0].get("kind") or "method"
        grey = "kb d0" if kind == "baseline" else f"kc d{1 + next(greys) % 3}" if kind == "control" else ""
        failures = [record for record in records if record.get("status") == "failed"]
        runs = [record for record in records if record.get("status") != "failed"]
        name, family = records[0]["method"], (records[0].get("family") or "").replace("_", " ")
        style, point = grey or charts.style_of(next(hues)), describe(records[0].get("point") or {})
        summaries.append(Summary(name, label, kind, family, style, runs, failures, point))
    return summaries


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
    all_held, largest = (lambda r, of=of: of(held(r)) / size if held(r) else None for of in (sum, max))
    most = _of("staleness", lambda blocks: max(_merged(blocks), default=None))
    auxiliary = _of("auxiliary_parameters", lambda count: count or None)
    work, heads = (_of(f"{part}flops_per_sample", lambda x: sum(x) / 1e6 or None) for part in ("", "head_"))
    up, down = (_of(f"bytes_{way}_per_sample", lambda x: sum(x) / KIB) for way in ("up", "down"))
    own = list(dict.fromkeys(name for m in summaries for r in m.runs for name in r.get("measures") or {}))
    columns = [
        Column("Test accuracy", "%", _of("test_accuracy"), percent, max),
        Column("Test loss", "", _of("test_loss"), fixed(3), min),
        Column("Speed-up", "× baseline", _of("speedup_over_backprop"), fixed(2), max),
        Column("Throughput", "samples/s", _of("samples_per_second"), significant, max),
        Column("Training", "s", _of("wall_seconds"), significant, min),
        Column("Utilisation", "%, mean", _of("utilisation", fmean), percent, max),
        Column("Held at peak", f"{unit}, sum of blocks", all_held, significant, min, ("max", largest, significant)),
        Column("Traffic up", "KiB/sample", up, significant, None, ("down", down, significant)),
        Column("Staleness", "mean", _of("staleness", _mean_staleness), fixed(2), None, ("max", most, fixed(0))),
        Column("Work", "MFLOP/sample, counted", work, significant, min, ("heads", heads, significant)),
        Column("Parameters", "of the network", _of("parameters"), fixed(0), None, ("+", auxiliary, fixed(0))),
    ]
    as_trained = Column("As trained", "%, BatchNorm not estimated again", _of("test_accuracy_as_trained"), percent, max)
    columns[1:1] = [as_trained] if any(m.stat(as_trained.measure) for m in summaries) else []
    if not own:
        return columns
    # What else these runs measure of themselves; a column that none of them fills is left out then.
    more = [Column(name, "", _of("measures", lambda found, name=name: found.get(name)), significant) for name in own]
    return more + [c for c in columns if any(m.stat(c.measure) for m in summaries)]


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


def findings(summaries: Sequence[Summary]) -> dict[str, Any]:
    """What the summary sentence speaks of: the methods that stand out, the baseline, the controls, the failures."""

    def top(among: Sequence[Summary], by: Callable[[Summary], Stat | None]) -> Summary | None:
        stats = [(stat.mean, summary) for summary in among if (stat := by(summary)) and math.isfinite(stat.mean)]
        return max(stats, key=lambda pair: pair[0], default=(0.0, None))[1]

    methods = [m for m in summaries if m.kind != "control"]
    named = {m.kind if m.kind == "baseline" else m.name: m for m in summaries}
    base, frozen, plain = (named.get(name) for name in ("baseline", "only_last", "plain_pytorch"))
    least, floor = base and base.accuracy, frozen and frozen.accuracy
    level = [m for m in methods if least and m.accuracy and m.accuracy.count > 1 and m.accuracy.high >= least.low]
    return {
        "methods": methods,
        "failed": [m for m in summaries if m.failures],
        "seeds": sorted({run["seed"] for m in summaries for run in [*m.runs, *m.failures]}),
        "base": base,
        "plain": plain,
        "floor": floor,
        "below": [m for m in methods if floor and m.accuracy and not m.accuracy.mean > floor.high],
        "fastest": top(methods, lambda m: m.speedup),
        "best": top(methods, lambda m: m.accuracy),
        "level": top(level, lambda m: m.speedup),  # the fastest of those whose range of accuracy reaches the baseline's
    }


def _bars(summaries: Sequence[Summary]) -> dict[str, Markup]:
    throughput, memory, traffic, reference = [], [], [], None
    kept = {m.label: m.per_block(held) for m in summaries}
    unit, size = byte_unit(max(map(sum, kept.values()), default=0))
    for m in summaries:
        if rate := m.stat(_of("samples_per_second")):
            faster = m.stat(_of("speedup_over_backprop"))
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


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """A config as words, nested entries side by side; what the page says elsewhere is left out."""
    nested = [value for key, value in config.items() if isinstance(value, Mapping) and key != "sweep"]
    flat = {k: v for value in nested for k, v in value.items() if k != "name"}
    said = SAID if config.get("env") else {*SAID, "steps"}
    flat |= {k: v for k, v in config.items() if not isinstance(v, Mapping | list | None) and k not in said}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


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
        settings=_settings(results.get("config") or {}),
        options=[(m.label, _settings([*m.runs, *m.failures][0].get("config") or {})) for m in summaries],
    )


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the page of `results` to `path`; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results), encoding="utf-8")
