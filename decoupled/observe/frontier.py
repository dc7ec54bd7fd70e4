"""The report's section on price and time: what it takes to reach a validation loss, and which configurations are best.

    record --reach--> price and time at a loss --mean over seeds--> one configuration (method, point of the sweep)
                                               --frontier--> those that no other configuration of the method beats
                                                             in both, drawn as in scaling papers

Price is total FLOPs; time is sequential FLOPs (the model of `decoupled.price`) or measured seconds. Between two
evaluations the loss is taken to fall linearly; a configuration counts as reaching a loss if all its seeds do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from decoupled.observe.charts import fixed, significant
from decoupled.observe.plane import Curve, Scale, plane
from decoupled.observe.points import Record, by_model, by_point

Pair = tuple[float, float]
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
AXES = {"sequential_flops": "time: sequential {}FLOP", "seconds": "time: measured seconds"}


def reach(record: Record, cutoff: float) -> dict[str, float] | None:
    """Everything a curve counts (samples, seconds, FLOPs) at the moment its validation loss reaches `cutoff`, or None.

    Example:
        >>> curve = [{"seconds": 1.0, "validation_loss": 3.0}, {"seconds": 2.0, "validation_loss": 1.0}]
        >>> reach({"curve": curve}, 1.5)
        {'seconds': 1.75}
    """
    before: Mapping[str, float] | None = None
    for point in record.get("curve") or []:
        loss = point.get("validation_loss")
        if loss is None or not math.isfinite(loss):
            return None
        if loss <= cutoff:
            share = 1.0 if before is None else (before["validation_loss"] - cutoff) / (before["validation_loss"] - loss)
            known = [key for key in ("samples", "seconds", "flops", "sequential_flops") if key in point]
            start = before or point
            return {key: start[key] + share * (point[key] - start[key]) for key in known}
        before = point
    return None


def configurations(records: Sequence[Record], cutoff: float) -> list[dict[str, float]]:
    """What every point of the sweep that reaches `cutoff` takes, mean over its seeds."""
    found = []
    for group in by_point(records).values():
        reached = [reach(record, cutoff) for record in group]
        every = [one for one in reached if one is not None]
        if every and len(every) == len(group):
            found.append({key: fmean(one[key] for one in every) for key in every[0]})
    return found


def frontier(points: Sequence[Pair]) -> list[Pair]:
    """The points that no other one matches in both numbers with a smaller sum: falling, in order of the first.

    Example:
        >>> frontier([(1, 5), (2, 3), (3, 4), (4, 1), (2, 9)])
        [(1, 5), (2, 3), (4, 1)]
    """
    best: list[Pair] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def least(records: Sequence[Record], cutoff: float, key: str) -> float:
    """The least of `key` with which any configuration reaches `cutoff`; infinite if none does."""
    return min((one[key] for one in configurations(records, cutoff) if key in one), default=math.inf)


def partly(records: Sequence[Record], cutoff: float) -> str:
    """``1 of 2 seeds``: how many reach `cutoff` at the point where most do; empty if all do at some point, or none."""
    counts = [([reach(r, cutoff) for r in group].count(None), len(group)) for group in by_point(records).values()]
    without, every = min(counts, key=lambda pair: pair[0] / pair[1], default=(0, 0))
    return f"{every - without} of {every} seeds" if 0 < without < every else ""


def section(results: Mapping[str, Any], styles: Mapping[str, str]) -> dict[str, Any] | None:
    """What the page shows, or None where no cut-offs were asked for.

    Args:
        results: of a comparison. styles: label -> classes of its colour.

    Returns:
        cutoffs: each with its text, figures and rows (label, style, three least numbers, what `partly` says).
        model: rows of `_model`. workers: how many it is about, as text.
        uncounted: configurations whose FLOPs are not known.
    """
    cutoffs: Sequence[float] = (results.get("config") or {}).get("cutoffs") or []
    records: Sequence[Record] = [record for record in results.get("records") or [] if record.get("flops")]
    if not cutoffs or not records:
        return None
    own: dict[str, list[Record]] = {}
    uncounted = []
    for label in styles:
        for point, runs in by_point([r for r in results["records"] if r["label"] == label]).items():
            if any(run.get("flops") for run in runs):  # those of its seeds that failed count: they reached nothing
                own.setdefault(label, []).extend(runs)
            else:
                uncounted.append(", ".join(filter(None, (label, point))))
    unit, scale = _unit([p["flops"] for r in records for p in r["curve"]])
    parts = []
    for cutoff in sorted(cutoffs, reverse=True):
        figures = [figure for key in AXES if (figure := _figure(key, cutoff, own, styles))]
        rows = [
            {"label": x, "style": styles[x], "cells": _cells(own[x], cutoff, scale), "partly": partly(own[x], cutoff)}
            for x in own
        ]
        parts.append({"cutoff": f"{cutoff:g}", "figures": figures, "rows": rows})
    workers = " or ".join(map(str, sorted({_workers(results, record) for record in records})))
    model = _model(own, styles, results)
    return {"cutoffs": parts, "unit": unit, "model": model, "workers": workers, "uncounted": sorted(uncounted)}


def _cells(records: Sequence[Record], cutoff: float, scale: float) -> list[str]:
    found = [least(records, cutoff, key) for key in ("sequential_flops", "flops", "seconds")]
    return [significant(n / s) if math.isfinite(n) else "–" for n, s in zip(found, (scale, scale, 1), strict=True)]


def _figure(key: str, cutoff: float, own: Mapping[str, Sequence[Record]], styles: Mapping[str, str]) -> Markup | None:
    pairs = {
        label: [(one[key], one["flops"]) for one in configurations(records, cutoff)] for label, records in own.items()
    }
    every = list(itertools.chain(*pairs.values()))
    if not every:
        return None
    x_unit, x_scale = _unit([x for x, _ in every]) if key != "seconds" else ("", 1.0)
    y_unit, y_scale = _unit([y for _, y in every])
    scaled = {label: [(x / x_scale, y / y_scale) for x, y in points] for label, points in pairs.items()}
    curves = [Curve(label, styles[label], frontier(points), points) for label, points in scaled.items() if points]
    name = AXES[key].format(x_unit)
    return plane(curves, f"{name} to loss {cutoff:g}", Scale(name, True), Scale(f"price: total {y_unit}FLOP", True))


def _unit(values: Sequence[float]) -> tuple[str, float]:
    """The prefix in which the middle value reads well, and its factor."""
    power = max(0, min(len(PREFIXES) - 1, int(math.log(median(values), 1000))))
    return PREFIXES[power], 1000.0**power


def _model(
    own: Mapping[str, Sequence[Record]], styles: Mapping[str, str], results: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Per method and model (of a sweep): FLOPs per example, the speed-up that they predict, and the measured one."""
    rows = []
    base_runs = own.get(results.get("baseline") or "", [])
    baseline = by_model([record for record in base_runs if record.get("flops")])
    for label, records in own.items():
        models = by_model([record for record in records if record.get("flops")])
        for model, runs in models.items():
            one, base = runs[0]["flops"], baseline[model][0]["flops"] if model in baseline else None
            measured = [r["speedup_over_backprop"] for r in runs if r.get("speedup_over_backprop")]
            cells = [significant(one["example"] / 1e6), significant(one["chain"] / 1e6), "–", "–", "–"]
            if base:
                workers = _workers(results, runs[0])
                alone, shared = (max(n["chain"], n["example"] / workers) for n in (base, one))
                cells[2:4] = [fixed(2)(base["chain"] / one["chain"]), fixed(2)(alone / shared)]
            if measured:
                cells[4] = f"{median(measured):.2f} ({min(measured):.2f}–{max(measured):.2f})"
            name = ", ".join([label, model]) if len(models) > 1 else label
            rows.append({"label": name, "style": styles[label], "cells": cells})
    return rows


def _workers(results: Mapping[str, Any], record: Record) -> int:
    """How many workers the machine has for the blocks of a run."""
    return min(results["environment"].get("cores") or 1, record.get("blocks") or results["blocks"])
