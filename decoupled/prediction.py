"""Corrections of weights: run a pass with other weights than today's. `D`: own updates of delay (`Site.delay`).

    w, w'  weights of the block now and one update ago      lr  learning rate of its optimizer
    v      what the optimizer's next step is expected to be, per unit of lr (see `motion`)

    name                in the        equation                                                           source
    linear_prediction   F             w - lr D v, or w + D (w - w')                                      Kosson 2021
    lookahead           F, B, S       w + gamma (w - w'); 1 - gamma times the step, plus gamma (w - w')  Ajanthan 2025
    discrepancy         B             w - D d,   d <- c d + (1 - c)(w - w'),   c = decay ** (1 / D)      Yang 2021 (T2)

What they see and return are copies: no live weight is touched outside of the optimizer step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from decoupled.correction import Correction, Site, Weights, named
from decoupled.errors import UserError

FORMS = ("velocity", "weight", "coasting")


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The parameter group with the options of `parameter`."""
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def applied(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient as SGD puts it into its momentum: descending, with the weight decay."""
    assert parameter.grad is not None
    gradient = -parameter.grad if group["maximize"] else parameter.grad
    return gradient + group["weight_decay"] * parameter.detach()


def motion(site: Site, parameter: Tensor, last: Tensor | None = None) -> Tensor | None:
    """lr * v: by how much the next step is expected to lower `parameter`, read from its optimizer's state.

    SGD: lr * momentum buffer, or `last`, the last gradient, where there is no momentum. Adam, AdamW:
    lr * m^ / (sqrt(v^) + eps), and the decoupled decay. None: no state yet.
    """
    assert site.optimizer is not None
    group, state = group_of(site.optimizer, parameter), site.optimizer.state.get(parameter, {})
    lr = group["lr"] * math.prod(rate() for rate in site.rates)
    if isinstance(site.optimizer, SGD):
        v = state.get("momentum_buffer") if group["momentum"] else last
        return None if v is None else lr * v
    if not state:
        return None
    beta1, beta2 = group["betas"]
    t = float(state["step"])
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    step = state["exp_avg"] / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group["eps"])
    decay = group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0
    return lr * (step + decay * parameter.detach())


def below_one(optimizer: Optimizer, who: str) -> None:
    """Raise UserError for SGD whose momentum never runs out: 1 or more."""
    if any(group["momentum"] >= 1 for group in optimizer.param_groups):
        raise UserError(f"{who} needs SGD with a momentum below 1; lower it, or leave the correction out")


class Remembers(Correction):
    """Knows the last change of every trainable parameter: `change` = w - w' (None before the first step)."""

    def __init__(self, site: Site) -> None:
        self.site, self.change, self._before = site, None, None
        self.change: list[Tensor] | None
        self._before: list[Tensor] | None

    def before_step(self) -> None:
        self._before = [p.detach().clone() for p in self.site.trainable]

    def settle(self) -> None:
        assert self._before is not None
        self.change = [p.detach() - old for p, old in zip(self.site.trainable, self._before, strict=True)]
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.change is None else {"change": self.change}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.change = self.placed(state["change"]) if "change" in state else None

    def placed(self, tensors: list[Any]) -> list[Any]:
        """Loaded tensors (or None), one per trainable parameter, on the devices of those."""
        return [None if t is None else t.to(p.device) for t, p in zip(tensors, self.site.trainable, strict=True)]

    def moved(self, weights: Weights, by: list[Tensor] | None, factor: float) -> Weights:
        """weights + factor * by, for the trainable ones among them."""
        if by is None or factor == 0:
            return weights
        steps = iter(by)
        pairs = zip(weights, self.site.parameters, strict=True)
        return [w.detach() + factor * next(steps) if p.requires_grad else w for w, p in pairs]


@dataclass(frozen=True)
class Prediction(Correction):
    """Runs a forward (and a recomputed backward) with the weights that are expected some updates later.

    Attributes:
        form: "velocity" (the optimizer goes on as it moves), "weight" (the last change goes on; any optimizer), or
            "coasting" (SGD's momentum runs out, as if no gradient came any more).
    """

    moves_forward: ClassVar[bool] = True

    form: str = "velocity"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"prediction has no form {self.form!r}; use one of {', '.join(FORMS)}")

    def horizon(self, site: Site) -> tuple[float, float]:
        """Updates to look ahead in the forward, and in the backward."""
        return site.delay, 0.0

    def moves(self, site: Site) -> bool:
        return any(self.horizon(site))

    def at(self, site: Site) -> Correction | None:
        if site.optimizer is None or not self.moves(site):
            return None
        read = {"velocity": (SGD, Adam), "coasting": (SGD,), "weight": (object,)}[self.form]
        if not isinstance(site.optimizer, read):
            raise UserError(
                f"prediction in the form {self.form!r} cannot read the momentum of {type(site.optimizer).__name__}; "
                "use form: weight"
            )
        if self.form == "coasting":
            below_one(site.optimizer, "prediction in the form 'coasting'")
        return _Predicting(site, self.form, *self.horizon(site))


class _Predicting(Remembers):
    def __init__(self, site: Site, form: str, ahead: float, ahead_backward: float) -> None:
        super().__init__(site)
        self._form, self._ahead, self._ahead_backward = form, ahead, ahead_backward
        self._last: list[Tensor | None] = [None] * len(site.trainable)  # gradients of what has no momentum

    def before_step(self) -> None:
        if self._form == "weight":
            super().before_step()
        elif self._form == "velocity" and isinstance(self.site.optimizer, SGD):
            for n, p in enumerate(self.site.trainable):
                if p.grad is not None and not (group := group_of(self.site.optimizer, p))["momentum"]:
                    self._last[n] = applied(p, group)

    def settle(self) -> None:
        if self._form == "weight":
            super().settle()

    def forward(self, weights: Weights) -> Weights:
        return self._predicted(weights, self._ahead)

    def backward(self, weights: Weights) -> Weights:
        return self._predicted(weights, self._ahead_backward)

    def _predicted(self, weights: Weights, ahead: float) -> Weights:
        if self._form == "weight":
            return self.moved(weights, self.change, ahead)
        by = [self._expected(p, last, ahead) for p, last in zip(self.site.trainable, self._last, strict=True)]
        return self.moved(weights, by, -1.0)

    def _expected(self, parameter: Tensor, last: Tensor | None, ahead: float) -> Tensor:
        """By how much `ahead` steps are expected to lower `parameter`."""
        assert self.site.optimizer is not None
        if self._form == "coasting":
            m = group_of(self.site.optimizer, parameter)["momentum"]
            ahead = (m - m ** (ahead + 1)) / (1 - m)
        found = motion(self.site, parameter, last)
        return torch.zeros_like(parameter) if found is None else ahead * found

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._last = self.placed(state.get("last", self._last))  # states of 0.1.0 have none


@named("linear_prediction")
@dataclass(frozen=True)
class LinearPrediction(Prediction):
    """Looks `scale` times the delay ahead in the forward."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale < 0:
            raise UserError(f"prediction looks at least 0 times the delay ahead, got scale {self.scale}")

    def horizon(self, site: Site) -> tuple[float, float]:
        return self.scale * site.delay, 0.0


@named("lookahead")
@dataclass(frozen=True)
class Lookahead(Correction):
    """Nesterov's point w + gamma (w - w') in every pass, and a step that goes on from it; off in one block.

    Attributes:
        gamma: in [0, 1); 0 is off. The optimizer's step is multiplied by 1 - gamma (for plain SGD: the gradient, as in
            the paper); an optimizer with momentum has two then.
        adaptive: gamma grows towards 0.99 with the delay: gamma + D (0.99 - gamma) / K.
    """

    moves_forward: ClassVar[bool] = True

    gamma: float = 0.9
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise UserError(f"the look-ahead needs a gamma in [0, 1), got {self.gamma}")

    def moves(self, site: Site) -> bool:
        return site.K > 1 and self.gamma > 0

    def at(self, site: Site) -> Correction | None:
        more = site.delay * (0.99 - self.gamma) / site.K if self.adaptive else 0.0
        acts = self.moves(site) and site.optimizer is not None
        return _Ahead(site, self.gamma + more) if acts else None


class _Ahead(Remembers):
    shares: ClassVar[bool] = True

    def __init__(self, site: Site, gamma: float) -> None:
        super().__init__(site)
        self._gamma = gamma

    def forward(self, weights: Weights) -> Weights:
        return self.moved(weights, self.change, self._gamma)

    backward = forward

    def wanted(self, weights: Weights) -> Weights:
        if self.change is None:
            return weights
        return [w + self._gamma * change for w, change in zip(weights, self.change, strict=True)]

    def after_step(self) -> None:
        assert self._before is not None
        with torch.no_grad():
            for n, (p, old) in enumerate(zip(self.site.trainable, self._before, strict=True)):
                p.lerp_(old, self._gamma)
                if self.change is not None:
                    p.add_(self.change[n], alpha=self._gamma)


@named("discrepancy")
@dataclass(frozen=True)
class Discrepancy(Correction):
    """A backward over an estimate of the weights of its forward: today's, minus D average changes."""

    needs: ClassVar[str] = "today"

    decay: float = 0.135

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"discrepancy correction needs a decay in [0, 1), got {self.decay}")

    def moves(self, site: Site) -> bool:
        return site.delay > 0

    def at(self, site: Site) -> Correction | None:
        return _Drift(site, self.decay) if self.moves(site) and site.optimizer is not None else None


class _Drift(Remembers):
    def __init__(self, site: Site, decay: float) -> None:
        super().__init__(site)
        self._average, self._keep = [torch.zeros_like(p) for p in site.trainable], decay ** (1 / site.delay)

    def backward(self, weights: Weights) -> Weights:
        return self.moved(weights, self._average, -self.site.delay)

    def settle(self) -> None:
        super().settle()
        assert self.change is not None
        for average, change in zip(self._average, self.change, strict=True):
            average.mul_(self._keep).add_(change, alpha=1 - self._keep)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._average = self.placed(state["average"])
