"""The coupling that all methods of this family share: every edge has a variable, moved by what comes down.

block k --X_k--> Variable --Z_k--> block k+1
                    ^--- dJ_{k+1}/dZ_k ---+
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

from torch import Tensor, autograd

from decoupled.coupling import Coupling, Lower, Place, Top, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.method import Facts, Method, own
from decoupled.methods.auxiliary_variables.proximal import Handed, Pull, unit_of
from decoupled.methods.auxiliary_variables.variable import Rule, Variable
from decoupled.order import accumulate
from decoupled.order import rounds as rounds_order
from decoupled.retention import KeepNothing
from decoupled.source import Repeat


@dataclass(frozen=True)
class AuxiliaryVariable(Coupling):
    """Z up, the gradient of the upper objective down.

    Attributes:
        rule: how Z and U move.
        depth: how many blocks hear the top in a minibatch (None: all).
        output: the network's output has a variable too, and the loss is a function of that (with more than one block).
    """

    rule: Rule
    depth: int | None = None
    output: bool = False
    up = ("auxiliary variable",)
    down = ("gradient",)
    substitutes = True

    def lower(self, place: Place) -> Lower:
        if place.k == 0 and self.depth is not None and self.depth < place.K:
            warnings.warn(
                f"{self.depth} rounds reach the upper {self.depth} of {place.K} blocks, those below learn nothing; "
                f"use rounds={place.K} or more, or sweep=true",
                stacklevel=2,
            )
        unit = unit_of(place, place.k)
        if (place.top and unit is not None) or (place.k == 0 and unit is not None and unit.learns):
            raise UserError(
                f"block{place.k} is {type(unit).__name__}, which has no gradient, and needs a differentiable block on "
                "both sides; put one there"
            )
        if place.top:
            return Output(self.rule, place) if self.output and place.K > 1 else Top(place)
        kind = Variable if unit is None else Handed
        return kind(self._rule(place, place.k), f"{place.k}-{place.k + 1}")

    def upper(self, place: Place) -> Upper:
        if (unit := unit_of(place, place.k)) is not None:
            return Pull(unit, self.rule)
        upper = Upper()
        upper.replies = True
        return upper

    def _rule(self, place: Place, k: int) -> Rule:
        """The rule of the variable between blocks k and k+1, which one of them may keep non-negative."""
        nonnegative = any(unit is not None and unit.nonnegative for unit in (unit_of(place, k), unit_of(place, k + 1)))
        return replace(self.rule, step="nonnegative") if nonnegative else self.rule


class Output(Variable):
    """The end of the network where the output has a variable Z: Z moves towards the labels, the block towards Z.

    Z <- step(Z, X, U, B dloss(Z)/dZ), then J = (beta/2) sum_i ||Z[i] - X[i] + U[i]||^2 / B

    What is reported is loss(Z) before the step, as where the output has no variable; the gradient is that of J.
    """

    awaits, replies = "", 0

    def __init__(self, rule: Rule, place: Place) -> None:
        super().__init__(rule, f"{place.k}-loss")
        self._loss = place.loss

    def objective(self, y: Tensor, data: Data | None) -> Tensor | None:
        assert self.z is not None and data is not None and data.targets is not None
        z = self.z.detach().requires_grad_()
        loss = self._loss(z, data.targets)
        (p,) = autograd.grad(loss, z)
        self.answer((p * self._share,))
        J = super().objective(y, data)
        return None if J is None else J - J.detach() + loss.detach()


def method(coupling: AuxiliaryVariable, sweep: bool, rounds: int) -> Method:
    """The method whose edges are `coupling`, with `rounds` rounds per minibatch."""
    rule = coupling.rule
    locks = ("update",) if sweep else ("backward", "update")
    locks += ("forward",) if rule.stored else ()
    facts = Facts(exact=False, reach=own, reads_indices=rule.stored, locks=locks)
    order = rounds_order(sweep)
    if rule.z_steps > 1:
        order = accumulate(order, rule.z_steps)
    return Method(coupling, order, facts, KeepNothing, feed=Repeat(rounds, rule.z_steps))
