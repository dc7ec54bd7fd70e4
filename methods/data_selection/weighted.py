"""Choosers that weigh: every objective of the boss is (1/B) sum_i v_i l_i on a batch of B samples.

    self_paced    v_i ~ max(0, 1 - l_i / L_e)^(1/(q-1)) + 0.01, q = 4, scaled to sum B over the batch; l_i: loss when
                  last trained (1000 before), L_e: its quantile at the start of epoch e, 0.25 up to 1 in `pace` steps,
                  and 1e-6 more
    screener_net  v_i = s(x_i), a small network that is trained on
                  sum_i (1 - s_i)^2 l_i + s_i^2 max(margin - l_i, 0) + 0.01 mean |theta|, by Adam
    infobatch     at the start of an epoch, of the samples with l_i < mean(l) a share `ratio` is left out of it; the
                  rest of them has v_i = 1 / (1 - ratio), all others 1. From epoch `full_from` on (0, 1, ...) all take
                  part with weight 1

The first epoch takes every sample with weight 1, but for screener_net.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from decoupled import flops
from decoupled.messages import Data, Losses
from decoupled.methods.data_selection.plain import Table, are_tokens, draws, indices, numbers, vocabulary
from decoupled.randomness import seeded
from decoupled.selection import Choice, Chooser, Selection

UNTRAINED = 1000.0


class Remembering(Chooser):
    """Knows the loss of every sample when it was last trained on."""

    def __init__(self, seed: int, unknown: float) -> None:
        self._seed, self._last = seed, Table(unknown)

    def begin(self, epoch: int) -> None:
        self._epoch, self._draws = epoch, draws(self._seed, epoch)

    def hear(self, told: Losses, samples: Data) -> None:
        assert told.losses is not None
        self._last[indices(samples)] = told.losses

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last.values = state["last"]


@dataclass(frozen=True, kw_only=True)
class SelfPaced(Selection):
    """Easy samples first."""

    pace: int
    lag: int | None = 4
    weighs: bool = True
    warmup: int = 1

    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        return Paced(self.pace, seed)


class Paced(Remembering):
    """Self-paced learning with soft weights."""

    def __init__(self, pace: int, seed: int) -> None:
        super().__init__(seed, UNTRAINED)
        self._share = [*torch.linspace(0.25, 1, pace, dtype=torch.float32).tolist(), 1.0]

    def begin(self, epoch: int) -> None:
        super().begin(epoch)
        known = self._last.values[self._last.values < UNTRAINED]
        share = self._share[min(epoch, len(self._share) - 1)]
        self._limit = float(known.quantile(share)) + 1e-6 if len(known) else UNTRAINED

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        if self._epoch == 0:
            return Choice()
        weights = (1 - self._last[indices(samples)] / self._limit).clamp(min=0) ** (1 / 3) + 0.01
        return Choice(weights=weights * (len(weights) / weights.sum()))


@dataclass(frozen=True, kw_only=True)
class Pruned(Selection):
    """Fewer of those with little loss."""

    ratio: float
    full_from: int | None
    lag: int | None = 4
    weighs: bool = True
    warmup: int = 1

    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        return Pruning(self.ratio, self.full_from, seed)


class Pruning(Remembering):
    """InfoBatch."""

    def __init__(self, ratio: float, full_from: int | None, seed: int) -> None:
        super().__init__(seed, math.inf)
        self._ratio, self._full_from = ratio, full_from

    def begin(self, epoch: int) -> None:
        super().begin(epoch)
        self._weights = Table(unknown=1.0)  # 0: left out of this epoch
        if epoch == 0 or (self._full_from is not None and epoch >= self._full_from):
            return
        known = self._last.values[self._last.values.isfinite()]
        low = (self._last.values < known.mean()).nonzero()[:, 0]
        self._weights[low] = torch.full((len(low),), 1 / (1 - self._ratio), dtype=torch.float32)
        order = torch.randperm(len(low), generator=self._draws)
        self._weights[low[order[: round(self._ratio * len(low))]]] = torch.zeros(round(self._ratio * len(low)))

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        weights = self._weights[indices(samples)]
        if bool((weights == 1).all()):
            return Choice()
        rows = weights.nonzero()[:, 0]
        return Choice(rows, weights[rows])


@dataclass(frozen=True, kw_only=True)
class Screened(Selection):
    """What a small network says."""

    margin: float
    lr: float
    lag: int | None = 4
    weighs: bool = True

    def chooser(self, inputs: Tensor, outputs: Sequence[int], seed: int) -> Chooser:
        return Screener(inputs, vocabulary(outputs) if are_tokens(inputs) else 0, self.margin, self.lr, seed)


class Screener(Chooser):
    """ScreenerNet; `tokens`: how many different ones, 0 if inputs are none."""

    def __init__(self, inputs: Tensor, tokens: int, margin: float, lr: float, seed: int) -> None:
        with seeded(seed):
            self._network = screener(inputs, tokens)
        self._tokens, self._margin = tokens, margin
        self._adam = torch.optim.Adam(self._network.parameters(), lr)
        self._cost = flops.count(self._network, inputs.shape[1:], torch.int64 if tokens else torch.float32)

    def choose(self, samples: Data, losses: Tensor | None) -> Choice:
        with torch.no_grad():
            weights = self._screen(samples)
        self.flops += self._cost.forward * len(weights)
        self.consulted += len(weights)
        return Choice(weights=weights)

    def hear(self, told: Losses, samples: Data) -> None:
        assert told.losses is not None
        s, parameters = self._screen(samples), list(self._network.parameters())
        size = torch.cat([p.flatten() for p in parameters]).abs().mean()
        easy = (self._margin - told.losses).clamp(min=0)
        objective = ((1 - s) ** 2 * told.losses + s**2 * easy).sum() + 0.01 * size
        for parameter, gradient in zip(parameters, torch.autograd.grad(objective, parameters), strict=True):
            parameter.grad = gradient
        self._adam.step()
        self.flops += (self._cost.forward + self._cost.weights) * len(s)

    def _screen(self, samples: Data) -> Tensor:
        assert samples.inputs is not None
        x = numbers(samples.inputs, self._tokens) if self._tokens else samples.inputs.float().cpu()
        return torch.sigmoid(self._network(x)[:, 0])

    def state_dict(self) -> dict[str, Any]:
        return {"network": self._network.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._network.load_state_dict(state["network"])
        self._adam.load_state_dict(state["adam"])


def screener(inputs: Tensor, tokens: int) -> nn.Module:
    """Four convolutions 3x3 (4, 8, 16, 32 channels, ELU) for images, two layers of 32 for other inputs."""
    linear = partial(nn.Linear, dtype=torch.float32)
    if tokens:
        return nn.Sequential(nn.EmbeddingBag(tokens, 32, dtype=torch.float32), nn.ELU(), linear(32, 1))
    if inputs.dim() != 4:
        return nn.Sequential(nn.Flatten(), linear(inputs[0].numel(), 32), nn.ELU(), linear(32, 1))
    channels = [inputs.shape[1], 4, 8, 16, 32]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(channels):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1, dtype=torch.float32), nn.ELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(32, 1))
