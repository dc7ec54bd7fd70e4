"""Methods as bosses of a selection of samples: whose losses they tell."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.method import Method, selecting
from decoupled.sample_losses import each
from decoupled.selection import Choice, Chooser, Selection
from decoupled.testing import Case, label, point, train, variants

CASE = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2), sizes=(8, 9, 5, 3))
BOSSES = [spec for spec in variants() if point(spec).selection is None]


class All(Chooser):
    """Keeps every sample, and what it hears."""

    def __init__(self, heard: list[Any]) -> None:
        self.heard = heard

    def choose(self, samples, losses):
        return Choice()

    def hear(self, told, samples):
        self.heard.append(told)


@dataclass(frozen=True, kw_only=True)
class Everything(Selection):
    heard: list[Any]
    lag: int | None = 2

    def chooser(self, inputs, outputs, seed):
        return All(self.heard)


def listening(spec) -> tuple[Method, list[Any]]:
    heard: list[Any] = []
    return selecting(point(spec), Everything(heard=heard)), heard


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


# what comes from an output that something was put in the place of has other losses, and rightly so
OWN = [spec for spec in BOSSES if point(spec).fixed and not point(spec).coupling.substitutes]


@pytest.mark.costly
@pytest.mark.parametrize("spec", OWN, ids=label)
def test_every_sample_is_told_its_own_loss(spec):
    """With a learning rate of zero all passes meet the same network. Of a backward in two parts others were told."""
    method, heard = listening(spec)
    train(CASE, method, optimizer=still, epochs=2)
    network, (x, y, _) = nn.Sequential(*CASE.blocks()), (torch.cat(part) for part in zip(*CASE.batches(), strict=True))
    expected = each(F.cross_entropy, network(x), y).detach()
    samples = torch.cat([told.indices for told in heard])
    assert sorted(set(samples.tolist())) == list(range(len(x)))
    found = torch.cat([told.losses for told in heard])
    torch.testing.assert_close(found.double(), expected[samples], rtol=0.0, atol=1e-5)
