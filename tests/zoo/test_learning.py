"""Oracle 5, learning: the forward network improves on held-out data, with every method and without its heads."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled.testing import Case, flat, label, point, variants

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
    weights, losses = [list(map(flat, blocks))], []
    given = {"loss": F.cross_entropy, "optimizer": lambda p: torch.optim.SGD(p, lr=0.3), "runtime": "simulated"}
    with Trainer(blocks, spec, **given) as trainer:
        for _ in range(8):
            losses += [record["loss"] for record in trainer.fit(blobs(0))]
            weights.append(list(map(flat, blocks)))
        after, accuracy = evaluate(trainer.model, held_out)
        assert trainer.evaluate(held_out) == pytest.approx({"loss": after, "accuracy": accuracy})
    assert after < 0.6 * before
    assert accuracy > 0.75
    assert losses[-1] < losses[0]
    for k in range(CASE.K):
        moved = [float((new[k] - old[k]).abs().max()) for old, new in pairwise(weights)]
        if point(spec).facts.reach(k, CASE.K):  # it stands still in no epoch; some need one or two to set out
            assert min(moved[3:]) > 0.002 and float((weights[-1][k] - weights[0][k]).abs().max()) > 0.02
        else:
            assert max(moved) == 0
