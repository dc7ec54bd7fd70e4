"""A sweep: the same comparison at every combination of some keys; a suite has a section for it.

    sweep: {lr: [0.1, 0.01], batch_size: [64, 256]}      four points; every method and control runs at each of them
    sweep: {blocks: [2, 4], recipe: [{optimizer: sgd, lr: 0.1}, {optimizer: adam, lr: 0.001}]}

    points --settings--> compare runs all --> records with their `point` --observe.points--> the best one of a method

All methods get the same points and epochs, so the same budget for tuning. A key is one of the task (`data`, `model`,
`blocks`, `runtime`, `precision`) or of its recipe; dots reach into a mapping (`model.width`), a mapping is merged in.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from decoupled.config import CompareConfig, Recipe, Task, changed
from decoupled.errors import UserError
from decoupled.experiment import Setting
from decoupled.graph.experiment import GraphSetting
from decoupled.rl.experiment import RLSetting

Point = dict[str, Any]
AnySetting = Setting | GraphSetting | RLSetting


def points(config: CompareConfig) -> list[Point]:
    """All combinations of the values, the last key fastest; one empty point where nothing is swept.

    Raises:
        UserError: a key that is not of the task, or values that are not a list with something in it.
    """
    grid = config.sweep or {}
    known = {f.name for kind in (Task, Recipe) for f in fields(kind)}
    if not isinstance(grid, Mapping):
        raise UserError(f"sweep must map keys to lists of values, got {grid!r}; write sweep={{lr: [0.1, 0.01]}}")
    for key, values in grid.items():
        if str(key).split(".")[0] not in known:
            raise UserError(f"sweep over {key!r} is not possible; known keys: {', '.join(sorted(known))}")
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep over {key} needs a list of values, got {values!r}; write sweep.{key}=[...]")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def kind(config: Task) -> type[AnySetting]:
    """What a configuration trains: a policy if it names an environment, a graph if a task, else a network in blocks."""
    if config.env is not None:
        return RLSetting
    return Setting if config.task is None else GraphSetting


def settings(config: CompareConfig, before: Sequence[tuple[Point, list[int]]] = ()) -> list[tuple[Point, AnySetting]]:
    """One setting per point. Data are loaded and the network is cut once for all points that agree on both.

    Args:
        before: points and where the network was cut there, which holds again instead of measured time.
    """
    cuts = {_same(changed(config, point)): where for point, where in before}
    found, known = [], {}
    for point in points(config):
        task = changed(config, point)
        same = _same(task)
        if same not in known:
            known[same] = kind(task).prepare(task)
            if isinstance(known[same], Setting):
                known[same].cuts = cuts.get(same, known[same].cuts)
        found.append((point, replace(known[same], task=task)))
    return found


def _same(task: Task) -> str:
    """Tasks for which this is equal have the same data and cuts."""
    return json.dumps([task.data, task.model, task.task, task.env, task.blocks], sort_keys=True)
