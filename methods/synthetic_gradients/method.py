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

from decoupled.coupling import Coupling, Half, Lower, Payload, Place, Top, Upper
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


def layers(a: int, hidden: int, b: int, spatial: bool) -> nn.Sequential:
    """From a channels to b, with one hidden layer or none (0): 3x3 convolutions, or linear."""

    def layer(a: int, b: int) -> nn.Module:
        return nn.Conv2d(a, b, 3, padding=1) if spatial else nn.Linear(a, b)

    between = [layer(a, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(*between, layer(hidden or a, b))


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
        self.layers = layers(features + classes, hidden, features, spatial)
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor, targets: Tensor) -> Tensor:
        """y: (batch, features) or (batch, channels, height, width); targets: (batch,)."""
        if self._classes:
            known = F.one_hot(targets, self._classes).to(y)
            y = torch.cat((y, known.reshape(*known.shape, *[1] * (y.dim() - 2)).expand(-1, -1, *y.shape[2:])), dim=1)
        return self.layers(y)


class _Guesses(Half):
    """Its guess of what comes as an answer learns from the answer: ||guess - answer||^2, the mean over samples."""

    awaits = "A"
    needs_data = learns_from_answers = True
    _guess: Tensor | None = None  # of the pass that waits for its answer, with its graph

    def answer(self, payload: Payload | None) -> None:
        if payload is not None and self._guess is not None:
            error = ((self._guess - payload[0].to(self._guess.device)) ** 2).sum() / len(self._guess)
            if error.isfinite():  # else one of the two is of a pass that a block has dropped
                error.backward()
        self._guess = None

    def clear(self) -> None:
        self._guess = None


class _Guess(_Guesses, Lower):
    """J_k = <y_k, s>, whose gradient for y_k is s = M_k(y_k); what comes from above trains M_k."""

    has_objective, replies = True, 1

    def __init__(self, place: Place, conditional: bool, hidden: int, lr: float) -> None:
        self.optimizer = adam(lr)
        shape = place.shapes[place.k]
        if len(shape) not in (1, 3):
            raise UserError(f"block{place.k} puts out {shape}; synthetic gradients are for features or images")
        self.module: Any = Synthesiser(shape[0], len(shape) == 3, place.shapes[-1][0] if conditional else 0, hidden)

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        assert data is not None
        guess = self.module(y.detach(), data.targets)
        self._guess = guess
        return (y * guess.detach()).sum()


class _Answers(Upper):
    replies = True


class _Made(_Guesses, _Answers):
    """The block's input is I_k(x); what comes from below trains I_k."""

    def __init__(self, place: Place, hidden: int, lr: float) -> None:
        self.optimizer = adam(lr)
        shape, due = place.inputs, place.shapes[place.k - 1]
        if len(shape) not in (1, 3) or len(due) not in (1, len(shape)):
            raise UserError(
                f"block{place.k} takes {due}, the network {shape}; synthetic inputs are features, or images made from "
                f"images; leave out inputs=true"
            )
        self.module: Any = input_model(shape, due, hidden)

    def receive(self, payload: Payload, data: Data | None) -> Tensor:
        assert data is not None and data.inputs is not None
        with torch.enable_grad():
            self._guess = made = self.module(data.inputs.to(next(self.module.parameters())))
        return made.detach()


def input_model(shape: tuple[int, ...], due: tuple[int, ...], hidden: int) -> nn.Module:
    """I_k: inputs of the network (features, or channels and space) -> inputs of block k, from layers as in M_k."""
    channels, *space = due
    if space:
        return nn.Sequential(nn.AdaptiveAvgPool2d(tuple(space)), layers(shape[0], hidden, channels, True))
    return nn.Sequential(nn.Flatten(), layers(math.prod(shape), hidden, channels, False))


def adam(lr: float) -> MakeOptimizer | None:
    """Adam with this learning rate; 0: the optimizer of the blocks."""
    return partial(torch.optim.Adam, lr=lr) if lr else None


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
