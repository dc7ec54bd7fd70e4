"""What the choosers share: draws per epoch, a table of numbers by sample index; and the plainest chooser, a coin.

uniform   keep i if u_i < fraction,   u_i ~ U(0, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoupled.messages import Data
from decoupled.selection import Choice, Chooser, Selection


def draws(seed: int, epoch: int, what: int = 0) -> torch.Generator:
    """Random numbers of one epoch; `what` keeps streams apart."""
    (number,) = np.random.SeedSequence((seed, epoch, what)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(number >> np.uint64(1)))


def indices(data: Data) -> Tensor:
    """The sample indices of candidates, on the CPU."""
    assert data.indices is not None
    return data.indices.cpu()


class Table:
    """A number per sample index, `unknown` until it is set."""

    def __init__(self, unknown: float = float("nan")) -> None:
        self._unknown, self._values = unknown, torch.zeros(0)

    def __getitem__(self, index: Tensor) -> Tensor:
        self._reach(index)
        return self._values[index]

    def __setitem__(self, index: Tensor, values: Tensor) -> None:
        self._reach(index)
        self._values[index] = values.float()

    @property
    def values(self) -> Tensor:
        """All of them, those that are unknown included."""
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._values = values

    def _reach(self, index: Tensor) -> None:
        more = (int(index.max()) + 1 if len(index) else 0) - len(self._values)
        if more > 0:
            self._values = torch.cat([self._values, torch.full((max(more, len(self._values)),), self._unknown)])


@dataclass(frozen=True, kw_only=True)
class Uniform(Selection):
    """`fraction` of the samples."""

    fraction: float

    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        return Coin(self.fraction, seed)


class Coin(Chooser):
    """Keeps every sample with the same probability."""

    def __init__(self, fraction: float, seed: int) -> None:
        self._fraction, self._seed = fraction, seed

    def begin(self, epoch: int) -> None:
        self._draws = draws(self._seed, epoch)

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        kept = torch.rand(len(indices(samples)), generator=self._draws) < self._fraction
        return Choice() if bool(kept.all()) else Choice(kept.nonzero()[:, 0])
