"""Stochastic block-ADMM: see method.py for the equations."""

from __future__ import annotations

import warnings

from decoupled.method import Method
from decoupled.methods.auxiliary_variables.edge import AuxiliaryVariable, method
from decoupled.registry import register


@register("block_admm")
def block_admm(
    beta: float = 0.1,
    eta: float = 5.0,
    sigma: float = 0.5,
    rounds: int = 4,
    sweep: bool = False,
    step: str = "gradient",
) -> Method:
    """Stochastic block-ADMM, online: forward-initialised variables and duals, `rounds` rounds per minibatch."""
    if sigma > eta * beta:
        warnings.warn(f"block_admm: sigma {sigma} > eta*beta {eta * beta} is known to be unstable", stacklevel=2)
    return method(AuxiliaryVariable(beta, eta, sigma, False, step, None if sweep else rounds), sweep, rounds)
