"""The coupling that all methods of this family share: every edge has a variable, moved by what comes down.

block k --X_k--> Variable --Z_k--> block k+1
                    ^--- dJ_{k+1}/dZ_k ---+
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from decoupled.coupling import Coupling, Lower, Place, Top, Upper
from decoupled.errors import UserError, unknown
from decoupled.method import Facts, Method, own
from decoupled.methods.auxiliary_variables.variable import STEPS, Variable
from decoupled.order import rounds as rounds_order
from decoupled.retention import KeepNothing
from decoupled.source import Repeat


@dataclass(frozen=True)
class AuxiliaryVariable(Coupling):
    """Z up, the gradient of the upper objective down; `depth` blocks hear the top in a minibatch (None: all)."""

    beta: float
    eta: float
    sigma: float
    stored: bool
    step: str = "gradient"
    depth: int | None = None
    up = ("auxiliary variable",)
    down = ("gradient",)

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("eta", self.eta)):
            if value <= 0:
                raise UserError(f"{name} must be positive, got {value}")
        if not 0 <= self.sigma <= 1:
            raise UserError(f"sigma must lie in [0, 1], got {self.sigma}")
        if self.step not in STEPS:
            raise unknown("step of the auxiliary variable", self.step, STEPS)

    def lower(self, place: Place) -> Lower:
        if place.k == 0 and self.depth is not None and self.depth < place.K:
            warnings.warn(
                f"{self.depth} rounds reach the upper {self.depth} of {place.K} blocks, those below learn nothing; "
                f"use rounds={place.K} or more, or sweep=true",
                stacklevel=2,
            )
        if place.top:
            return Top(place)
        return Variable(self.beta, self.eta, self.sigma, self.stored, self.step)

    def upper(self, place: Place) -> Upper:
        upper = Upper()
        upper.replies = True
        return upper


def method(coupling: AuxiliaryVariable, sweep: bool, rounds: int) -> Method:
    """The method whose edges are `coupling`."""
    locks = ("update",) if sweep else ("backward", "update")
    locks += ("forward",) if coupling.stored else ()
    facts = Facts(exact=False, reach=own, reads_indices=coupling.stored, locks=locks)
    return Method(coupling, rounds_order(sweep), facts, KeepNothing, feed=Repeat(rounds))
