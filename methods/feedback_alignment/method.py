"""Feedback alignment: fixed random matrices in the place of the transposed weights that a gradient would come through.

    name   coupling          order         retention     what block k < K-1 takes for the gradient of its output y_k
    fa     Gradient          sync          KeepGraph     what comes down, through a fixed matrix per layer: `feedback`
    dfa    DirectError       one_f_one_b   KeepGraph     B_k e,   e = dL/d(output of the network), handed down unchanged
    drtp   RandomTarget      local         KeepNothing   B_k t,   t = one-hot targets; nothing comes down

    e, t  (batch, classes)      B_k  (classes, features of y_k), fixed, uniform, drawn from the seed

The top block follows the true loss. With dfa and drtp the chain rule holds inside of a block, with the block's own
weights; fa replaces the weights of every layer on the way back, in all blocks.

Sources: Lillicrap et al. 2016 (arXiv 1411.0247); Nokland 2016 (arXiv 1609.01596); Frenkel, Lefebvre and Bol 2021
(DRTP).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.coupling import Coupling, Gradient, Lower, Payload, Place, Top, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.method import ALL_LOCKS, Facts, Method, late, own, top
from decoupled.methods.feedback_alignment.feedback import RandomFeedback
from decoupled.order import local, one_f_one_b, sync
from decoupled.registry import register
from decoupled.retention import KeepGraph, KeepInputAndWeights, KeepNothing
from decoupled.sample_losses import mean


@register("fa")
def fa(signs: bool = False) -> Method:
    """Feedback alignment: gradients go back through fixed random matrices; `signs`: with the signs of the weights."""
    return Method(Gradient(), sync, Facts(exact=False, reach=top, surrogate=True), corrections=(RandomFeedback(signs),))


@register("dfa")
def dfa(recompute: bool = False) -> Method:
    """Direct feedback alignment: the error of the output reaches every block through a fixed random matrix."""
    return Method(DirectError(), one_f_one_b, late(1, surrogate=True), KeepInputAndWeights if recompute else KeepGraph)


@register("drtp")
def drtp() -> Method:
    """Direct random target projection: fixed random projections of the targets train every block in its forward."""
    facts = Facts(exact=False, reach=own, surrogate=True, locks=ALL_LOCKS)
    return Method(RandomTarget(), local, facts, KeepNothing)


class _Projection:
    """B_k: (batch, classes) -> the shape of the block's output; Kaiming uniform over the classes."""

    def __init__(self, place: Place) -> None:
        self._shape, self.classes = place.shapes[place.k], math.prod(place.shapes[-1])
        bound = math.sqrt(3 / self.classes)
        self._matrix = (2 * torch.rand(self.classes, math.prod(self._shape)) - 1) * bound

    def __call__(self, signal: Tensor) -> Tensor:
        self._matrix = self._matrix.to(signal)
        return (signal.flatten(1) @ self._matrix).unflatten(1, self._shape)


class _TakesError(Lower):
    awaits, replies = "B", 1

    def __init__(self, place: Place) -> None:
        self._projection = _Projection(place)

    def pull(self, payload: tuple[Tensor, ...]) -> Tensor:
        return self._projection(payload[0])


class _HandsOn(Upper):
    replies, differentiates = True, False

    def reply_with(self, gradient: Tensor | None, x: Tensor, y: Tensor, heard: Payload) -> Payload:
        return heard


class DirectError(Coupling):
    """Activation up; the gradient of the loss for the network's output down, the same for every block."""

    down = ("error",)
    down_like_up = False
    linear = True

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else _TakesError(place)

    def upper(self, place: Place) -> Upper:
        return _HandsOn()


class _Projected(Lower):
    """J_k = <y_k, B_k t> / batch, whose gradient for y_k is B_k t / batch whatever y_k is; samples may have weights."""

    has_objective = needs_data = True

    def __init__(self, place: Place) -> None:
        self._projection = _Projection(place)

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        assert data is not None and data.targets is not None
        if data.targets.dtype.is_floating_point or data.targets.dim() != 1:
            raise UserError(
                f"random target projection needs class numbers, got targets {tuple(data.targets.shape)} of "
                f"{data.targets.dtype}; use another method"
            )
        signal = F.one_hot(data.targets, self._projection.classes).to(y)
        return mean((y * self._projection(signal)).flatten(1).sum(1), data)


class RandomTarget(Coupling):
    """Activation up, nothing down: every block but the last follows a fixed random projection of the targets."""

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else _Projected(place)

    def upper(self, place: Place) -> Upper:
        return Upper()
