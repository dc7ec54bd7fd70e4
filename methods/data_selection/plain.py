"""What the choosers share: draws per epoch, numbers by sample index, tokens; and the plainest chooser, a coin.

Choosers compute in float32, whatever torch's default is.

uniform   keep i if u_i < fraction,   u_i ~ U(0, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.selection import Choice, Chooser, Selection


def draws(seed: int, epoch: int, what: int = 0) -> torch.Generator:
    """Random numbers of one epoch; `what` keeps streams apart."""
    (number,) = np.random.SeedSequence((seed, epoch, what)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(number >> np.uint64(1)))


def uniforms(count: int, draw: torch.Generator) -> Tensor:
    """(count,) numbers, even in [0, 1)."""
    return torch.rand(count, generator=draw, dtype=torch.float32)


def indices(data: Data) -> Tensor:
    """The sample indices of candidates, on the CPU."""
    assert data.indices is not None
    return data.indices.cpu()


def are_tokens(inputs: Tensor) -> bool:
    """Whether inputs are sequences of token numbers (batch, length)."""
    return not inputs.is_floating_point() and inputs.dim() == 2


def vocabulary(outputs: Sequence[int]) -> int:
    """How many different tokens are reckoned with: 256, or as many as the network has classes if these are more."""
    return max(256, outputs[0] if outputs else 0)


def numbers(tokens: Tensor, vocabulary: int) -> Tensor:
    """Token numbers as int64 on the CPU.

    Raises:
        UserError: one of them is not in 0 .. vocabulary - 1.
    """
    tokens = tokens.long().cpu()
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"the selector's model knows tokens 0 to {vocabulary - 1} (256, or as many as the network has classes); "
            f"the data have {low} to {high}; number them so, or use a method that reads no inputs: selective_backprop"
        )
    return tokens


class Table:
    """A number per sample index, `unknown` until it is set."""

    def __init__(self, unknown: float = float("nan")) -> None:
        self._unknown, self._values = unknown, torch.zeros(0, dtype=torch.float32)

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
            room = torch.full((max(more, len(self._values)),), self._unknown, dtype=torch.float32)
            self._values = torch.cat([self._values, room])


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
        kept = uniforms(len(indices(samples)), self._draws) < self._fraction
        return Choice() if bool(kept.all()) else Choice(kept.nonzero()[:, 0])
