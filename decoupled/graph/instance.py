"""What a graph trains on: instances, each a few messages for the inputs of the graph; and tasks, which make them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from decoupled.graph.build import NodeGraph


class Pumped(NamedTuple):
    """One message of an instance: which input, the state behind the instance's number, and the payload."""

    input: str
    position: tuple[Any, ...]
    payload: Tensor


@dataclass(frozen=True)
class Instance:
    """One training example (or a small batch of examples of the same form).

    Attributes:
        messages: what it brings to the inputs. A message has the state `(Key(number, about), *position)`.
        about: what state functions may look up as `i.about`: None, bool, int, float, str, or tuples of such.
        losses: how many times a loss is reached.
        size: how many examples it is.
    """

    messages: Sequence[Pumped]
    about: Any = None
    losses: int = 1
    size: int = 1


class Task(ABC):
    """A data set, the graph that learns it, and the same model in plain PyTorch.

    Attributes:
        name: of the task. metric: what the score of its loss nodes measures; `higher_is_better` says which way.
        target: the value of the metric that counts as learned, or None.
        description: of the data: source, sizes and hash.
    """

    name: str
    metric: str = "accuracy"
    higher_is_better: bool = True
    target: float | None = None
    description: str = ""

    @abstractmethod
    def graph(self) -> NodeGraph:
        """A fresh graph; weights are drawn from torch's default generator."""

    @abstractmethod
    def instances(self, split: str) -> Sequence[Instance]:
        """Instances of "train", "validation" or "test", in their order; the same at every call."""

    def synchronous(self) -> nn.Module:
        """The same model in plain PyTorch: `module(batch)` returns (loss, score, samples) like a `Result`."""
        raise NotImplementedError

    def batches(self, split: str, size: int, order: Sequence[int] | None = None) -> Iterable[Any]:
        """Minibatches for `synchronous`, of `size` instances each; `order`: numbers of the instances."""
        raise NotImplementedError
