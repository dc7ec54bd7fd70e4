"""How lambda and kappa move, and when: the numbers of a layer-parallel method, apart from where tensors are kept.

    symbols as in stage.py:  X the stage's output, lambda its variable, kappa the multiplier, p the gradient from above

Stable: sigma <= eta beta (the multiplier no faster than the variable) and eta beta in [0.1, 0.5]; from eta beta = 2 on
every step of lambda overshoots by more than it came from.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from decoupled.errors import UserError, unknown
from decoupled.methods.auxiliary_variables.variable import STEPS, rounding, squared

RULE = "known to be stable are sigma <= eta*beta and eta*beta in [0.1, 0.5]"


@dataclass(frozen=True)
class Rule:
    """The step sizes of an edge.

    Attributes:
        beta: weight of the penalty, on the sum over features. eta: step of lambda; 0: it never moves (a control).
        sigma: step of kappa relative to beta; None: no kappa. step: name of the step of lambda.
        warm: start from the recorded gradient; else kappa starts at 0 and lambda at X.
    """

    beta: float
    eta: float
    sigma: float | None = None
    step: str = "gradient"
    warm: bool = True

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        if self.eta < 0 or (self.eta == 0 and self.step != "gradient"):
            raise UserError(f"eta must be positive, or 0 for variables that never move, got {self.eta}")
        if self.sigma is not None and not 0 <= self.sigma <= 1:
            raise UserError(f"sigma must lie in [0, 1], got {self.sigma}")
        if self.step not in STEPS:
            raise unknown("step of the auxiliary variable", self.step, STEPS)
        both = self.eta * self.beta
        if both >= 2 and self.step == "gradient":
            raise UserError(f"eta*beta = {both:g}: from 2 on the variable diverges; set eta below {2 / self.beta:g}")
        if self.sigma is not None and self.sigma > both + 1e-9 and self.eta:
            warnings.warn(
                f"sigma {self.sigma:g} > eta*beta {both:g} is known to be unstable; set sigma to {both:g} or less",
                stacklevel=2,
            )

    @property
    def multiplies(self) -> bool:
        """Whether there is a kappa."""
        return self.sigma is not None

    @property
    def remedy(self) -> str:
        """What to do when it diverges."""
        return (
            f"beta={self.beta:g}, eta*beta={self.eta * self.beta:g}"
            + ("" if self.sigma is None else f", sigma={self.sigma:g}")
            + f"; {RULE}: set beta={self.beta / 10:g}, or lower the learning rate"
        )

    def gradient(self, x: Tensor, lam: Tensor, kap: Tensor | None) -> Tensor:
        """kappa + beta (X - lambda): the gradient of a sample's objective for X; all (batch, *features)."""
        violation = x - lam
        return violation.mul_(self.beta) if kap is None else torch.add(kap, violation, alpha=self.beta)

    def objective(self, y: Tensor, lam: Tensor, kap: Tensor | None, g: Tensor) -> Tensor | None:
        """J at output `y`, from its `gradient` g; None while kappa is 0 and X - lambda is rounding, as at first.

        J = (<g, X - lambda> - beta/2 ||X - lambda||^2) / B; only <g, y> / B has a graph, which is all of its gradient.
        """
        violation, g_flat = (y.detach() - lam).flatten().to(g.dtype), g.flatten()
        square = torch.dot(violation, violation)
        if rounding(float(square), y, squared(y)) and (kap is None or not kap.any()):
            return None
        value = torch.dot(g_flat, violation) - square * (self.beta / 2)
        linear = torch.dot(y.flatten().to(g_flat.dtype), g_flat)
        return (linear + (value - linear.detach())) / len(y)

    def moved(self, lam: Tensor, x: Tensor, kap: Tensor | None, g: Tensor, p: Tensor) -> Tensor:
        """The new lambda; all (batch, *features), `g` from `gradient` and `p` from above per sample."""
        if self.step == "gradient":
            return torch.add(lam, g - p, alpha=self.eta) if self.eta else lam
        scaled = torch.zeros_like(lam) if kap is None else kap / -self.beta  # a multiplier as the dual, scaled
        return STEPS[self.step](lam, x, scaled, p, self.beta, self.eta)

    def multiplier(self, kap: Tensor, x: Tensor, lam: Tensor) -> Tensor:
        """The new kappa; the old one while X - lambda is rounding, of which Adam would make whole steps later."""
        violation = x - lam
        if not self.sigma or rounding(squared(violation), x, squared(x)):
            return kap
        return torch.add(kap, violation, alpha=self.sigma * self.beta)

    def started(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """lambda and kappa after a serial pass with output `x` and gradient `p`.

        Warm, kappa is the gradient: with lambda = X that is where the multiplier comes to rest. Without kappa, lambda
        makes its first step.
        """
        if self.multiplies:
            return x, p if self.warm else 0 * p
        return (x - self.eta * p if self.warm else x), None


@dataclass(frozen=True)
class Phases:
    """Which epochs are serial: the first `serial` of a cycle, then `parallel` that are not.

    `repeat`: cycles follow one another (reading A); else one cycle, then serial epochs to the end (reading B).
    """

    serial: int = 0
    parallel: int = 1
    repeat: bool = True

    def __post_init__(self) -> None:
        if self.serial < 0 or self.parallel < 1:
            raise UserError(
                f"a cycle has at least 0 serial and 1 parallel epochs, got {self.serial} and {self.parallel}"
            )

    def serial_at(self, epoch: int) -> bool:
        """Whether this epoch is a serial one."""
        cycle = self.serial + self.parallel
        return epoch % cycle < self.serial if self.repeat else not self.serial <= epoch < cycle

    def records(self, epoch: int) -> bool:
        """Whether this epoch is the last serial one before a parallel phase."""
        return self.serial_at(epoch) and not self.serial_at(epoch + 1)

    def draw(self, epoch: int) -> int:
        """The epoch whose augmentation this one repeats: the one its lambdas were recorded in."""
        while epoch and not self.serial_at(epoch):
            epoch -= 1
        return epoch


ALL_PARALLEL = Phases()
