"""Loss scales over the registry: a power of two that changes while batches are in flight changes no bit, because every
gradient is divided by the scale that came with it; and where gradients overflow, all runtimes do the same."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.testing import OPTIMIZERS, Case, compare, label, point, train, variants

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 7 + (5,))
GROWING = {"name": "float32", "scale": 4.0, "interval": 2}  # without autocast: the same numbers but for the scale
FIXED = [spec for spec in variants() if point(spec).fixed and set(spec) == {"name"}]
SECONDS = {"busy_seconds": 0.0, "wait_seconds": 0.0}
DRAW = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(8, 4, generator=DRAW), torch.randint(3, (8,), generator=DRAW), torch.arange(8 * n, 8 * n + 8))
    for n in range(7)
]


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_a_scale_that_grows_in_flight_changes_no_bit(spec):
    without, scaled = (train(CASE, spec, optimizer=OPTIMIZERS["momentum"], precision=p) for p in ("float32", GROWING))
    compare(scaled.weights, without.weights, tolerance=0.0)
    assert [row["loss"] for row in scaled.history] == [row["loss"] for row in without.history]
    found = scaled.trainer.statistics()
    assert found[-1].loss_scale >= 4.0 * 2**2  # it did change
    assert [replace(block, loss_scale=1.0) for block in found] == without.trainer.statistics()


def half(spec, runtime="simulated", epochs=2, state=None):
    """Trained in float16, with a scale that is too large at first."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 3)]
    precision = {"name": "fp16", "scale": 2.0**20, "interval": 3}
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "runtime": runtime}
    with Trainer(blocks, spec, precision=precision, **given) as trainer:
        if state is not None:
            trainer.load_state_dict(state)
        losses = [row["loss"] for row in trainer.fit(BATCHES, epochs)]
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        return weights, losses, [replace(s, **SECONDS) for s in trainer.statistics()], trainer.state_dict()


@pytest.mark.parametrize("spec", FIXED, ids=label)
def test_overflows_are_the_same_on_every_runtime(spec):
    one, two = half(spec), half(spec, "threads")
    assert all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    assert one[1:3] == two[1:3]
    assert all(bool(w.isfinite().all()) for w in one[0])
    assert one[2][-1].overflows > 0  # the top has skipped steps ...
    assert one[2][-1].updates > 0  # ... and then made some


@pytest.mark.parametrize("spec", FIXED, ids=label)
def test_the_scale_is_saved_and_goes_on(spec):
    whole, again = half(spec, epochs=2), half(spec, epochs=1, state=half(spec, epochs=1)[3])
    assert all(torch.equal(a, b) for a, b in zip(whole[0], again[0], strict=True))
    assert [s.loss_scale for s in whole[2]] == [s.loss_scale for s in again[2]]
