"""What all tasks share: examples by split, made into instances once; minibatches of the same examples.

::

    examples("train")                a b c d e f g      plain data, as loaded
    groups("train")                  [a b] [c d] ...    what one instance holds (one example, or several of one form)
    instances, batches               graph and synchronous model see the same groups
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from decoupled.errors import unknown
from decoupled.graph import Instance, Task

T = TypeVar("T")
SPLITS = ("train", "validation", "test")

# (outputs, targets) -> mean loss; (outputs, targets) -> sum of scores
Objective = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], float]]


def right(logits: Tensor, targets: Tensor) -> float:
    """Return how many rows of `logits` (rows, classes) are largest at their target."""
    return float((logits.argmax(1) == targets).sum())


def absolute_error(values: Tensor, targets: Tensor) -> float:
    """Return the sum of |value - target| over rows."""
    return float((values - targets).abs().sum())


CLASSIFY: Objective = (nn.functional.cross_entropy, right)
REGRESS: Objective = (nn.functional.mse_loss, absolute_error)


class Grouped(Task, Generic[T]):
    """A task over groups of examples; a subclass gives `graph`, `groups`, `instance` and `network`.

    Attributes:
        objective: loss and score.
    """

    objective: Objective = CLASSIFY

    def __init__(self) -> None:
        self._groups: dict[str, list[Sequence[T]]] = {}
        self._instances: dict[str, list[Instance]] = {}

    @abstractmethod
    def groups(self, split: str) -> Iterable[Sequence[T]]:
        """The examples of every instance of a split, in a fixed order."""

    @abstractmethod
    def instance(self, group: Sequence[T]) -> Instance:
        """The messages of one group."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The model in plain PyTorch: examples -> (outputs, targets); weights from torch's default generator."""

    def instances(self, split: str) -> Sequence[Instance]:
        if split not in self._instances:
            self._instances[split] = [self.instance(group) for group in self._split(split)]
        return self._instances[split]

    def synchronous(self) -> nn.Module:
        return Synchronous(self.network(), self.objective)

    def batches(self, split: str, size: int, order: Sequence[int] | None = None) -> Iterator[Sequence[T]]:
        groups = self._split(split)
        order = range(len(groups)) if order is None else order
        for at in range(0, len(order), size):
            yield [example for number in order[at : at + size] for example in groups[number]]

    def _split(self, split: str) -> Sequence[Sequence[T]]:
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if split not in self._groups:
            self._groups[split] = list(self.groups(split))
        return self._groups[split]


class Synchronous(nn.Module):
    """A model with its loss: examples -> (mean loss, sum of scores, samples); its weights are named as the graph's.

    Args:
        network: examples -> (outputs, targets).
        objective: loss and score.
    """

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
        self._network = [network]  # in a list: its parts are ours already
        self._objective = objective

    @property
    def network(self) -> Any:
        """The model without its loss."""
        return self._network[0]

    def forward(self, examples: Sequence[Any]) -> tuple[Tensor, float, int]:
        """Return mean loss, sum of scores, samples."""
        outputs, targets = self.network(examples)
        loss, score = self._objective
        return loss(outputs, targets), score(outputs.detach(), targets), len(targets)


def one_each(examples: Sequence[T]) -> list[list[T]]:
    """Groups of a single example."""
    return [[example] for example in examples]


def zeros(*shape: int) -> Tensor:
    """Zeros of the default type."""
    return torch.zeros(*shape, dtype=torch.get_default_dtype())
