"""Corrections: what is done about staleness. They compose, in the order they are listed.

Shrink(factor)   the gradient from above is multiplied by `factor` at every hop, so block k of K sees
                 factor ** (K-1-k) of it (FDG, Zhuang et al. 2021)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from decoupled.errors import UserError


class Correction:
    """Changes nothing until a method of it is overridden."""

    def cotangent(self, gradient: Tensor) -> Tensor:
        """Called with every gradient that a block receives from above."""
        return gradient


@dataclass(frozen=True)
class Shrink(Correction):
    """Gradient shrinking; `factor` in (0, 1], 1 is off."""

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise UserError(f"gradient shrinking needs a factor in (0, 1], got {self.factor}")

    def cotangent(self, gradient: Tensor) -> Tensor:
        return gradient if self.factor == 1 else gradient * self.factor
