"""Methods as bosses of a selection of samples: whose losses they tell, and what they make of weights."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.errors import UserError
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


# --- weights ------------------------------------------------------------------------------------------------------


class Even(Chooser):
    """Every sample has the same weight."""

    def choose(self, samples: Any, losses):
        return Choice(weights=torch.full((len(samples.indices),), 0.5))


@dataclass(frozen=True, kw_only=True)
class Halved(Selection):
    weighs: bool = True

    def chooser(self, inputs, outputs, seed):
        return Even()


def first_updates(run):
    """Of every block; zero where it is not trained, or not yet."""
    return [versions[min(1, len(versions) - 1)] - versions[0] for versions in run.weights]


def constrained(spec, lower):
    """Whether an inner objective is the distance to a variable: weights reach it with what moves the variable."""
    return point(spec).coupling.substitutes and lower.awaits == "A"


# with several passes in a step, later ones meet variables that have moved
AT_ONCE = [spec for spec in BOSSES if getattr(point(spec).feed, "passes_per_round", 1) == 1]


@pytest.mark.costly
@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("spec", AT_ONCE, ids=label)
def test_weights_of_samples_reach_every_objective_or_are_refused(spec, blocks):
    """Half the weight for all is half the gradient in every block. Some terms of objectives did not hear of weights."""
    case = replace(CASE, widths=CASE.widths[-1 - blocks :], cuts=tuple(range(1, blocks)), sizes=(8,))
    plain, method = train(case, spec), selecting(point(spec), Halved())
    lowers = [worker.lower for worker in plain.trainer.workers]
    if any(lower.has_objective and not lower.needs_data for lower in lowers):
        with pytest.raises(UserError, match=r"weighs samples, .*use another boss"):
            train(case, method)
        return
    halves, wholes = first_updates(train(case, method)), first_updates(plain)
    assert wholes[-1].any()
    for half, whole, lower in zip(halves, wholes, lowers, strict=True):
        if not constrained(spec, lower):
            torch.testing.assert_close(half, whole / 2, rtol=1e-9, atol=1e-12)
