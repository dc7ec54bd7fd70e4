"""What every contestant of the speed benchmark trains: the same network, batches and optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decoupled import models

Run = Callable[[int], None]  # trains that many batches
CLASSES = 10
DISTINCT = 8  # batches kept in memory and used in turn


@dataclass(frozen=True)
class Setting:
    """One training job.

    Attributes:
        model: name of a network of `decoupled.models`.
        image: shape of one input.
        batch_size: samples per optimizer step, for every contestant.
        cut: index of the first unit of the second block.
    """

    model: str = "resnet20"
    image: tuple[int, int, int] = (1, 28, 28)
    batch_size: int = 64
    cut: int = 4

    def units(self) -> list[nn.Module]:
        """The network with its initial weights, the same for everybody."""
        return models.build(self.model, self.image, CLASSES)

    def halves(self) -> tuple[nn.Sequential, nn.Sequential]:
        """The network in two blocks."""
        units = self.units()
        return nn.Sequential(*units[: self.cut]), nn.Sequential(*units[self.cut :])

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` batches of noise with random labels: speed does not depend on what is learned."""
        draw = torch.Generator().manual_seed(0)
        shape = (self.batch_size, *self.image)
        kept = [
            (torch.randn(shape, generator=draw), torch.randint(CLASSES, shape[:1], generator=draw))
            for _ in range(min(count, DISTINCT))
        ]
        return itertools.islice(itertools.cycle(kept), count)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every contestant: SGD with momentum 0.9."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
