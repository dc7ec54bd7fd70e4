"""Oracle 5, learning: the forward network improves on held-out data, with every method and without its heads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.testing import Case, label, point, train, variants

CASE = Case(widths=(8, 16, 16, 16, 3), cuts=(1, 2), sizes=(32,) * 16)
DEFAULTS = [spec for spec in variants() if set(spec) == {"name"}]


def blobs(seed):
    """512 samples of three overlapping classes; the best possible accuracy is about 0.9."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (512,), generator=draw)
    x = torch.randn(512, 8, generator=draw, dtype=torch.float64) + 2 * F.one_hot(y, 8)
    return list(zip(x.split(32), y.split(32), torch.arange(512).split(32), strict=True))


def evaluate(network, batches):
    with torch.no_grad():
        results = [(network(x), y) for x, y, _ in batches]
    output, y = (torch.cat(parts) for parts in zip(*results, strict=True))
    return float(F.cross_entropy(output, y)), float((output.argmax(1) == y).double().mean())


@pytest.mark.parametrize("spec", DEFAULTS, ids=label)
def test_the_forward_network_improves_on_held_out_data(spec):
    blocks, held_out = CASE.blocks(), blobs(1)
    before, _ = evaluate(nn.Sequential(*blocks), held_out)
    run = train(
        CASE, spec, blocks=blocks, batches=blobs(0), epochs=8, optimizer=lambda p: torch.optim.SGD(p, lr=0.3)
    )  # fmt: skip
    after, accuracy = evaluate(run.trainer.model, held_out)
    assert after < 0.6 * before
    assert accuracy > 0.75
    assert run.trainer.evaluate(held_out) == pytest.approx({"loss": after, "accuracy": accuracy})
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    for k, weights in enumerate(run.weights):  # no block is left at its initial values, unless that is declared
        assert ((weights[-1] - weights[0]).abs().max() > 0.02) == bool(point(spec).facts.reach(k, CASE.K))
