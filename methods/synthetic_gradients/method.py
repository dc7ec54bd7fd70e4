"""Synthetic gradients: a small network beside each block guesses the gradient, and learns from the one that comes.

    name   coupling             order      retention     what block k < K-1 takes for the gradient of its output y_k
    dni    Synthetic(targets)   answered   KeepNothing   s = M_k(y_k), conditional: M_k(y_k, one-hot targets)

    F n, B n, S    step with s[n]; Down: d[n] = vjp_x(f_k, s[n])        nobody waits for the blocks above
    A n            the answer from above: M_k steps on ||M_k(y_k[n]) - d_above[n]||^2, the mean over samples

The edge updates twice per batch: the block with the guess, then the guess with the answer, which is itself a guess of
the block above (the true gradient at the top).

Source: Jaderberg et al. 2017 (arXiv 1608.05343).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.coupling import Coupling, Lower, Place, Top, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.method import Facts, Method, own
from decoupled.order import answered
from decoupled.registry import register
from decoupled.retention import KeepNothing


@register("dni")
def dni(conditional: bool = False, hidden: int = 0, lr: float = 3e-5) -> Method:
    """Decoupled neural interfaces; `conditional`: the guess knows the targets (cDNI); `hidden`: width, 0 is linear.

    `lr`: of Adam for the synthesisers; 0: they have the optimizer of the blocks.
    """
    if hidden < 0 or lr < 0:
        raise UserError(f"hidden and lr must be at least 0, got {hidden} and {lr}")
    facts = Facts(exact=False, reach=own, surrogate=True, locks=("backward", "update"))
    return Method(Synthetic(conditional, hidden, lr), answered, facts, KeepNothing)


class Synthesiser(nn.Module):
    """M_k: from an output of the block to a guess of its gradient, of the same shape; zero at first.

    Args:
        features: channels, or features, of the output.
        spatial: whether it has a height and a width (3x3 convolutions), or none (linear layers).
        classes: number of classes the guess is conditioned on, 0: none.
        hidden: channels of a hidden layer, 0: none.
    """

    def __init__(self, features: int, spatial: bool, classes: int, hidden: int) -> None:
        super().__init__()
        self._classes = classes

        def layer(a: int, b: int) -> nn.Conv2d | nn.Linear:
            return nn.Conv2d(a, b, 3, padding=1) if spatial else nn.Linear(a, b)

        first = [layer(features + classes, hidden), nn.ReLU()] if hidden else []
        last = layer(hidden or features + classes, features)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*first, last)

    def forward(self, y: Tensor, targets: Tensor) -> Tensor:
        """y: (batch, features) or (batch, channels, height, width); targets: (batch,)."""
        if self._classes:
            known = F.one_hot(targets, self._classes).to(y)
            y = torch.cat((y, known.reshape(*known.shape, *[1] * (y.dim() - 2)).expand(-1, -1, *y.shape[2:])), dim=1)
        return self.layers(y)


class _Guess(Lower):
    """J_k = <y_k, s>, whose gradient for y_k is s; an answer trains the synthesiser."""

    has_objective = needs_data = learns_from_answers = True
    awaits, replies = "A", 1

    def __init__(self, place: Place, conditional: bool, hidden: int, lr: float) -> None:
        self.optimizer = partial(torch.optim.Adam, lr=lr) if lr else None
        shape = place.shapes[place.k]
        if len(shape) not in (1, 3):
            raise UserError(f"block{place.k} puts out {shape}; synthetic gradients are for features or images")
        self.module: Any = Synthesiser(shape[0], len(shape) == 3, place.shapes[-1][0] if conditional else 0, hidden)
        self._guess: Tensor | None = None  # of the pass that waits for its answer, with its graph

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        assert data is not None
        guess = self.module(y.detach(), data.targets)
        self._guess = guess
        return (y * guess.detach()).sum()

    def answer(self, payload: tuple[Tensor, ...] | None) -> None:
        if payload is not None and self._guess is not None:
            ((self._guess - payload[0].to(self._guess.device)) ** 2).sum().div(len(self._guess)).backward()
        self._guess = None

    def clear(self) -> None:
        self._guess = None


class _Answers(Upper):
    replies = True


@dataclass(frozen=True)
class Synthetic(Coupling):
    """Activation up; down the gradient that the block above has worked with, for its input."""

    conditional: bool
    hidden: int
    lr: float
    down = ("gradient",)

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else _Guess(place, self.conditional, self.hidden, self.lr)

    def upper(self, place: Place) -> Upper:
        return _Answers()
