"""Auxiliary variables: every edge k has a variable Z_k that stands for block k's output, so that blocks need not wait.

    name        dual        variables                                    order               feed
    block_admm  U (scaled)  per minibatch, forward-initialised (online)  rounds              Repeat(M)
    penalty     none        per sample (stored) or per minibatch         rounds              Whole / Repeat(M)

Symbols: X_k = f_k(Z_{k-1}; w_k), Z_{-1} = x, Z_k and U_k (batch, *features), B samples, K blocks.

    J_k     = (beta/2) sum_i ||Z_k[i] - X_k[i] + U_k[i]||^2 / B,  k < K-1;   J_{K-1} = loss(X_{K-1}, target)
    p_k     = B dJ_{k+1}/dZ_k                                       sent down (per sample, hence the factor B)
    Z_k    <- Z_k - eta (beta (Z_k - X_k + U_k) + p_k)              when p_k has come (step="gradient")
    U_k    <- U_k + sigma (Z_k - X_k)                               when the round is over; penalty: U = 0 always

Flow: up Z_k, sent before block k has run (operation E) unless it is the first visit; down dJ_{k+1}/dZ_k. All blocks
work on one minibatch at once (Jacobi); `sweep` updates the variables from right to left instead, each with its
neighbour's new one. Reproduced from the descriptions in Khorram et al. 2021 (arXiv 2105.00339) and Sun et al. (arXiv
2009.01462): their equations could not be read, so no number of theirs is claimed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from decoupled.coupling import Coupling, Lower, Place, Top, Upper
from decoupled.errors import UserError, unknown
from decoupled.method import Facts, Method, own
from decoupled.methods.auxiliary_variables.variable import STEPS, Variable
from decoupled.order import rounds as rounds_order
from decoupled.registry import register
from decoupled.retention import KeepNothing
from decoupled.source import Repeat


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
    return _method(AuxiliaryVariable(beta, eta, sigma, False, step, None if sweep else rounds), sweep, rounds)


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
    return _method(AuxiliaryVariable(beta, eta, 0.0, stored, step, depth), sweep, rounds)


def _method(coupling: AuxiliaryVariable, sweep: bool, rounds: int) -> Method:
    locks = ("update",) if sweep else ("backward", "update")
    locks += ("forward",) if coupling.stored else ()
    facts = Facts(exact=False, reach=own, reads_indices=coupling.stored, locks=locks)
    return Method(coupling, rounds_order(sweep), facts, KeepNothing, feed=Repeat(rounds))


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
