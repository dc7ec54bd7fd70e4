"""The report's curves: accuracy and loss of the forward network on validation data, against time and samples.

Where runs have another metric (`metric`, and `validation_score` in their curves), that one, against updates, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Protocol

from markupsafe import Markup

from decoupled.observe import charts
from decoupled.observe.charts import fixed
from decoupled.observe.plane import Curve, Scale, plane


class Runs(Protocol):
    """What is drawn as one line; `report.Summary` is one."""

    @property
    def label(self) -> str: ...
    @property
    def style(self) -> str: ...
    @property
    def runs(self) -> Sequence[Mapping[str, Any]]: ...


SCORED = (("samples", 1000, "thousand samples"), ("updates", 1000, "thousand updates"), ("seconds", 1, "seconds"))
Points = list[tuple[float, float, float, float]]


def figures(summaries: Sequence[Runs]) -> dict[str, Markup]:
    """The charts that have anything to show: time and samples (accuracy), loss (against time), and other metrics."""
    name, found = "Validation accuracy against", {}
    if time := _series(summaries, "seconds"):
        found["time"] = charts.line_chart(time, f"{name} training time", "seconds", "accuracy, %")
    if samples := _series(summaries, "samples", 1000):
        found["samples"] = charts.line_chart(samples, f"{name} samples", "thousand samples", "accuracy, %")
    if losses := [curve for m in summaries if (curve := _loss(m)).points]:
        title = "Validation loss against training time"
        found["loss"] = plane(losses, title, Scale("seconds", log=True), Scale("loss", log=True))
    metric = next((run["metric"] for m in summaries for run in m.runs if run.get("metric")), None)
    for key, scale, text in SCORED if metric else ():
        if scores := _series(summaries, key, scale, "validation_score"):
            found[f"score_{key}"] = charts.line_chart(scores, f"Validation {metric} against {text}", text, str(metric))
    return found


def _series(
    summaries: Sequence[Runs], key: str, scale: float = 1.0, value: str = "validation_accuracy"
) -> list[charts.Series]:
    series, factor = [], 100 if value == "validation_accuracy" else 1
    for m in summaries:
        if points := _mean(m, key, value, scale, factor):
            series.append(charts.Series(m.label, m.style, points, fixed(1)(points[-1][1])))
    return series


def _loss(m: Runs) -> Curve:
    points = [(x, y) for x, y, _, _ in _mean(m, "seconds", "validation_loss") if x > 0 and y > 0]
    return Curve(m.label, m.style, points, text=charts.significant(points[-1][1]) if points else "")


def _mean(m: Runs, key: str, value: str, scale: float = 1.0, factor: float = 1.0) -> Points:
    """Epoch by epoch (x, mean, least, greatest) over those seeds that all reached it."""
    epochs: dict[int, list[tuple[float, float]]] = {}
    for run in m.runs:
        for point in run.get("curve") or []:
            x, y = point.get(key), point.get(value)
            if x is not None and y is not None and math.isfinite(y):
                epochs.setdefault(point["epoch"], []).append((x / scale, factor * y))
    full = [epoch for _, epoch in sorted(epochs.items()) if len(epoch) == max(map(len, epochs.values()))]
    return [(fmean(xs), fmean(ys), min(ys), max(ys)) for xs, ys in (zip(*epoch, strict=True) for epoch in full)]
