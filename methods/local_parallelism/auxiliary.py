"""Auxiliary networks made of the network's own later layers (AugLocal).

    block k ends with unit l of the units 0 .. L-1 below the output unit; its auxiliary network has d_k layers:

    copies, initialised anew, of units  round(l + (L - l - 1) i / d_k),  i = 1 .. d_k     (all that are left, if fewer)
    then a head `auto` to the shape of the network's output

    d_k = max(1, round(depth (1 - t) + t)),   t = decline k / (K - 2)          less depth towards the top

A unit that expects another shape than it is given gets an adapter in front: pool to its height and width and a 1x1
convolution without bias to its channels, each where these differ, or one linear layer. Every copy, adapter and head is
the block's own.

Source: Ma, Wu, Si and Tan 2024.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from decoupled import heads
from decoupled.coupling import Coupling, LocalHead, Lower, Place, Top, Upper
from decoupled.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Augmented(Coupling):
    """Activation up, nothing down; J_k is read through layers like those to come."""

    depth: int
    decline: float
    down: tuple[str, ...] = field(default=(), init=False)

    def lower(self, place: Place) -> Lower:
        if place.top:
            return Top(place)
        half = LocalHead(place, "auto", own=False)
        half.has_objective, half.module = True, auxiliary(place, depth(place, self.depth, self.decline))
        return half

    def upper(self, place: Place) -> Upper:
        return Upper()


def depth(place: Place, most: int, decline: float) -> int:
    """Layers of the auxiliary network of an inner block."""
    t = decline * place.k / (place.K - 2) if place.K > 2 else 0.0
    return max(1, round(most * (1 - t) + t))


def chosen(last: int, layers: int, depth: int) -> list[int]:
    """Which of `layers` units, evenly spread behind unit `last` and up to the end: numbers, rising."""
    depth = min(depth, layers - last - 1)
    return [round(last + (layers - last - 1) * i / depth) for i in range(1, depth + 1)]


def auxiliary(place: Place, depth: int) -> nn.Module:
    """The auxiliary network of block `place.k`."""
    below = [unit for module in place.modules[: place.k + 1] for unit in module.children()]
    above = [unit for module in place.modules[place.k + 1 :] for unit in module.children()]
    last, layers = len(below) - 1, len(below) + len(above) - 1  # the output unit gives way to the head
    wanted = shapes(above, place.shapes[place.k])
    shape, parts = place.shapes[place.k], []
    for number in chosen(last, layers, depth):
        unit, expected = above[number - last - 1], wanted[number - last - 1]
        parts += [*_adapter(shape, expected, number), renewed(unit, number)]
        shape = wanted[number - last]
    return nn.Sequential(*parts, heads.build("auto", shape, place.shapes[-1]))


def renewed(unit: nn.Module, number: int) -> nn.Module:
    """A copy of a unit whose weights and running statistics are initialised anew, by its layers' own rules."""
    made = _without_dropout(copy.deepcopy(unit))
    for layer in made.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise UserError(
                f"unit {number} holds a {type(layer).__name__} with weights and no reset_parameters, so it cannot be "
                "copied with new weights; give it that method, or use a method with other heads"
            )
    return made.requires_grad_()


def _without_dropout(module: nn.Module) -> nn.Module:
    """Dropout is taken out: an objective has no random numbers of its own that could be repeated."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return nn.Identity()
    for name, child in module.named_children():
        setattr(module, name, _without_dropout(child))
    return module


def shapes(units: Sequence[nn.Module], shape: Shape) -> list[Shape]:
    """What every unit is given, and what the last returns; the units do not change."""
    found = [shape]
    reference = next((p for unit in units for p in unit.parameters()), torch.zeros(0))
    x = torch.zeros(1, *shape, dtype=reference.dtype, device=reference.device)
    for unit in units:
        with torch.no_grad():
            x = copy.deepcopy(unit).eval()(x)
        found.append(tuple(x.shape[1:]))
    return found


def _adapter(shape: Shape, expected: Shape, number: int) -> list[nn.Module]:
    if shape == expected:
        return []
    if len(shape) == len(expected) == 3:
        pool = [nn.AdaptiveAvgPool2d(expected[1:])] if shape[1:] != expected[1:] else []
        widen = [nn.Conv2d(shape[0], expected[0], 1, bias=False)] if shape[0] != expected[0] else []
        return [*pool, *widen]
    if shape[:-1] == expected[:-1]:
        return [nn.Linear(shape[-1], expected[-1])]
    if len(expected) == 1:
        return [nn.Flatten(), nn.Linear(math.prod(shape), expected[0])]
    raise UserError(
        f"unit {number} expects {expected} per sample and cannot follow {shape}; use a method with other heads"
    )
