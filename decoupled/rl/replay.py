"""Replay memory: rows of numbers, the oldest overwritten first; drawn from uniformly or by priority.

    priority     p_i = (|td_i| + eps)^alpha                                  set when a row comes in, and after each use
    draw         P(i) = p_i / sum p, stratified: one of every total/B
    weights      w_i = (N P(i))^-beta / max over the batch                    multiplied into the losses

Every row has a birth number. A priority that comes back for a row which was overwritten meanwhile is dropped.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoupled.errors import UserError
from decoupled.rl.sum_tree import SumTree

EPS = 1e-6
Floats = NDArray[np.float32]


class Draw(NamedTuple):
    """Rows drawn: (batch, width) rows, (batch,) importance weights or None, where they lie, and their birth numbers."""

    rows: Tensor
    weights: Tensor | None
    places: NDArray[np.int64]
    births: NDArray[np.int64]


class Replay:
    """Keeps the latest `capacity` rows.

    Args:
        capacity: rows. width: numbers per row.
        prioritized: draw by priority. alpha, beta: see above.
        seed: of the draws.

    Attributes:
        births: rows that ever came in.
    """

    def __init__(
        self, capacity: int, width: int, prioritized: bool = False, alpha: float = 0.6, beta: float = 0.4, seed: int = 0
    ) -> None:
        self.capacity, self.births = capacity, 0
        self._rows = np.empty((capacity, width), np.float32)
        self._born = np.full(capacity, -1, np.int64)
        self._versions = np.zeros(capacity, np.int64)
        self._tree = SumTree(capacity) if prioritized else None
        self._alpha, self._beta = alpha, beta
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def __len__(self) -> int:
        return min(self.births, self.capacity)

    def add(self, rows: Floats, errors: Floats | None, version: int) -> None:
        """Take in rows made with weight `version`; `errors`: their |td|, if drawn by priority."""
        births = np.arange(self.births, self.births + len(rows))
        places = births % self.capacity
        self._rows[places], self._born[places], self._versions[places] = rows, births, version
        self.births += len(rows)
        if self._tree is not None:
            assert errors is not None
            self._tree.set(places, self._priorities(errors))

    def draw(self, count: int, uniform: bool = False) -> Draw:
        """`count` rows, by priority unless `uniform`.

        Raises:
            UserError: it holds fewer.
        """
        if len(self) < count:
            raise UserError(
                f"the replay holds {len(self)} transitions, fewer than a batch of {count}; raise warmup, or lower "
                "batch_size"
            )
        if self._tree is None or uniform:
            places = self._generator.integers(0, len(self), count)
            return Draw(torch.from_numpy(self._rows[places]), None, places, self._born[places])
        masses = (np.arange(count) + self._generator.random(count)) * (self._tree.total / count)
        places = self._tree.find(masses)
        weights = (len(self) * self._tree.get(places) / self._tree.total) ** -self._beta
        weights = torch.from_numpy((weights / weights.max()).astype(np.float32))
        return Draw(torch.from_numpy(self._rows[places]), weights, places, self._born[places])

    def latest(self, count: int) -> Tensor:
        """The `count` newest rows."""
        return torch.from_numpy(self._rows[np.arange(self.births - count, self.births) % self.capacity])

    def judge(self, draw: Draw, errors: Floats) -> None:
        """New |td| of rows drawn earlier."""
        if self._tree is not None:
            still = self._born[draw.places] == draw.births
            self._tree.set(draw.places[still], self._priorities(errors)[still])

    def age(self, draw: Draw) -> float:
        """Mean number of rows that came in after those drawn."""
        return float(self.births - 1 - draw.births.mean())

    def lag(self, draw: Draw, version: int) -> float:
        """Mean number of updates since the weights that the rows drawn were made with."""
        return float(version - self._versions[draw.places].mean())

    def state_dict(self) -> dict[str, Any]:
        """Everything it holds, as tensors and plain values."""
        full, state = len(self), self._generator.bit_generator.state
        kept: dict[str, Any] = {"births": self.births, "random": repr(state)}
        for name, array in (("rows", self._rows), ("born", self._born), ("versions", self._versions)):
            kept[name] = torch.from_numpy(array[:full].copy())
        if self._tree is not None:
            kept["priorities"] = torch.from_numpy(self._tree.get(np.arange(full)))
        return kept

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            UserError: it is of a replay with another capacity, of other rows, or drawn from otherwise.
        """
        full = len(state["rows"])
        shape, judged = (min(state["births"], self.capacity), self._rows.shape[1]), "priorities" in state
        if tuple(state["rows"].shape) != shape or judged != (self._tree is not None):
            raise UserError(
                f"the saved replay holds {tuple(state['rows'].shape)} numbers, prioritized={judged}; this one takes "
                f"{shape}, prioritized={self._tree is not None}: use the environment and options of the run that was "
                "saved"
            )
        self.births = state["births"]
        self._rows[:full], self._born[:full] = state["rows"].numpy(), state["born"].numpy()
        self._versions[:full] = state["versions"].numpy()
        if self._tree is not None:
            self._tree.set(np.arange(full), state["priorities"].numpy())
        restore(self._generator, state["random"])

    def _priorities(self, errors: Floats) -> NDArray[np.float64]:
        return (np.abs(errors.astype(np.float64)) + EPS) ** self._alpha


def restore(generator: np.random.Generator, state: str) -> None:
    """Put a generator's state back; as text, because it has integers of 128 bits."""
    generator.bit_generator.state = ast.literal_eval(state)
