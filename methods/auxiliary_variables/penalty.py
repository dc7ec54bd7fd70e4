"""The layer-parallel penalty method: see method.py for the equations."""

from __future__ import annotations

from decoupled.method import Method
from decoupled.methods.auxiliary_variables.edge import AuxiliaryVariable, method
from decoupled.methods.auxiliary_variables.variable import Rule
from decoupled.registry import register


@register("penalty")
def penalty(
    beta: float = 0.1,
    eta: float = 5.0,
    stored: bool = True,
    rounds: int = 1,
    sweep: bool = False,
    step: str = "gradient",
) -> Method:
    """Layer-parallel penalty method: variables stored per sample, or forward-initialised per minibatch."""
    depth = None if stored or sweep else rounds
    return method(AuxiliaryVariable(Rule(beta, eta, 0.0, stored, step), depth), sweep, rounds)
