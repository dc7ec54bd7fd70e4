"""One training run as a record: prepare data and model, train with a method (or a control), measure, evaluate.

Every method of a comparison gets the same initial weights, batches, augmentation, optimizer and number of epochs for a
seed, and the same cuts. Time is training only: evaluation is not counted.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from decoupled import costs, flops, models, registry
from decoupled import data as datasets
from decoupled.build import replaying
from decoupled.config import Recipe, Task
from decoupled.data import Dataset, Loader
from decoupled.errors import UserError, first_line, unknown
from decoupled.evaluation import evaluate, normalising
from decoupled.method import Method
from decoupled.observe.recorder import Recorder
from decoupled.optimizers import Muon, Soap
from decoupled.partition import split
from decoupled.records import complete, point, threads
from decoupled.specs import label, refuse_ignored
from decoupled.steps import MakeOptimizer, MakeScheduler
from decoupled.trainer import Trainer

Advance = Callable[[int], None]
CONTROLS = {"plain_pytorch": "plain PyTorch, {threads}", "only_last": "only the last block"}


@dataclass
class Setting:
    """A task made ready: the data, and the cuts that every run uses."""

    task: Task
    dataset: Dataset
    cuts: list[int]

    trains: ClassVar[type] = Method
    controls: ClassVar[Mapping[str, str]] = CONTROLS
    baseline: ClassVar[str | None] = None  # a control that speed-ups are relative to, whatever the suite says

    def __post_init__(self) -> None:
        refuse_ignored(self.task, "networks cut into blocks", ("steps", "actors"))

    @classmethod
    def prepare(cls, task: Task, method: Method | None = None) -> Setting:
        """Load the data, and cut the model once (balanced by time, or as given); for one `method`, or for any."""
        dataset = datasets.load(task.data)
        units = models.build(task.model, dataset.inputs, dataset.classes, seed=0)
        sample = dataset.train.inputs[: task.recipe.batch_size], dataset.train.targets[: task.recipe.batch_size]
        listed = isinstance(task.blocks, Sequence) and not isinstance(task.blocks, str)
        wanted = list(task.blocks) if listed else task.blocks
        blocks = split(units, wanted, sample, replays=replaying(method, wanted))
        optimizer_for(task.recipe)
        return cls(task, dataset, list(itertools.accumulate(len(block) for block in blocks))[:-1])

    @property
    def summary(self) -> str:
        """The data in one line."""
        return self.dataset.summary

    def units(self, seed: int) -> list[nn.Module]:
        """A fresh model."""
        return models.build(self.task.model, self.dataset.inputs, self.dataset.classes, seed=seed)

    def cost(self, spec: str | Mapping[str, Any]) -> flops.Cost | None:
        """What a method costs here; None where that cannot be counted."""
        return costs.of_run(self.units(0), self.cuts, self.dataset.train.inputs[:1], spec, self.task.recipe)

    @property
    def mean_batch(self) -> float:
        """Examples per minibatch."""
        return len(self.dataset.train) / len(self.loader(0))

    def loader(self, seed: int) -> Loader:
        """Training batches: order and augmentation are a function of seed and epoch."""
        recipe = self.task.recipe
        augment = self.dataset.augment if recipe.augment else None
        return Loader(self.dataset.train, recipe.batch_size, shuffle=True, seed=seed, augment=augment)

    def held_out(self, name: str) -> Loader:
        """Batches of the "validation" or "test" split."""
        return Loader(getattr(self.dataset, name), 256)

    def run_method(self, spec: str | Mapping[str, Any], seed: int, advance: Advance) -> tuple[dict, Recorder]:
        """See `run_method`."""
        return run_method(self, spec, seed, advance)

    def run_control(self, control: str, seed: int, advance: Advance) -> dict[str, Any]:
        """See `run_control`."""
        return run_control(self, control, seed, advance)

    @property
    def samples(self) -> int:
        """Training samples of one run."""
        return len(self.dataset.train) * self.task.recipe.epochs


def optimizer_for(recipe: Recipe) -> MakeOptimizer:
    """The optimizer of a recipe.

    Raises:
        UserError: unknown name, or an impossible value.
    """
    if not recipe.lr > 0 or recipe.epochs < 1 or recipe.batch_size < 1:
        raise UserError(
            f"lr must be positive, epochs and batch_size at least 1; got {recipe.lr}, {recipe.epochs}, "
            f"{recipe.batch_size}"
        )
    if not all(map(math.isfinite, (recipe.lr, recipe.momentum, recipe.weight_decay))):
        raise UserError(
            f"lr, momentum and weight_decay must be finite; got {recipe.lr}, {recipe.momentum}, {recipe.weight_decay}"
        )
    makers: dict[str, MakeOptimizer] = {
        "sgd": lambda p: torch.optim.SGD(p, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay),
        "adam": lambda p: torch.optim.Adam(p, recipe.lr, weight_decay=recipe.weight_decay),
        "adamw": lambda p: torch.optim.AdamW(p, recipe.lr, weight_decay=recipe.weight_decay),
        "soap": lambda p: Soap(p, recipe.lr, weight_decay=recipe.weight_decay),
        "muon": lambda p: Muon(p, recipe.lr, weight_decay=recipe.weight_decay),
    }
    if recipe.optimizer not in makers:
        raise unknown("optimizer", recipe.optimizer, makers)
    if recipe.optimizer != "sgd" and recipe.momentum not in (0, Recipe.momentum):
        raise UserError(f"momentum={recipe.momentum} means nothing for {recipe.optimizer}, only for sgd; leave it out")
    try:
        makers[recipe.optimizer]([nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise UserError(f"optimizer {recipe.optimizer}: {first_line(error)}") from None
    return makers[recipe.optimizer]


def scheduler_for(recipe: Recipe, updates: int) -> MakeScheduler | None:
    """The schedule of a recipe over `updates` steps of one block."""
    if recipe.schedule not in ("cosine", "constant"):
        raise unknown("schedule", recipe.schedule, ("cosine", "constant"))
    if recipe.schedule == "constant":
        return None
    shape = partial(_cosine, updates=max(1, updates))
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


def _cosine(step: int, updates: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(step, updates) / updates))


def make_trainer(setting: Setting, spec: str | Mapping[str, Any], seed: int, **more: Any) -> Trainer:
    """A trainer for one run of a setting."""
    method, recipe = registry.make(spec), setting.task.recipe
    updates = recipe.epochs * len(setting.loader(seed)) * method.feed.steps
    return Trainer(
        nn.Sequential(*setting.units(seed)),
        method,
        setting.cuts,
        loss=F.cross_entropy,
        optimizer=optimizer_for(recipe),
        scheduler=scheduler_for(recipe, updates),
        runtime=setting.task.runtime,
        precision=setting.task.precision,
        seed=seed,
        **more,
    )


def run_method(setting: Setting, spec: str | Mapping[str, Any], seed: int, advance: Advance) -> tuple[dict, Recorder]:
    """Train once with a method; returns its record and the recorded first operations."""
    name = spec if isinstance(spec, str) else str(spec["name"])
    recorder = Recorder(label(spec), limit=36)
    with make_trainer(setting, spec, seed, on_batch=advance, observers=[recorder]) as trainer:
        loader, curve, seconds, samples = setting.loader(seed), [], 0.0, 0
        final: list[dict[str, float]] = []
        for _ in range(setting.task.recipe.epochs):
            epoch = trainer.fit(loader)[0]
            seconds, samples = seconds + epoch["seconds"], samples + int(epoch["samples"])
            last = trainer.epoch == setting.task.recipe.epochs
            held_out, *final = scores(trainer, setting, seed, "validation", *["test"] * last)
            blocks = trainer.statistics()
            counts = {"block_samples": [b.samples for b in blocks], "block_updates": [b.updates for b in blocks]}
            curve.append(point(held_out, len(curve) + 1, samples, seconds, epoch["loss"]) | counts | selected(trainer))
        blocks, startup = trainer.statistics(), trainer.runtime.startup_seconds
        counted = trainer.selected()
    busy = [b.busy_seconds / (b.busy_seconds + b.wait_seconds) for b in blocks]
    cost = setting.cost(spec)
    record = {
        "method": name,
        "label": label(spec),
        "family": registry.family(name),
        "kind": "method",
        "config": {"method": spec if isinstance(spec, str) else dict(spec), "options": registry.options(name)},
        "startup_seconds": startup,
        "utilisation": busy,
        "peak_held_bytes": [b.peak_held_bytes for b in blocks],
        "correction_bytes": [b.correction_bytes for b in blocks],
        "bytes_up_per_sample": [b.bytes_up / samples for b in blocks[:-1]],
        "bytes_down_per_sample": [b.bytes_down / samples for b in blocks[1:]],
        "staleness": [{str(late): count for late, count in b.staleness.items()} for b in blocks],
        "updates": [b.updates for b in blocks],
        "edges": [dict(b.edge) for b in blocks],
        "selection": None if counted is None else asdict(counted),
        "test_accuracy_as_trained": final[0].get("as_trained"),
        "parameters": sum(b.parameters for b in blocks),
        "auxiliary_parameters": sum(b.auxiliary_parameters for b in blocks),
        **costs.per_sample(cost),
        "timeline": [{"actor": s.track, "op": s.name, "start": s.start, "end": s.end} for s in recorder.spans],
    }
    record = complete(record, setting.task.recipe.epochs, seed, final[0], curve, samples, seconds)
    costs.price(record, cost, setting.mean_batch)
    return record, recorder


def scores(trainer: Trainer, setting: Setting, seed: int, *splits: str) -> list[dict[str, float]]:
    """What `Trainer.evaluate` finds on each held-out split.

    Where blocks were trained on something else than the forward network gives them, running statistics are estimated
    again before, on the training batches; `as_trained` is the accuracy with those that the last epoch left behind.
    """
    found = [trainer.evaluate(setting.held_out(split)) for split in splits]
    if not trainer.method.coupling.substitutes or not normalising(w.block.module for w in trainer.workers):
        return found
    batches = setting.loader(seed)
    batches.set_epoch(trainer.epoch)
    trainer.update_bn(batches)
    again = [trainer.evaluate(setting.held_out(split)) for split in splits]
    return [new | {"as_trained": old["accuracy"]} for old, new in zip(found, again, strict=True)]


def selected(trainer: Trainer) -> dict[str, float]:
    """What a point of the curve says of the selection of samples until then; nothing where there is none."""
    counted = trainer.selected()
    if counted is None:
        return {}
    updates = counted.batches * trainer.method.feed.steps
    more = {"trained": counted.trained, "scored": counted.scored, "updates": updates}
    return {**more, "selector_flops": counted.flops, "selector_seconds": counted.busy_seconds}


def run_control(setting: Setting, control: str, seed: int, advance: Advance) -> dict[str, Any]:
    """Train once outside the library: plain PyTorch, or only its last block (the rest stays as initialised)."""
    units, recipe, loader = setting.units(seed), setting.task.recipe, setting.loader(seed)
    frozen = units[: setting.cuts[-1]] if control == "only_last" and setting.cuts else []
    trained = nn.Sequential(*units[len(frozen) :])
    below, network = nn.Sequential(*frozen), nn.Sequential(*units)
    optimizer = optimizer_for(recipe)(list(trained.parameters()))
    make_scheduler = scheduler_for(recipe, recipe.epochs * len(loader))
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    curve, seconds, samples, updates = [], 0.0, 0, 0
    for epoch in range(recipe.epochs):
        loader.set_epoch(epoch)
        network.train()
        start, total = time.perf_counter(), 0.0
        for inputs, targets, _ in loader:
            with torch.no_grad():
                hidden = below(inputs)
            loss = F.cross_entropy(trained(hidden), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            total += loss.item() * len(inputs)
            samples, updates = samples + len(inputs), updates + 1
            advance(len(inputs))
        seconds += time.perf_counter() - start
        held_out = evaluate(list(network), setting.held_out("validation"), F.cross_entropy)
        curve.append(point(held_out, epoch + 1, samples, seconds, total / len(setting.dataset.train)))
    final = evaluate(list(network), setting.held_out("test"), F.cross_entropy)
    record = {
        "method": control,
        "label": CONTROLS[control].format(threads=threads()),
        "family": "control",
        "kind": "control",
        "config": {},
        "utilisation": [],
        "peak_held_bytes": [],
        "bytes_up_per_sample": [],
        "bytes_down_per_sample": [],
        "staleness": [],
        "updates": [updates],
        "parameters": sum(p.numel() for p in network.parameters()),
        "auxiliary_parameters": 0,
        **costs.UNCOUNTED,
        "timeline": [],
    }
    return complete(record, recipe.epochs, seed, final, curve, samples, seconds)
