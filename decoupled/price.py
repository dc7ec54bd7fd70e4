"""What a run costs in FLOPs, beside the seconds it takes: in all (the price), and on the critical path (the time).

    record of a run, its setting --price--> record["flops"]    per example and per step, as `decoupled.flops` counts
                                            curve points       + "flops", "sequential_flops" so far

What a selection of samples looks at costs a forward, and its own models what they say of themselves.

A step on B examples costs B `example` + `update` FLOPs and lasts `chain` + `longest_update` of them: examples run in
parallel, and blocks where the method allows it, so that larger batches cost more and last no longer. Axes of Laskin et
al. 2020 (arXiv 2012.03837), in the manner of McCandlish et al. 2018 (arXiv 1812.06162).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from decoupled import flops
from decoupled.config import Recipe
from decoupled.errors import UserError
from decoupled.experiment import Setting

_UPDATE = {"sgd": 2.0, "momentum": 4.0, "adam": 13.0, "adamw": 13.0}  # FLOPs per weight and step, see flops.cost


def price(record: dict[str, Any], setting: Setting, method: str | Mapping[str, Any]) -> None:
    """Add the FLOPs to a record; `flops` is None where they cannot be counted (other messages than gradients down)."""
    record["flops"] = found = per_example(setting, method)
    if found is None:
        return
    size = setting.task.recipe.batch_size
    batches = math.ceil(len(setting.dataset.train) / size)
    for point in record["curve"]:  # a selection trains on some samples only, and may look at others
        trained, steps = point.get("trained", point["samples"]), point.get("updates", point["epoch"] * batches)
        looked = point.get("scored", 0) * found["forward"]
        point["flops"] = trained * found["example"] + steps * found["update"] + looked + point.get("selector_flops", 0)
        point["sequential_flops"] = steps * (found["chain"] + found["longest_update"]) + looked / size


def per_example(setting: Setting, method: str | Mapping[str, Any]) -> dict[str, float] | None:
    """FLOPs of a method in a setting, or None.

    Returns:
        example, chain: per example, all blocks together and on the critical path. head: of `example`, by objectives.
        forward: per example that is only looked at.
        update, longest_update: per step, all blocks together and the largest.
    """
    units = setting.units(0)
    blocks = [nn.Sequential(*units[a:b]) for a, b in itertools.pairwise([0, *setting.cuts, None])]
    data = setting.dataset
    try:
        cost = flops.cost(
            blocks, data.inputs, method, dtype=data.train.inputs.dtype, update=_update(setting.task.recipe)
        )
    except UserError:
        return None
    return {
        "example": cost.total,
        "chain": cost.sequential,
        "forward": sum(block.forward for block in cost.blocks),
        "head": sum(block.head for block in cost.blocks),
        "update": sum(block.update for block in cost.blocks),
        "longest_update": max(block.update for block in cost.blocks),
    }


def _update(recipe: Recipe) -> float:
    return _UPDATE["momentum" if recipe.optimizer == "sgd" and recipe.momentum else recipe.optimizer]
