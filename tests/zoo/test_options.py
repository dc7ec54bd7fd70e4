"""Oracle 7, options: every switch and count of a method changes something that can be seen."""

from dataclasses import replace
from functools import cache

import pytest

from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.testing import OPTIMIZERS, Case, label, point, train, variants

# Deep enough for heads of several layers; buffers run over below a slow block, and are empty above it.
CASE = Case(widths=(4, 5, 3, 4, 5, 4, 5, 3), cuts=(1, 2, 3, 4, 5, 6), sizes=(6,) * 11 + (5,))
SLOW = Timing(slow={3: 10.0})


@cache
def defaults(name):
    return seen({"name": name})


def seen(spec):
    """What a run shows: weights after every update, counts and bytes, losses, what was selected, draws of the data."""
    run = train(CASE, spec, optimizer=OPTIMIZERS["momentum"], epochs=3, runtime=Simulated(SLOW))
    counts = [replace(block, busy_seconds=0.0, wait_seconds=0.0) for block in run.trainer.statistics()]
    weights = [[version.tolist() for version in block] for block in run.weights]
    losses = [row["loss"] for row in run.history]
    return repr((weights, counts, losses, run.trainer.selected(), [point(spec).draws(epoch) for epoch in range(4)]))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in variants() if set(spec) != {"name"}], ids=label)
def test_an_option_changes_something(spec):
    assert seen(spec) != defaults(spec["name"])


def test_nothing_but_an_option_does():
    """The control of the test above: the same options show the same."""
    name = variants()[0]["name"]
    assert seen({"name": name}) == defaults(name)
