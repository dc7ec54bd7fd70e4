"""Synthetic gradients: a small network beside each block guesses the gradient, and learns from the one that comes.

    name               coupling    order      retention     what block k < K-1 takes for the gradient of its output y_k
    dni                Synthetic   answered   KeepNothing   s = M_k(y_k), conditional: M_k(y_k, one-hot targets)
    dni, inputs=true   the same    the same   the same      the same, and for its input I_k(x), k > 0, x of the network

    F n, B n, S    step with s[n]; Down: d[n] = vjp_x(f_k, s[n])        nobody waits for the blocks above
    A n            the answer from above: M_k steps on ||M_k(y_k[n]) - d_above[n]||^2, the mean over samples;
                   inputs: the answer from below: I_k steps on ||I_k(x[n]) - y_{k-1}[n]||^2

The edge updates twice per batch: the block with the guess, then the guess with the answer, which is itself a guess of
the block above (the true gradient at the top). With synthetic inputs nobody waits for the blocks below either.

Source: Jaderberg et al. 2017 (arXiv 1608.05343).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.coupling import Coupling, Lower, Payload, Place, Top, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.method import ALL_LOCKS, Facts, Method, own
from decoupled.order import answered
from decoupled.registry import register
from decoupled.retention import KeepNothing
from decoupled.steps import MakeOptimizer


@register("dni")
def dni(
    conditional: bool = False, hidden: int = 0, lr: float = 3e-5, inputs: bool = False, input_lr: float = 1e-3
) -> Method:
    """Decoupled neural interfaces; `conditional`: the guess knows the targets (cDNI); `hidden`: width, 0 is linear.

    `inputs`: blocks above the first guess their inputs, too (the full unlock). `lr`, `input_lr`: of Adam for the
    guesses of gradients and of inputs; 0: they have the optimizer of the blocks.
    """
    if min(hidden, lr, input_lr) < 0:
        raise UserError(f"hidden, lr and input_lr must be at least 0, got {hidden}, {lr} and {input_lr}")
    locks = ALL_LOCKS if inputs else ("backward", "update")
    facts = Facts(exact=False, reach=own, surrogate=True, locks=locks)
    return Method(Synthetic(conditional, hidden, lr, input_lr, inputs), answered, facts, KeepNothing)


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
        self.optimizer = adam(lr)
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

    def answer(self, payload: Payload | None) -> None:
        if payload is not None and self._guess is not None:
            learn(self._guess, payload[0])
        self._guess = None

    def clear(self) -> None:
        self._guess = None


class _Answers(Upper):
    replies = True


class _Made(_Answers):
    """The block's input is I_k(x); what comes from below trains I_k."""

    awaits = "A"
    needs_data = learns_from_answers = True

    def __init__(self, place: Place, hidden: int, lr: float) -> None:
        self.optimizer = adam(lr)
        shape, due = place.inputs, place.shapes[place.k - 1]
        if len(shape) not in (1, 3) or len(due) not in (1, len(shape)):
            raise UserError(
                f"block{place.k} takes {due}, the network {shape}; synthetic inputs are features, or images made from "
                f"images; leave out inputs=true"
            )
        self.module: Any = input_model(shape, due, hidden)
        self._made: Tensor | None = None  # of the pass that waits for its answer, with its graph

    def receive(self, payload: Payload, data: Data | None) -> Tensor:
        assert data is not None and data.inputs is not None
        with torch.enable_grad():
            self._made = made = self.module(data.inputs.to(next(self.module.parameters())))
        return made.detach()

    def answer(self, payload: Payload | None) -> None:
        if payload is not None and self._made is not None:
            learn(self._made, payload[0])
        self._made = None

    def clear(self) -> None:
        self._made = None


def input_model(shape: tuple[int, ...], due: tuple[int, ...], hidden: int) -> nn.Module:
    """I_k: inputs of the network (features, or channels and space) -> inputs of block k, from layers as in M_k."""
    channels, *space = due
    if space:
        resize, first = nn.AdaptiveAvgPool2d(tuple(space)), shape[0]
    else:
        resize, first = nn.Flatten(), math.prod(shape)

    def layer(a: int, b: int) -> nn.Module:
        return nn.Conv2d(a, b, 3, padding=1) if space else nn.Linear(a, b)

    between = [layer(first, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(resize, *between, layer(hidden or first, channels))


def adam(lr: float) -> MakeOptimizer | None:
    """Adam with this learning rate; 0: the optimizer of the blocks."""
    return partial(torch.optim.Adam, lr=lr) if lr else None


def learn(guess: Tensor, truth: Tensor) -> None:
    """Leave the gradients of ||guess - truth||^2, the mean over samples, in what made the guess."""
    error = ((guess - truth.to(guess.device)) ** 2).sum() / len(guess)
    if error.isfinite():  # else one of the two is of a pass that a block has dropped
        error.backward()


@dataclass(frozen=True)
class Synthetic(Coupling):
    """Activation up; down the gradient that the block above has worked with, for its input."""

    conditional: bool
    hidden: int
    lr: float
    input_lr: float
    substitutes: bool  # blocks guess their inputs, too
    down = ("gradient",)

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else _Guess(place, self.conditional, self.hidden, self.lr)

    def upper(self, place: Place) -> Upper:
        return _Made(place, self.hidden, self.input_lr) if self.substitutes else _Answers()
