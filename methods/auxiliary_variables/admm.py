"""Stochastic block-ADMM: see method.py for the equations."""

from __future__ import annotations

import warnings

from decoupled.method import Method
from decoupled.methods.auxiliary_variables.edge import AuxiliaryVariable, method
from decoupled.methods.auxiliary_variables.variable import Rule
from decoupled.registry import register


@register("block_admm")
def block_admm(
    beta: float = 0.1,
    eta: float = 5.0,
    sigma: float = 0.5,
    rounds: int = 4,
    sweep: bool = False,
    step: str = "gradient",
    z_steps: int = 1,
    output: bool = False,
    stored: bool = False,
    memory: float = 1024.0,
) -> Method:
    """Stochastic block-ADMM: `rounds` rounds per minibatch on forward-initialised variables and duals (online), or on
    those stored per sample (batch), in up to `memory` MiB per edge and above that in a file."""
    rule = Rule(beta, eta, sigma, stored, step, z_steps, memory * 2**20)
    if sigma > eta * beta:
        warnings.warn(f"block_admm: sigma {sigma} > eta*beta {eta * beta} is known to be unstable", stacklevel=2)
    if rule.overshoots:
        warnings.warn(f"block_admm: {rule.broken()}, or the variables move away from the blocks", stacklevel=2)
    return method(AuxiliaryVariable(rule, None if stored or sweep else rounds * z_steps, output), sweep, rounds)
