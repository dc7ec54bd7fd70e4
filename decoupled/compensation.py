"""Corrections of gradients and steps. `D`: own updates of delay of the block (`Site.delay`).

w, w'  weights of the block now and one update ago      lr, m  learning rate and momentum of its optimizer
w_F    weights of the forward that g belongs to         v      momentum buffer after the step, m v + g

name                 acts on   equation                                                        source
delay_compensation   B         g + strength * M g * g * (w - w_F)                              Zheng 2017
gap_aware            B         g / (1 + ||w - w_F|| / average ||w - w'||), per tensor          Barkai 2020
                               (with a lookahead w is today's look-ahead point, as w_F is an older one)
spike_compensation   S         w - lr (a v + b g),   a = m ** D,  b = (1 - m ** D) / (1 - m)   Kosson 2021
rescale              S         lr / max(1, D) ** (1 - min(t / anneal, 1))                      Yang 2021 (T1)
clip                 S         g * min(1, limit / ||g||), over all gradients of the block      -
clip_global          S         the same, with the norm of the whole network some batches ago   -
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD

from decoupled.correction import Correction, Gradients, Site, Weights, named
from decoupled.errors import UserError
from decoupled.prediction import Remembers, applied, below_one


@named("delay_compensation")
@dataclass(frozen=True)
class DelayCompensation(Correction):
    """First-order estimate of the gradient at today's weights; g * g stands for the diagonal of the Hessian.

    Of M passes that make one update each brings a share g of 1 / M: its estimate is that share of (M g) * (M g).
    """

    needs: ClassVar[str] = "stale"

    strength: float = 0.1

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise UserError(f"delay compensation needs a strength of at least 0, got {self.strength}")

    def at(self, site: Site) -> Correction | None:
        return _Taylor(self.strength * site.passes) if site.delay else None


class _Taylor(Correction):
    def __init__(self, factor: float) -> None:
        self._factor = factor

    def gradients(self, grads: Gradients, then: Weights, now: Weights) -> Gradients:
        rows = zip(grads, then, now, strict=True)
        return [None if g is None else g + self._factor * g * g * (new - old) for g, old, new in rows]


@named("gap_aware")
@dataclass(frozen=True)
class GapAware(Correction):
    """Divides a gradient by how many usual steps the weights have moved since its forward, plus one.

    Attributes:
        decay: of the moving average of the length of a step.
    """

    needs: ClassVar[str] = "stale"

    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"gap-aware scaling needs a decay in [0, 1), got {self.decay}")

    def at(self, site: Site) -> Correction | None:
        return _Gap(site, self.decay) if site.delay else None


class _Gap(Remembers):
    def __init__(self, site: Site, decay: float) -> None:
        super().__init__(site)
        self._decay, self._count = decay, 0
        self._lengths = [torch.zeros((), dtype=p.dtype, device=p.device) for p in site.trainable]

    def gradients(self, grads: Gradients, then: Weights, now: Weights) -> Gradients:
        scale = 1 - self._decay**self._count  # the average starts at 0
        rows = zip(grads, then, now, self._lengths, strict=True)
        return [None if g is None else g / self._gap(new - old, length, scale) for g, old, new, length in rows]

    def _gap(self, moved: Tensor, length: Tensor, scale: float) -> Tensor | float:
        return 1 + moved.norm() * scale / length if length > 0 else 1.0

    def settle(self) -> None:
        super().settle()
        assert self.change is not None
        self._count += 1
        for length, change in zip(self._lengths, self.change, strict=True):
            length.mul_(self._decay).add_(change.norm(), alpha=1 - self._decay)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"lengths": self._lengths, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._lengths, self._count = self.placed(state["lengths"]), state["count"]


@named("spike_compensation")
@dataclass(frozen=True)
class SpikeCompensation(Correction):
    """Applies at once what momentum without delay would have applied of this gradient by now.

    Attributes:
        scale: times the delay (2 is the overcompensation of the paper).
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise UserError(f"spike compensation needs a scale of at least 0, got {self.scale}")

    def at(self, site: Site) -> Correction | None:
        if not site.delay or site.optimizer is None:
            return None
        groups = site.optimizer.param_groups
        if not isinstance(site.optimizer, SGD) or any(g["dampening"] or g["nesterov"] for g in groups):
            raise UserError(
                "spike compensation is written for SGD with momentum, without dampening and nesterov, got "
                f"{type(site.optimizer).__name__}; use that, or leave it out"
            )
        below_one(site.optimizer, "spike compensation")
        return _Spike(site, self.scale * site.delay)


class _Spike(Correction):
    def __init__(self, site: Site, late: float) -> None:
        self._optimizer, self._late = site.optimizer, late
        self._gradients: list[tuple[Tensor, dict[str, Any], Tensor]] = []

    def before_step(self) -> None:
        assert self._optimizer is not None
        self._gradients = [
            (p, group, applied(p, group))
            for group in self._optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and group["momentum"]
        ]

    def after_step(self) -> None:
        """The step was w - lr v; make it w - lr (a v + b g)."""
        assert self._optimizer is not None
        with torch.no_grad():
            for p, group, g in self._gradients:
                m, v = group["momentum"], self._optimizer.state[p]["momentum_buffer"]
                a = m**self._late
                p.add_((1 - a) * v - (1 - a) / (1 - m) * g, alpha=group["lr"])
        self._gradients = []


class _Rated(Correction):
    """Steps with another learning rate, which is put back before schedulers see it."""

    def __init__(self, site: Site, anneal: int) -> None:
        self._site, self._anneal, self._t = site, anneal, 0
        self._rates: list[Any] = []
        site.rates.append(self.rate)

    def rate(self) -> float:
        power = 1 - min(self._t / self._anneal, 1) if self._anneal else 1.0
        return 1 / max(1.0, self._site.delay) ** power

    def before_step(self) -> None:
        assert self._site.optimizer is not None
        self._rates = [group["lr"] for group in self._site.optimizer.param_groups]
        for group in self._site.optimizer.param_groups:
            group["lr"] = group["lr"] * self.rate()

    def settle(self) -> None:
        assert self._site.optimizer is not None
        for group, rate in zip(self._site.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self._t += 1

    def state_dict(self) -> dict[str, Any]:
        return {"t": self._t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._t = state["t"]


@named("rescale")
@dataclass(frozen=True)
class Rescale(Correction):
    """Small steps where gradients are late: the learning rate divided by the delay, fading over `anneal` own updates.

    Attributes:
        anneal: own updates until the full rate; 0: never.
    """

    anneal: int = 0

    def __post_init__(self) -> None:
        if self.anneal < 0:
            raise UserError(f"rescaling fades over at least 0 updates, got {self.anneal}")

    def at(self, site: Site) -> Correction | None:
        return _Rated(site, self.anneal) if site.delay > 1 and site.optimizer is not None else None


@named("clip")
@dataclass(frozen=True)
class Clip(Correction):
    """Clips the gradient of the block as a whole to norm `limit` before every step."""

    about_delay: ClassVar[bool] = False

    limit: float

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise UserError(f"clipping needs a positive limit, got {self.limit}")

    def at(self, site: Site) -> Correction | None:
        return _Clipping(site, self.limit)


class _Clipping(Correction):
    def __init__(self, site: Site, limit: float) -> None:
        self._parameters, self._limit = site.trainable, limit

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, self._limit)


@named("clip_global")
@dataclass(frozen=True)
class ClipGlobal(Correction):
    """Clips by the norm of the whole network's gradient, as it was when the news of it had gone round.

        down   S_k = ||g_k||^2 of the latest step + S_{k+1}      up   T = S_0
        g_k <- g_k min(1, limit / sqrt(max(T, ||g_k||^2)))

    One block alone is clipped by its norm of now. `limit`: the norm to clip to.
    """

    about_delay: ClassVar[bool] = False
    needs: ClassVar[str] = "gradient"

    limit: float

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise UserError(f"clipping needs a positive limit, got {self.limit}")

    def at(self, site: Site) -> Correction | None:
        return _GlobalNorm(site, self.limit)


class _GlobalNorm(Correction):
    def __init__(self, site: Site, limit: float) -> None:
        self._parameters, self._limit, self._bottom = site.trainable, limit, site.k == 0
        self._own = self._above = self._total = 0.0  # squared norms

    def tell(self, way: str) -> float:
        return self._total if way == "up" else self._own + self._above

    def hear(self, way: str, number: float) -> None:
        if way == "down":
            self._above = number
        if way == "up" or self._bottom:
            self._total = number + (self._own if self._bottom else 0.0)

    def clip(self) -> None:
        grads = [p.grad for p in self._parameters if p.grad is not None]
        self._own = float(torch.nn.utils.get_total_norm(grads)) ** 2 if grads else 0.0
        scale = self._limit / (max(self._total, self._own) ** 0.5 + 1e-6)
        for grad in grads:
            grad.mul_(min(1.0, scale))

    def state_dict(self) -> dict[str, Any]:
        return {"own": self._own, "above": self._above, "total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._own, self._above, self._total = state["own"], state["above"], state["total"]
