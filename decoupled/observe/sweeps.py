"""The report's section on a sweep: every method at every point, and how its best depends on each swept key.

records --by label, by point--> table (methods x points) and, per key with several values, one chart: the best
                                validation loss of a method at each value, over all values of the other keys
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from decoupled.observe.charts import fixed, percent, significant
from decoupled.observe.plane import Curve, Scale, plane
from decoupled.observe.points import Record, by_point, describe, last_loss

MOST_COLUMNS = 24  # points that a table can show


def section(results: Mapping[str, Any], styles: Mapping[str, str]) -> dict[str, Any] | None:
    """What the page shows of a sweep, or None where nothing was swept.

    Args:
        results: of a comparison. styles: label -> classes of its colour.

    Returns:
        points: texts of the columns (empty if too many). rows: per label its style and cells (loss, accuracy, best).
        figures: (title, chart) per key.
    """
    records: Sequence[Record] = results.get("records") or []
    points = list(by_point(records))
    if points in ([], [""]):
        return None
    rows = []
    for label in dict.fromkeys(record["label"] for record in records):
        groups = by_point([record for record in records if record["label"] == label])
        losses = {point: fmean(map(last_loss, groups.get(point) or [{}])) for point in points}
        least = min(losses.values())
        cells = [_cell(groups.get(point) or [], loss, loss == least) for point, loss in losses.items()]
        rows.append({"label": label, "style": styles.get(label, ""), "cells": cells, "losses": losses})
    keys = list(dict.fromkeys(key for record in records for key in record.get("point") or {}))
    figures = [(key, figure) for key in keys if (figure := _figure(key, records, styles))]
    columns = points if len(points) <= MOST_COLUMNS else []
    return {"points": columns, "count": len(points), "rows": rows, "figures": figures}


def _cell(group: Sequence[Record], loss: float, best: bool) -> dict[str, Any]:
    if not group:
        return {"loss": "–", "accuracy": "", "best": False}
    good = [record["test_accuracy"] for record in group if record.get("test_accuracy") is not None]
    diverged = "failed" if any(record.get("status") == "failed" for record in group) else "diverged"
    accuracy = percent(fmean(good)) + " %" if len(good) == len(group) and math.isfinite(loss) else ""
    return {"loss": fixed(3)(loss) if math.isfinite(loss) else diverged, "accuracy": accuracy, "best": best}


def _figure(key: str, records: Sequence[Record], styles: Mapping[str, str]) -> Markup | None:
    """Best validation loss at each value of `key`; None where it has one value, or nothing can be drawn."""
    values = list(dict.fromkeys(_value(record, key) for record in records))
    curves = []
    for label, style in styles.items():
        own = [record for record in records if record["label"] == label]
        points = []
        for i, value in enumerate(values):
            groups = by_point([record for record in own if _value(record, key) == value])
            loss = min((fmean(map(last_loss, group)) for group in groups.values()), default=math.inf)
            points += [(float(i), loss)] if math.isfinite(loss) else []
        if points:
            curves.append(Curve(label, style, points, text=significant(points[-1][1])))
    if len(values) < 2 or not curves:
        return None
    return plane(curves, f"Best validation loss at each {key}", Scale(key, names=values), Scale("validation loss"))


def _value(record: Record, key: str) -> str:
    """The value of one key as text, without the key where that is all there is."""
    return describe({key: (record.get("point") or {}).get(key)}).removeprefix(f"{key}=")
