"""Contestants for tasks whose instances have shapes of their own: a graph of nodes, and plain PyTorch in one thread.

::

    Nodes       a GraphTrainer: instances in flight, every node updates itself
    Minibatch   the synchronous model: `size` instances, one backward, one step
    OneByOne    trees only: node after node, tree after tree; one step per `size` trees

All have `fit(split) -> Measured`, an epoch, and `evaluate(split) -> score per sample`.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from decoupled.graph import Task
from decoupled.graph.statistics import NodeStatistics, merged
from decoupled.graph.trainer import Asynchrony, GraphTrainer
from decoupled.steps import MakeOptimizer, MakeScheduler
from decoupled.tasks.base import Synchronous
from decoupled.tasks.tree import Trees


class Measured(NamedTuple):
    """An epoch of training: samples, seconds, and the mean loss."""

    samples: int
    seconds: float
    loss: float

    @property
    def speed(self) -> float:
        return self.samples / self.seconds


class Minibatch:
    """The synchronous model in minibatches of `size` instances, in one thread."""

    def __init__(
        self, task: Task, optimizer: MakeOptimizer, size: int, seed: int = 0, scheduler: MakeScheduler | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.task, self.size, self._draw = task, size, random.Random(seed)
        self.model = task.synchronous()
        self._optimizer = optimizer(list(self.model.parameters()))
        self._scheduler = scheduler(self._optimizer) if scheduler else None

    def fit(self, split: str = "train") -> Measured:
        order = list(range(len(self.task.instances(split))))
        self._draw.shuffle(order)
        start, samples, total = time.perf_counter(), 0, 0.0
        for loss, count in self._steps(split, order):
            self._optimizer.step()
            self._optimizer.zero_grad()
            samples, total = samples + count, total + loss * count
        if self._scheduler:
            self._scheduler.step()
        return Measured(samples, time.perf_counter() - start, total / samples)

    def _steps(self, split: str, order: Sequence[int]) -> Iterator[tuple[float, int]]:
        """Yield mean loss and samples whenever the gradients of one step have been added up."""
        for batch in self.task.batches(split, self.size, order):
            loss, _, count = self.model(batch)
            loss.backward()
            yield loss.item(), count

    @torch.no_grad()
    def evaluate(self, split: str = "validation") -> float:
        found = [self.model(batch) for batch in self.task.batches(split, 20)]
        return sum(score for _, score, _ in found) / sum(count for _, _, count in found)


class OneByOne(Minibatch):
    """A Tree-LSTM without any batching: the loop one writes first."""

    def _steps(self, split: str, order: Sequence[int]) -> Iterator[tuple[float, int]]:
        assert isinstance(self.task, Trees)
        network, (function, _) = cast(Synchronous, self.model).network, self.task.objective
        for at in range(0, len(order), self.size):
            trees = [tree for (tree,) in self.task.batches(split, 1, order[at : at + self.size])]
            total = 0.0
            for tree in trees:
                outputs, targets = network.one_by_one(tree)
                loss: Tensor = function(outputs, targets) / len(trees)
                loss.backward()
                total += loss.item()
            yield total, len(trees)


class Nodes:
    """A graph of nodes; `asynchrony` are the options of `Asynchrony`."""

    def __init__(
        self,
        task: Task,
        optimizer: MakeOptimizer,
        seed: int = 0,
        workers: int | Mapping[str, int] = 2,
        runtime: str = "threads",
        scheduler: MakeScheduler | None = None,
        **asynchrony: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.task, self._seed = task, seed
        how = Asynchrony(**asynchrony)
        self.trainer = GraphTrainer(
            task.graph(), how, optimizer=optimizer, scheduler=scheduler, workers=workers, runtime=runtime
        )

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        self.trainer.close()

    def fit(self, split: str = "train") -> Measured:
        record = self.trainer.fit(self.task.instances(split), shuffle=self._seed)[0]
        return Measured(record["samples"], record["seconds"], record["loss"])

    def evaluate(self, split: str = "validation") -> float:
        return self.trainer.evaluate(self.task.instances(split))["score"]

    def node(self, name: str) -> NodeStatistics:
        """What a node and its replicas have counted; the numbers are those of the first, the staleness that of all."""
        own = [node for node in self.trainer.nodes() if re.fullmatch(rf"{name}(_\d+)?", node.node)]
        return replace(own[0], staleness=merged([node.staleness for node in own]))


def epochs_to(contestant: Minibatch | Nodes, target: float, most: int, say: Callable[[str], None]) -> Reached:
    """Train until the validation score reaches `target`, or `most` epochs have passed."""
    seconds, scores = 0.0, []
    for epoch in range(1, most + 1):
        measured = contestant.fit()
        seconds += measured.seconds
        scores.append(contestant.evaluate())
        say(f"  epoch {epoch}: loss {measured.loss:.4f}, validation {scores[-1]:.4f}, {measured.speed:.0f} samples/s")
        if scores[-1] >= target:
            return Reached(epoch, seconds, scores)
    return Reached(None, seconds, scores)


class Reached(NamedTuple):
    """Epochs until the target (None: not reached), seconds of training in them, and the scores after each."""

    epochs: int | None
    seconds: float
    scores: list[float]

    def text(self) -> str:
        return f"{self.epochs}" if self.epochs else f"> {len(self.scores)} (best {max(self.scores):.3f})"
