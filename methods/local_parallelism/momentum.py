"""Momentum auxiliary networks: a block's head begins with the first layer of the block above, in two versions.

    u       first unit of block k+1, whose weights w_u come down after every pass
    e_k     a copy of u whose weights follow:  e_k <- m e_k + (1 - m) w_u   (the first time e_k <- w_u); not trained
    b_k     a copy of u with weights of block k's own, trained with its head
    J_k   = L(head_k(b_k(y_k) + e_k(y_k)), target)

A block has a plain head where there is no such layer: below a last block that is the output unit alone, or where u has
no weights. Copies start with new weights and hold no dropout; their running statistics are their own.

Source: Su et al. 2024.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from decoupled import heads
from decoupled.coupling import Coupling, LocalHead, Lower, Payload, Place, Top, Upper
from decoupled.messages import Data
from decoupled.methods.local_parallelism.auxiliary import renewed, shapes
from decoupled.order import Order
from decoupled.plan import Op, S


def _answered(k: int, K: int) -> Iterator[Op]:
    for n in itertools.count():
        yield from (Op("F", n), Op("B", n), S, Op("A", n))


answered = Order("answered", _answered)  # like `local`, and the weights from above are taken before the next pass


@dataclass(frozen=True)
class Momentum(Coupling):
    """Activation up; weights of the first unit down, to be averaged and used in the objective below."""

    momentum: float
    head: str
    down: tuple[str, ...] = field(default=("weights",), init=False)
    down_like_up: bool = field(default=False, init=False)

    def lower(self, place: Place) -> Lower:
        if place.top:
            return Top(place)
        if not place.modules:  # only the times of a network are known (decoupled.simulate): it waits everywhere
            half = LocalHead(place, self.head)
            half.awaits, half.replies = "A", 1
            return half
        unit = first_unit(place, place.k + 1)
        return LocalHead(place, self.head) if unit is None else MomentumHead(place, self.head, self.momentum, unit)

    def upper(self, place: Place) -> Upper:
        unit = first_unit(place, place.k) if place.modules else nn.Identity()
        return Upper() if unit is None else SendWeights(unit)


def first_unit(place: Place, k: int) -> nn.Module | None:
    """The first unit of block `k`, unless it has no weights or is the output of the network."""
    units = list(place.modules[k].children())
    if not units or (k == place.K - 1 and len(units) == 1) or next(units[0].parameters(), None) is None:
        return None
    return units[0]


def flat(module: nn.Module) -> Tensor:
    """A copy of all weights in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class SendWeights(Upper):
    """Replies with the weights of a unit, as they are before the step of the pass."""

    replies, differentiates = True, False

    def __init__(self, unit: nn.Module) -> None:
        self._unit = unit

    def reply_with(self, gradient: Tensor | None, x: Tensor, y: Tensor, heard: Payload) -> Payload:
        return (flat(self._unit),)


class MomentumHead(LocalHead):
    """A head on the sum of a trained layer and one that follows the block above."""

    def __init__(self, place: Place, head: str, momentum: float, unit: nn.Module) -> None:
        super().__init__(place, head, own=False)
        self.has_objective, self.awaits, self.replies = True, "A", 1
        self._momentum, self._heard = momentum, False
        self._bias, self._follower = renewed(unit, place.k + 1), renewed(unit, place.k + 1).requires_grad_(False)
        self._head = heads.build(head, shapes([unit], place.shapes[place.k])[-1], place.shapes[-1])
        self.module = nn.ModuleList([self._bias, self._follower, self._head])

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        assert data is not None and data.targets is not None
        return self._loss(self._head(self._bias(y) + self._follower(y)), data.targets)

    def answer(self, payload: tuple[Tensor, ...] | None) -> None:
        if payload is None:
            return
        m, start = self._momentum if self._heard else 0.0, 0
        for p in self._follower.parameters():
            news = payload[0][start : start + p.numel()].to(p.device).view_as(p)
            p.copy_(m * p + (1 - m) * news)
            start += p.numel()
        self._heard = True

    def state_dict(self) -> dict[str, Any]:
        return {"heard": self._heard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._heard = state["heard"]
