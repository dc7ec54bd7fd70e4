"""A sum tree: weights of many items, changed and drawn from in time log(capacity), many at a time.

tree[1]                 sum of all
tree[2], tree[3]        sums of the halves ...
tree[size + i]          weight of item i

set    leaves, then their parents level by level (a parent is the sum of its two children, whoever changed)
find   from the root down: left if the mass lies there, else right with what is left of it
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Weights = NDArray[np.float64]


class SumTree:
    """Weights of items 0 .. capacity - 1, zero at first."""

    def __init__(self, capacity: int) -> None:
        self._size = 1 << max(0, capacity - 1).bit_length()
        self._tree = np.zeros(2 * self._size)
        self.capacity = capacity

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._tree[1])

    def get(self, items: Numbers) -> Weights:
        """Weights of `items`."""
        return self._tree[items + self._size]

    def set(self, items: Numbers, weights: Weights) -> None:
        """Give `items` these weights; of an item that is named twice the last counts."""
        nodes, tree = items + self._size, self._tree
        tree[nodes] = weights
        while nodes.size and nodes[0] > 1:  # all are on one level
            nodes = nodes >> 1
            tree[nodes] = tree[2 * nodes] + tree[2 * nodes + 1]

    def find(self, masses: Weights) -> Numbers:
        """The items in whose share of [0, total) each mass lies; never one of weight zero if there is another."""
        tree, masses = self._tree, masses.copy()
        nodes = np.ones(len(masses), np.int64)
        while nodes.size and nodes[0] < self._size:
            nodes *= 2
            left = tree[nodes]
            right = (masses >= left) & (tree[nodes + 1] > 0)  # rounding must not lead into an empty half
            masses -= left * right
            nodes += right
        return nodes - self._size
