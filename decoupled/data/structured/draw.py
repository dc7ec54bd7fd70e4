"""Random numbers that are the same on every version of Python: only `random.Random.random` is promised to be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from decoupled.errors import UserError

T = TypeVar("T")


class Draw:
    """A stream of random choices that depends on `seed` only."""

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise UserError(f"a seed must be an integer of at least 0, got {seed!r}")
        self.uniform = random.Random(seed).random  # a number in [0, 1)

    def below(self, count: int) -> int:
        """Return one of 0 ... count - 1."""
        return int(self.uniform() * count)

    def choice(self, values: Sequence[T]) -> T:
        """Return one of `values`."""
        return values[self.below(len(values))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """Return `values` in a random order (Fisher and Yates)."""
        order = list(values)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order
