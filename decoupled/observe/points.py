"""Reading a sweep: the records of a method by their point, and the point that stands for the method.

    records of one method --by_point--> point -> its seeds --best--> the point with the least validation loss at the end

A record without a point is of a comparison that swept nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from statistics import fmean
from typing import Any

from decoupled.config import Recipe

Record = Mapping[str, Any]
TRAINING = {"recipe", *(f.name for f in fields(Recipe))}  # keys of a sweep that leave FLOPs per example as they are
_TEXT = json.JSONEncoder(separators=(",", ":"))  # so that a comma and a space are between keys only


def describe(point: Mapping[str, Any]) -> str:
    """``lr=0.1, batch_size=64``; empty for the empty point."""
    flat: dict[str, Any] = {}
    for key, value in point.items():
        flat |= value if isinstance(value, Mapping) and key == "recipe" else {key: value}
    return ", ".join(f"{key}={value if isinstance(value, str) else _TEXT.encode(value)}" for key, value in flat.items())


def by_point(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of one method, grouped by their point, in the order of the sweep."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(describe(record.get("point") or {}), []).append(record)
    return groups


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by what their FLOPs per example depend on: the point, without how it was trained."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        point = {k: v for k, v in (record.get("point") or {}).items() if k.split(".")[0] not in TRAINING}
        groups.setdefault(describe(point), []).append(record)
    return groups


def held(record: Record) -> list[float]:
    """Bytes that every block held at its peak: for passes in flight, and what its corrections keep for good."""
    passes, kept = record.get("peak_held_bytes") or [], record.get("correction_bytes") or []
    return [sum(both) for both in zip_longest(passes, kept, fillvalue=0)]


def last_loss(record: Record) -> float:
    """Validation loss at the end of a run; infinite where it failed or diverged."""
    curve = record.get("curve") or []
    loss = curve[-1].get("validation_loss") if curve and record.get("status") != "failed" else None
    return loss if loss is not None and math.isfinite(loss) else math.inf


def best(records: Sequence[Record]) -> list[Record]:
    """The records of a method at its best point: the least mean validation loss at the end, over all seeds."""
    groups = by_point(records)
    return min(groups.values(), key=lambda group: fmean(map(last_loss, group)), default=[])
