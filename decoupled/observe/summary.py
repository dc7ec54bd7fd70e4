"""The records of a comparison, summed up: one `Summary` per label at its best point, and what stands out among them.

    records (method x seed x point) --best--> runs of one point --Summary.stat--> mean, least and greatest over seeds

A value that a record lacks (controls, failed runs) is left out of the mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from decoupled.observe import charts
from decoupled.observe.points import Record, best, by_point, describe

Measure = Callable[[Record], float | None]


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
    base: Sequence[Record] = ()  # what their speed-up is over, where the baseline's own best point is another one

    def stat(self, measure: Measure) -> Stat | None:
        """`measure` over the seeds that have it, or None where none has."""
        values = [float(v) for v in map(measure, self.runs) if v is not None]
        return Stat(fmean(values), min(values), max(values), len(values)) if values else None

    @property
    def accuracy(self) -> Stat | None:
        return self.stat(of("test_accuracy"))

    @property
    def speedup(self) -> Stat | None:
        return self.stat(of("speedup_over_backprop"))

    @property
    def base_accuracy(self) -> Stat | None:
        """Of the baseline at this point; None where its own summary is of this point."""
        return replace(self, runs=self.base).accuracy

    def per_block(self, what: str | Callable[[Record], Sequence[float]]) -> list[float]:
        """Mean over seeds of a per-block (or per-edge) list, block by block; `what`: its key, or what reads it."""
        rows = [run.get(what) or [] if isinstance(what, str) else what(run) for run in self.runs]
        return [fmean([row[k] for row in rows if len(row) > k]) for k in range(max(map(len, rows), default=0))]

    def staleness(self) -> list[Counter[int]]:
        """Histogram per block, summed over seeds: updates between forward and backward -> how often."""
        rows = [run.get("staleness") or [] for run in self.runs]
        return [merged(row[k] for row in rows if len(row) > k) for k in range(max(map(len, rows), default=0))]


def of(key: str, reduce: Callable[[Any], float | None] = lambda value: value) -> Measure:
    """The record's `key`, reduced; None where the record has nothing there."""
    return lambda record: None if record.get(key) in (None, []) else reduce(record[key])


def merged(histograms: Iterable[Mapping[str, int] | None]) -> Counter[int]:
    """Histograms added up, by number."""
    return sum((Counter({int(v): n for v, n in (h or {}).items()}) for h in histograms), Counter())


def summarise(results: Mapping[str, Any]) -> list[Summary]:
    """One summary per label, at its best point, controls last; these and the baseline wear no hue."""
    groups: dict[str, list[Record]] = {}
    for record in results.get("records") or []:
        groups.setdefault(record.get("label") or record["method"], []).append(record)
    wanted = results.get("baseline")
    base = wanted if wanted in groups else next((x for x, r in groups.items() if r[0]["method"] == wanted), None)
    others = by_point(groups[base]) if base else {}
    others.pop(describe(best(groups[base])[0].get("point") or {}) if base else "", None)
    summaries, hues, greys = [], iter(range(len(groups))), iter(range(len(groups)))
    for label, every in sorted(groups.items(), key=lambda item: item[1][0].get("kind") == "control"):
        records = best(every)
        kind = "baseline" if label == base else records[0].get("kind") or "method"
        grey = "kb d0" if kind == "baseline" else f"kc d{1 + next(greys) % 3}" if kind == "control" else ""
        failures = [record for record in records if record.get("status") == "failed"]
        runs = [record for record in records if record.get("status") != "failed"]
        name, family = records[0]["method"], (records[0].get("family") or "").replace("_", " ")
        style, point = grey or charts.style_of(next(hues)), describe(records[0].get("point") or {})
        beside = [run for run in others.get(point, []) if run.get("status") != "failed"]
        summaries.append(Summary(name, label, kind, family, style, runs, failures, point, beside))
    return summaries


def apart(summaries: Sequence[Summary]) -> bool:
    """Whether a speed-up is over runs of the baseline that its own summary is not of."""
    return any(m.base and m.speedup for m in summaries)


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
        "apart": apart(summaries),
        "floor": floor,
        "below": [m for m in methods if floor and m.accuracy and not m.accuracy.mean > floor.high],
        "fastest": top(methods, lambda m: m.speedup),
        "best": top(methods, lambda m: m.accuracy),
        "level": top(level, lambda m: m.speedup),  # the fastest of those whose range of accuracy reaches the baseline's
    }
