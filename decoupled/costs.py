"""The cost of a method on a task, counted and not measured: `decoupled flops`, and what records say of FLOPs.

    cost of a method --per_sample--> record: FLOPs per sample of every block, on the critical path
                     --price-------> record["flops"], and of every point of its curve: FLOPs so far, in all (the price)
                                     and on the critical path (the time)

A run is priced by what its blocks have counted: a block that takes batches again, skips some, or makes several steps
per batch pays for what it did; what a selection of samples looks at costs a forward, and its own models what they say
of themselves. Examples of a batch run in parallel, and so do blocks where the method allows it: larger
batches cost more and last no longer. Axes of Laskin et al. 2020 (arXiv 2012.03837), in the manner of McCandlish et al.
2018 (arXiv 1812.06162).

    decoupled flops method=greedy_local model=resnet20 data=fashion_mnist blocks=4
    decoupled flops method=greedy_local model={name: mlp, width: 4096, depth: 9} inputs=[3072] blocks=[1,2,3,4,5,6,7]

What is counted, and what the critical path is, stands in `decoupled.flops`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from decoupled import data as datasets
from decoupled import flops, models, registry
from decoupled.build import replaying
from decoupled.config import FlopsConfig, Recipe
from decoupled.errors import UserError
from decoupled.flops import Cost
from decoupled.partition import split

UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")
COLUMNS = ("forward", "inputs", "weights", "head", "work", "update")
HEADS = ("forward", "input gradient", "weight gradient", "head", "total", "update per step")
UPDATE = {"sgd": 2.0, "momentum": 4.0, "adam": 13.0, "adamw": 13.0}  # FLOPs per weight and step, see flops.cost
UNCOUNTED: dict[str, Any] = {
    "flops_per_sample": [], "head_flops_per_sample": [], "sequential_flops_per_sample": None,
}  # fmt: skip


def of_run(
    units: Sequence[nn.Module], cuts: Sequence[int], inputs: torch.Tensor, method: str | Mapping[str, Any],
    recipe: Recipe,
) -> Cost | None:  # fmt: skip
    """The cost of a method in a setting, or None where it cannot be counted (such messages, such an optimizer).

    Args:
        units, cuts: the network and where later blocks begin. inputs: some samples, for shape and type.
        method: as for `Trainer`. recipe: tells the optimizer.
    """
    update = UPDATE.get("momentum" if recipe.optimizer == "sgd" and recipe.momentum else recipe.optimizer)
    if update is None:  # it depends on the shapes of the weights
        return None
    try:
        return flops.cost(_blocks(units, cuts), inputs.shape[1:], method, dtype=inputs.dtype, update=update)
    except UserError:
        return None


def per_sample(counted: Cost | None) -> dict[str, Any]:
    """What a record says of FLOPs per sample: of every block, of its head alone, and on the critical path.

    Returns:
        flops_per_sample, head_flops_per_sample (lists), sequential_flops_per_sample; empty and None for a method that
        cannot be counted.
    """
    if counted is None:
        return dict(UNCOUNTED)
    return {
        "flops_per_sample": [block.work for block in counted.blocks],
        "head_flops_per_sample": [block.head for block in counted.blocks],
        "sequential_flops_per_sample": counted.sequential,
    }


def price(record: dict[str, Any], counted: Cost | None, batch: float) -> None:
    """Add to a record what its run cost so far at every point of the curve, from what the blocks counted there.

    Args:
        record: of a run; its `flops` becomes example, chain, forward, head (per example) and update, longest_update
            (per step), or None; points of its curve get flops and sequential_flops.
        counted: the cost of the method. batch: examples per minibatch, on average.
    """
    record["flops"] = None
    if counted is None:
        return
    record["flops"] = {
        "example": counted.total,
        "chain": counted.sequential,
        "forward": sum(block.forward for block in counted.blocks),
        "head": sum(block.head for block in counted.blocks),
        "update": sum(block.update for block in counted.blocks),
        "longest_update": max(block.update for block in counted.blocks),
    }
    for point in record["curve"]:
        price, time = counted.spent(point["block_samples"], point["block_updates"], batch)
        looked = point.get("scored", 0) * record["flops"]["forward"]
        point["flops"] = price + looked + point.get("selector_flops", 0)
        point["sequential_flops"] = time + looked / batch


def heads(record: Mapping[str, Any], parameters: int) -> str | None:
    """One line on what the auxiliary heads cost beside the network; None if there are none."""
    if not parameters:
        return None
    text = f"heads and other local parts: {parameters:,} weights, dropped from the network"
    if not record["flops_per_sample"]:
        return text
    extra, whole = sum(record["head_flops_per_sample"]), sum(record["flops_per_sample"])
    scale, unit = _unit(whole)
    return f"{text}; {extra / scale:,.2f} of {whole / scale:,.2f} {unit} per sample ({100 * extra / whole:.1f} %)"


def count(config: FlopsConfig) -> Cost:
    """Count what a configuration asks for.

    Raises:
        UserError: an unknown name, blocks that do not fit, or a method that cannot be counted.
    """
    if not 0 <= config.update < math.inf:
        raise UserError(f"update must be FLOPs per weight and step, at least 0, got {config.update}")
    if config.inputs is None and config.classes != FlopsConfig.classes:
        raise UserError(f"classes={config.classes} goes with inputs=SHAPE; data say themselves how many there are")
    if config.inputs is not None and config.data != FlopsConfig.data:
        raise UserError(f"inputs={config.inputs} stands in the place of data={config.data}; leave one of them out")
    if config.inputs is None:
        dataset = datasets.load(config.data)
        shape, classes, sample = dataset.inputs, dataset.classes, dataset.train.inputs[:8]
    else:
        shape, classes = config.inputs, config.classes
        if not isinstance(shape, Sequence) or not all(isinstance(n, int) and n > 0 for n in shape):
            raise UserError(f"inputs must be the shape of one sample, got {shape!r}; write e.g. inputs=[3,32,32]")
        sample = torch.zeros(8, *shape)
    units = models.build(config.model, shape, classes)
    listed = isinstance(config.blocks, Sequence) and not isinstance(config.blocks, str)
    wanted = list(config.blocks) if listed else config.blocks
    blocks = split(units, wanted, sample, replays=replaying(registry.make(config.method), wanted))
    cuts = list(itertools.accumulate(map(len, blocks)))[:-1]
    return flops.cost(
        _blocks(units, cuts), shape, config.method, dtype=sample.dtype, skip=config.skip, update=config.update
    )  # fmt: skip


def as_dict(counted: Cost) -> dict[str, Any]:
    """Plain data, for JSON."""
    return {
        "blocks": [asdict(block) for block in counted.blocks],
        "locked": [[run.start, run.stop] for run in counted.locked],
        "total": counted.total,
        "sequential": counted.sequential,
    }


def show(counted: Cost, selects: bool = False) -> None:
    """Print a table with a row per block, and the two sums that count; `selects`: the method chooses its samples."""
    scale, unit = _unit(counted.total)
    table = Table("block", *HEADS, title=f"{unit} per example")
    for column in table.columns:
        column.justify = "right"
    for k, block in enumerate(counted.blocks):
        table.add_row(str(k), *(f"{getattr(block, name) / scale:,.2f}" for name in COLUMNS))
    sums = (sum(getattr(block, name) for block in counted.blocks) / scale for name in COLUMNS)
    table.add_section()
    table.add_row("all", *(f"{value:,.2f}" for value in sums))
    Console().print(table)
    print(
        "columns do not add up: a weight gradient is a whole backward that ends there, the total what the method does"
    )
    turns = ", ".join(f"{run.start}-{run.stop - 1}" for run in counted.locked if len(run) > 1)
    print(f"total {counted.total / scale:,.2f} {unit} per example")
    print(
        f"sequential (critical path) {counted.sequential / scale:,.2f} {unit} per example; "
        + (f"blocks {turns} take turns" if turns else "all blocks run in parallel")
    )
    if selects:
        print("per example that is trained on; what choosing them costs depends on the run: `compare` counts it")


def _blocks(units: Sequence[nn.Module], cuts: Sequence[int]) -> list[nn.Module]:
    return [nn.Sequential(*units[a:b]) for a, b in itertools.pairwise([0, *cuts, len(units)])]


def _unit(value: float) -> tuple[float, str]:
    """The unit in which `value` has at most four digits before the point."""
    power = next((i for i in range(len(UNITS)) if value < 1e4 * 1000**i), len(UNITS) - 1)
    return 1000.0**power, UNITS[power]
