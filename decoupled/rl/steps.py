"""From single steps to n-step transitions, and transitions as rows of one array.

    R = r_t + gamma r_{t+1} + ... + gamma^{m-1} r_{t+m-1},   discount = gamma^m (0 if the last step was terminal)
    row = s_t | a_t | R | discount | s_{t+m} | s_{t+1} (only if n > 1),    m = n, less at the end of an episode

An episode that was cut off by a time limit is not over: its last transitions bootstrap from the last observation.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoupled.rl.agent import Batch, Spaces

Floats = NDArray[np.float32]


def width(spaces: Spaces, n: int) -> int:
    """Numbers per row."""
    return (2 + (n > 1)) * spaces.observation + spaces.action + 2


def batch_of(rows: Tensor, spaces: Spaces, n: int) -> Batch:
    """Rows as a batch, without copying."""
    s, a = spaces.observation, spaces.action
    obs, action, reward, discount, *rest = rows.split([s, a, 1, 1, s, *([s] if n > 1 else [])], 1)
    return Batch(obs, action, reward, discount, rest[0], rest[-1])


class Window:
    """The latest steps of one environment, until they are n-step transitions."""

    def __init__(self, n: int, gamma: float) -> None:
        self._n, self._gamma = n, gamma
        self._steps: deque[tuple[Floats, Floats, float, Floats]] = deque()  # s, a, r, s one step later

    def push(self, obs: Floats, action: Floats, reward: float, after: Floats, over: bool, cut: bool) -> list[Floats]:
        """One more step; returns the rows that are complete.

        Args:
            over: the episode reached a terminal state. cut: it was broken off.
        """
        self._steps.append((obs, action, reward, after))
        if not (over or cut):
            return [self._row(False)] if len(self._steps) == self._n else []
        rows = []
        while self._steps:
            rows.append(self._row(over))
        return rows

    def _row(self, over: bool) -> Floats:
        """The oldest step with all that follow it; it leaves."""
        total = 0.0
        for _, _, reward, _ in reversed(self._steps):
            total = reward + self._gamma * total
        discount = 0.0 if over else self._gamma ** len(self._steps)
        last = self._steps[-1][3]
        obs, action, _, after = self._steps.popleft()
        parts = [obs, action, (total, discount), last, *([after] if self._n > 1 else [])]
        return np.concatenate(parts, dtype=np.float32)

    def state_dict(self) -> list[Any]:
        return [[torch.tensor(s), torch.tensor(a), r, torch.tensor(after)] for s, a, r, after in self._steps]

    def load_state_dict(self, state: list[Any]) -> None:
        self._steps = deque((s.numpy(), a.numpy(), r, after.numpy()) for s, a, r, after in state)
