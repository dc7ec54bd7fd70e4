"""One training run of a task as a record: the graph with a method, or the same model in plain PyTorch (the control).

Both get the same initial weights, instances, optimizer and number of epochs for a seed, and a learning rate that
follows the recipe's schedule from epoch to epoch.
The control trains on minibatches of `batch_size` instances; time is training only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from decoupled import costs, registry, tasks
from decoupled.config import Task as Configured
from decoupled.config import TrainConfig
from decoupled.errors import UserError
from decoupled.experiment import optimizer_for, scheduler_for
from decoupled.graph.asynchrony import Asynchrony
from decoupled.graph.instance import Instance, Task
from decoupled.graph.trainer import GraphTrainer
from decoupled.observe.recorder import Recorder
from decoupled.records import complete, point
from decoupled.specs import label, refuse_ignored

Scores = dict[str, float]
IGNORED = ("data", "model", "precision", "augment", "on_nonfinite", "steps", "actors")  # what says nothing of graphs
CONTROLS = {"synchronous": "plain PyTorch, minibatches"}


@dataclass
class GraphSetting:
    """A task made ready.

    Attributes:
        task: the configuration; `blocks` are workers: how many, or node -> number of its worker.
        work: the task itself.
    """

    task: Configured
    work: Task
    splits: dict[str, Sequence[Instance]] = field(default_factory=dict)

    trains: ClassVar[type] = Asynchrony
    controls: ClassVar[Mapping[str, str]] = CONTROLS
    baseline: ClassVar[str | None] = CONTROLS["synchronous"]

    def __post_init__(self) -> None:
        alone = isinstance(self.task, TrainConfig)  # without the control, which trains on minibatches
        refuse_ignored(self.task, "graphs", IGNORED + ("batch_size",) * alone)

    @classmethod
    def prepare(cls, task: Configured) -> GraphSetting:
        """Make the task's data."""
        if not isinstance(task.blocks, int | Mapping):
            raise UserError(f"blocks of a task are workers: a number, or node -> worker; got {task.blocks!r}")
        optimizer_for(task.recipe)
        work = tasks.make(task.task)
        return cls(task, work, {split: work.instances(split) for split in ("train", "validation", "test")})

    @property
    def cuts(self) -> list[int]:
        """As many as there would be between as many blocks."""
        blocks = self.task.blocks
        return list(range(1, blocks if isinstance(blocks, int) else max(blocks.values(), default=0) + 1))

    @property
    def summary(self) -> str:
        """The data in one line."""
        sizes = ", ".join(f"{split} {sum(one.size for one in instances)}" for split, instances in self.splits.items())
        return f"{self.work.name}, {sizes}" + (f"; {self.work.description}" if self.work.description else "")

    @property
    def samples(self) -> int:
        """Training samples of one run."""
        return sum(instance.size for instance in self.splits["train"]) * self.task.recipe.epochs

    def trainer(self, spec: str | Mapping[str, Any], seed: int, **more: Any) -> GraphTrainer:
        """A trainer for one run."""
        torch.manual_seed(seed)
        return GraphTrainer(
            self.work.graph(), spec, optimizer=optimizer_for(self.task.recipe), workers=self.task.blocks,
            scheduler=scheduler_for(self.task.recipe, self.task.recipe.epochs), runtime=self.task.runtime, **more,
        )  # fmt: skip

    def named(self, scores: Mapping[str, float]) -> Scores:
        """loss and score, and the score as accuracy where more is better."""
        accuracy = scores["score"] if self.work.higher_is_better else float("nan")
        return {**scores, "accuracy": accuracy}

    def run_method(
        self, spec: str | Mapping[str, Any], seed: int, advance: Callable[[int], None]
    ) -> tuple[dict[str, Any], Recorder]:
        """Train once with a method; returns its record and the recorded first operations."""
        recorder, name = Recorder(label(spec), limit=36), spec if isinstance(spec, str) else str(spec["name"])
        with self.trainer(spec, seed, on_retire=advance, observers=[recorder]) as trainer:

            def epoch() -> tuple[float, int, float]:
                record = trainer.fit(self.splits["train"], shuffle=seed)[0]
                return record["seconds"], record["samples"], record["loss"]

            found = self._train(epoch, lambda split: trainer.evaluate(self.splits[split]), seed)
            workers, startup = trainer.statistics(), trainer.runtime.startup_seconds
            parameters = sum(p.numel() for p in trainer.graph.module.parameters())
        samples = found["samples"]
        busy = [w.busy_seconds / max(1e-12, w.busy_seconds + w.wait_seconds) for w in workers]
        return found | {
            "method": name, "label": label(spec), "family": registry.family(name), "kind": "method",
            "config": {"method": spec if isinstance(spec, str) else dict(spec), "options": registry.options(name)},
            "startup_seconds": startup, "utilisation": busy, "parameters": parameters, "auxiliary_parameters": 0,
            "peak_held_bytes": [w.peak_held_bytes for w in workers], "updates": [w.updates for w in workers],
            "bytes_up_per_sample": [w.bytes_forward / samples for w in workers],
            "bytes_down_per_sample": [w.bytes_backward / samples for w in workers],
            "staleness": [{str(late): n for late, n in w.staleness.items()} for w in workers],
            "timeline": [{"actor": s.track, "op": s.name, "start": s.start, "end": s.end} for s in recorder.spans],
            **costs.UNCOUNTED,
        }, recorder  # fmt: skip

    def run_control(self, control: str, seed: int, advance: Callable[[int], None]) -> dict[str, Any]:
        """Train the same model once in plain PyTorch, minibatch by minibatch."""
        torch.manual_seed(seed)
        weights, recipe = self.work.graph().module.state_dict(), self.task.recipe
        model = self.work.synchronous()
        model.load_state_dict(weights)
        optimizer = optimizer_for(recipe)([p for p in model.parameters() if p.requires_grad])
        schedule = scheduler_for(recipe, recipe.epochs)
        scheduler = schedule(optimizer) if schedule else None
        train, orders = self.splits["train"], torch.Generator().manual_seed(seed)
        updates = 0

        def epoch() -> tuple[float, int, float]:
            nonlocal updates
            order = torch.randperm(len(train), generator=orders).tolist()
            model.train()
            start, total, rows = time.perf_counter(), 0.0, 0
            for batch in self.work.batches("train", recipe.batch_size, order):
                loss, _, samples = model(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, rows, updates = total + loss.item() * samples, rows + samples, updates + 1
                advance(samples)
            if scheduler:
                scheduler.step()
            seconds = time.perf_counter() - start
            return seconds, sum(instance.size for instance in train), total / max(1, rows)

        found = self._train(epoch, partial(self._score, model), seed)
        return found | {
            "method": control, "label": self.controls[control], "family": "control", "kind": "control", "config": {},
            "utilisation": [], "peak_held_bytes": [], "bytes_up_per_sample": [], "bytes_down_per_sample": [],
            "staleness": [], "updates": [updates], "timeline": [], "auxiliary_parameters": 0, **costs.UNCOUNTED,
            "parameters": sum(p.numel() for p in model.parameters()),
        }  # fmt: skip

    def _score(self, model: torch.nn.Module, split: str) -> Scores:
        model.eval()
        loss, score, rows = 0.0, 0.0, 0
        with torch.no_grad():
            for batch in self.work.batches(split, self.task.recipe.batch_size):
                one, scored, samples = model(batch)
                loss, score, rows = loss + one.item() * samples, score + float(scored), rows + samples
        return {"loss": loss / max(1, rows), "score": score / max(1, rows)}

    def _train(
        self, epoch: Callable[[], tuple[float, int, float]], evaluate: Callable[[str], Scores], seed: int
    ) -> dict[str, Any]:
        """All epochs, with the validation after each, and the test at the end."""
        curve: list[dict[str, Any]] = []
        seconds, samples = 0.0, 0
        for _ in range(self.task.recipe.epochs):
            took, trained, loss = epoch()
            seconds, samples = seconds + took, samples + trained
            curve.append(point(self.named(evaluate("validation")), len(curve) + 1, samples, seconds, loss))
        final = self.named(evaluate("test"))
        record = {"metric": self.work.metric, "test_score": final["score"]}
        return complete(record, self.task.recipe.epochs, seed, final, curve, samples, seconds)
