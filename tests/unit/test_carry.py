"""Carry: masks and skip connections cross cuts, and the network stays the one a plain model computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.errors import UserError
from decoupled.models import Carry
from decoupled.randomness import seeded
from decoupled.testing import flat
from decoupled.trainer import Trainer


class Embed(nn.Module):
    """Tokens to vectors, and whether each is one: 0 stands for padding."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.table(x), (x != 0).to(self.table.weight).unsqueeze(-1)], -1)


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, there: Tensor) -> Tensor:
        scores = self.query(h) @ h.transpose(1, 2)
        scores = scores.masked_fill(there.transpose(1, 2) == 0, -torch.inf)
        return h + scores.softmax(-1) @ torch.tanh(self.value(h))


class Pool(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, classes)

    def forward(self, h: Tensor, there: Tensor) -> Tensor:
        return self.out((h * there).sum(1) / there.sum(1))


def masked() -> list[nn.Module]:
    with seeded(0):
        units: list[nn.Module] = [Embed(7, 6)]
        units += [Carry(Attend(6), 1, dim=-1) for _ in range(3)]
        return [unit.double() for unit in [*units, Carry(Pool(6, 3), 1, dim=-1, onward=False)]]


def plainly(units: list[nn.Module], x: Tensor) -> Tensor:
    """The same layers called as a model that is no chain calls them."""
    first, *rest = units
    h, there = first.table(x), (x != 0).double().unsqueeze(-1)  # type: ignore[operator]
    for unit in rest:
        h = unit.unit(h, there)  # type: ignore[operator]
    return h


def sentences(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    with seeded(seed):
        batches = []
        for _ in range(count):
            x = torch.randint(1, 7, (8, 5))
            x[torch.arange(5) >= torch.randint(1, 6, (8, 1))] = 0
            batches.append((x, torch.randint(3, (8,))))
        return batches


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trained(units: list[nn.Module], method: Any, batches: Any, cuts: list[int], runtime: str = "simulated") -> Tensor:
    net = nn.Sequential(*units)
    with Trainer(net, method, cuts, loss=F.cross_entropy, optimizer=sgd, runtime=runtime) as trainer:
        trainer.fit(batches, epochs=2)
    return flat(net)


def trained_plainly(
    units: list[nn.Module], forward: Callable[[list[nn.Module], Tensor], Tensor], batches: Any
) -> Tensor:
    net = nn.Sequential(*units)
    optimizer = sgd(net.parameters())
    for x, targets in batches * 2:
        optimizer.zero_grad()
        F.cross_entropy(forward(units, x), targets).backward()
        optimizer.step()
    return flat(net)


def test_a_mask_crosses_every_cut() -> None:
    batches = sentences(5)
    found = trained(masked(), "backprop", batches, [1, 2, 3, 4])
    assert (found - trained_plainly(masked(), plainly, batches)).abs().max() < 1e-12


def test_what_is_masked_counts_for_nothing() -> None:
    """Other vectors for the padding give the same output, so the mask is what arrives above the cuts."""
    net = nn.Sequential(*masked())
    (x, _) = sentences(1)[0]
    before = net(x)
    with torch.no_grad():
        net[0].table.weight[0] += 10.0  # type: ignore[union-attr, index]
    assert torch.equal(net(x), before)
    with torch.no_grad():
        net[0].table.weight[1] += 10.0  # type: ignore[union-attr, index]
    assert not torch.equal(net(x), before)


@pytest.mark.parametrize("method", ["pipedream", "features_replay", "greedy_local", "zero_bubble", "dfa", "penalty"])
def test_methods_train_it_on_threads_as_simulated(method: str) -> None:
    start, batches = masked(), [(x, y, torch.arange(8) + 8 * b) for b, (x, y) in enumerate(sentences(5))]
    moved = trained(copy.deepcopy(start), method, batches, [2])
    assert torch.equal(moved, trained(copy.deepcopy(start), method, batches, [2], "threads"))
    assert not torch.equal(moved, flat(nn.Sequential(*start)))


class Branch(nn.Module):
    """[h | h], the beginning of a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return torch.cat([h, h], 1)


class Passing(nn.Conv2d):
    def forward(self, h: Tensor, side: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return torch.tanh(super().forward(h))


class Join(nn.Module):
    def forward(self, h: Tensor, side: Tensor) -> Tensor:
        return (h * side).mean((2, 3))


def skipping() -> list[nn.Module]:
    with seeded(0):
        layers = [Carry(Passing(4, 4, 3, padding=1), 4) for _ in range(2)]
        return [unit.double() for unit in [Branch(), *layers, Carry(Join(), 4, onward=False), nn.Linear(4, 3)]]


def skip(units: list[nn.Module], x: Tensor) -> Tensor:
    """What `skipping` computes, as a model that is no chain."""
    first = torch.tanh(units[0].layer(x))  # type: ignore[operator]
    h = units[2].unit(units[1].unit(first))  # type: ignore[operator]
    return units[4]((h * first).mean((2, 3)))


def test_a_skip_connection_over_three_cuts_is_exact() -> None:
    with seeded(2):
        batches = [(torch.randn(4, 2, 5, 5).double(), torch.randint(3, (4,))) for _ in range(4)]
    found = trained(skipping(), "backprop", batches, [1, 2, 3])
    assert (found - trained_plainly(skipping(), skip, batches)).abs().max() < 1e-12


def test_what_cannot_be_carried_is_one_line() -> None:
    with pytest.raises(UserError, match="Carry: channels must be an integer of at least 1, got 0"):
        Carry(nn.Identity(), 0)
    with pytest.raises(UserError, match=r"2 channels are carried, but dimension 1 of \(3, 2\) has no more"):
        Carry(nn.Bilinear(1, 1, 1), 2)(torch.zeros(3, 2))
    pooled = Carry(Join(), 2)
    with pytest.raises(UserError, match=r"output \(1, 2\) cannot carry \(1, 2, 3, 3\) on in dimension 1"):
        pooled(torch.zeros(1, 4, 3, 3))
    assert "channels=2, dim=1, onward=True" in repr(pooled)
