"""Blocks without a useful gradient: they say where their input should go, given a target for their output.

    forward   y = h(x)
    prox      v = argmin_v ||v - x||^2 / 2 + (weight/2) D(v, target),   D = ||target - h(v)||^2
              (units say where they have another D, or come only near the argmin)
    fit       move the block's own constants towards mapping x to target (none for most)

    Z_{k-1} --> h --> X_k     above it  J_k = (beta/2) ||Z_k - X_k + U_k||^2, so the target is Z_k + U_k
            <-- p = (Z_{k-1} - v) / eta, weight = beta eta:  in place of dJ_k/dZ_{k-1} the gradient of J_k's Moreau
                                                             envelope, which exists although that of J_k does not

The variable below then steps to v (and from there towards its own block's output), as if by a gradient. Such a unit is
a block of its own. Backpropagation through it gives nothing. Source: derived here; `Steps` is checked on a grid, `TopK`
against all sets of winners.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decoupled.coupling import Payload, Place, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.methods.auxiliary_variables.variable import Rule, Variable


class Proximal(nn.Module, ABC):
    """A block with a prox in place of a gradient.

    Attributes:
        nonnegative: its input and its output are; the variables on both sides of it are kept so.
        learns: it has constants that `fit` moves.
    """

    nonnegative = False
    learns = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """h(x): (batch, *features) to (batch, *features)."""

    @abstractmethod
    def prox(self, x: Tensor, target: Tensor, weight: float) -> Tensor:
        """The input near `x` that goes with `target`: see the module's docstring; shape of `x`."""

    def fit(self, x: Tensor, target: Tensor) -> None:
        """Learn from one batch."""


class Steps(Proximal):
    """A step function: `levels[i]` between `thresholds[i-1]` and `thresholds[i]`, both ascending.

    The prox looks at each level in turn: the nearest point of its interval, `margin` inside it, costs
    (v - x)^2 / 2 + (weight/2) (target - level)^2; the cheapest is taken. A threshold belongs to the level above it, so
    with margin 0 the nearest point below is the next smaller number, and rounding may take the variable back.
    """

    levels: Tensor
    thresholds: Tensor

    def __init__(self, levels: Sequence[float], thresholds: Sequence[float], margin: float) -> None:
        super().__init__()
        gaps = [b - a for a, b in itertools.pairwise(thresholds)]
        if len(thresholds) != len(levels) - 1 or margin < 0 or any(gap <= 2 * margin for gap in gaps):
            raise UserError(
                f"{type(self).__name__}: {len(levels)} levels, thresholds {list(thresholds)}, margin {margin}; give "
                "one threshold fewer than levels, ascending, further apart than two margins"
            )
        self.margin = margin
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.get_default_dtype()))
        self.register_buffer("thresholds", torch.tensor(thresholds, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return self.levels[torch.bucketize(x.detach(), self.thresholds, right=True)]

    def prox(self, x: Tensor, target: Tensor, weight: float) -> Tensor:
        end = self.thresholds.new_full((1,), float("inf"))
        lows = torch.cat([-end, self.thresholds + self.margin])
        highs = torch.minimum(self.thresholds - self.margin, self.thresholds.nextafter(-end))
        highs = torch.cat([highs, end])
        best, cost = x, torch.full_like(x, float("inf"))
        for level, low, high in zip(self.levels, lows, highs, strict=True):
            v = x.clamp(low, high)
            price = (v - x) ** 2 + weight * (target - level) ** 2
            best, cost = torch.where(price < cost, v, best), torch.minimum(price, cost)
        return best


class Sign(Steps):
    """-1 below 0, 1 from 0 on. A variable that has to change sides lands `margin` beyond 0."""

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__([-1.0, 1.0], [0.0], margin)


class Quantize(Steps):
    """Rounds to the nearest of `count` levels, evenly spaced in [low, high]."""

    def __init__(self, count: int = 4, low: float = 0.0, high: float = 1.0, margin: float = 0.0) -> None:
        if count < 2 or not low < high:
            raise UserError(f"Quantize: {count} levels in [{low}, {high}]; give at least 2, and low < high")
        step = (high - low) / (count - 1)
        levels = [low + i * step for i in range(count)]
        super().__init__(levels, [level + step / 2 for level in levels[:-1]], margin)


class TopK(Proximal):
    """Keeps the `k` largest entries of each sample, the others become 0.

    The prox is an approximation. It takes the cheapest of three answers: to stay, and two sets of winners, those of `x`
    and those that gain most, where winners move as if alone and losers below the lowest of them. The argmin is often
    another set, or one whose lowest winners move up to let losers stay higher.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise UserError(f"TopK keeps at least 1 entry, got {k}")
        self.k = k

    def _winners(self, score: Tensor) -> Tensor:
        """Mask (batch, features) of the k largest."""
        k = min(self.k, score.shape[1])
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(k, dim=1).indices, True)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten(1)
        return (flat * self._winners(flat)).view_as(x)

    def prox(self, x: Tensor, target: Tensor, weight: float) -> Tensor:
        flat, wanted = x.flatten(1), target.flatten(1)
        gain = wanted**2 - (flat - wanted) ** 2 / (1 + weight)  # of an entry that is a winner over one that is not
        now = self._winners(flat)
        best, cost = flat, weight * (wanted - flat * now).square().sum(1, keepdim=True)
        for winners in (now, self._winners(gain)):
            v = torch.where(winners, (flat + weight * wanted) / (1 + weight), flat)
            lowest = v.masked_fill(~winners, float("inf")).amin(1, keepdim=True)
            v = torch.where(winners, v, torch.minimum(v, lowest.nextafter(torch.full_like(lowest, -float("inf")))))
            price = (v - flat).square().sum(1, keepdim=True)
            price = price + weight * (wanted - v * winners).square().sum(1, keepdim=True)
            best, cost = torch.where(price < cost, v, best), torch.minimum(price, cost)
        return best.view_as(x)


def unit_of(place: Place, k: int) -> Proximal | None:
    """The proximal unit that block `k` is, or None if it is differentiable.

    Raises:
        UserError: the block holds one together with other layers.
    """
    module = place.modules[k] if 0 <= k < len(place.modules) else nn.Identity()
    found = [unit for unit in module.modules() if isinstance(unit, Proximal)]
    layers = [unit for unit in module.modules() if not isinstance(unit, nn.Sequential)]
    if (found and layers[0] is not found[0]) or len(found) > 1:
        raise UserError(
            f"block{k} holds {type(found[0]).__name__}, which has no gradient, together with other layers; cut before "
            "and after it, so that it is a block of its own"
        )
    return found[0] if found else None


class Handed(Variable):
    """Lower half of a proximal block: where a gradient of J for the output is asked for, the target is handed over."""

    def objective(self, y: Tensor, data: Data | None) -> Tensor | None:
        assert self.z is not None and self.u is not None
        target = self.z + self.u  # in a sweep the round ends here, and U makes its step
        J = super().objective(y, data)
        if J is None:
            return None
        handed = (y * target).sum()
        return J.detach() + (handed - handed.detach())  # the value of J, the target as its gradient


class Pull(Upper):
    """Upper half of a proximal block: sends down what moves the variable below to the prox."""

    replies, differentiates = True, False

    def __init__(self, unit: Proximal, rule: Rule) -> None:
        self._unit, self._rule = unit, rule

    def reply_with(self, gradient: Tensor | None, x: Tensor, y: Tensor, heard: Payload) -> Payload:
        target, rule = heard[0] * self._rule.z_steps, self._rule
        if self._unit.learns:
            self._unit.fit(x, target)
        v = self._unit.prox(x, target, rule.beta * rule.eta)
        return ((x - v) / (rule.eta * len(x) * rule.z_steps),)
