"""bf16 autocast, for all blocks or some: half the bytes on the edges, weights stay float32, and the bits stay the same
on every runtime."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer, UserError
from decoupled.testing import OPTIMIZERS, variants

DRAW = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(8, 4, generator=DRAW), torch.randint(3, (8,), generator=DRAW), torch.arange(8 * n, 8 * n + 8))
    for n in range(6)
]


def blocks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 3)]


def trained(precision, method="pipedream", runtime="threads", epochs=2):
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "runtime": runtime}
    with Trainer(blocks(), method, precision=precision, **given) as trainer:
        losses = [row["loss"] for row in trainer.fit(BATCHES, epochs)]
        held_out = trainer.evaluate(BATCHES)
    return trainer, losses, held_out


def test_edges_carry_half_the_bytes_and_weights_stay_as_they_are():
    (full, exact, _), (half, rounded, held_out) = trained("float32"), trained("bf16")
    assert [b.bytes_up for b in full.statistics()[:-1]] == [2 * b.bytes_up for b in half.statistics()[:-1]]
    assert [b.bytes_down for b in full.statistics()[1:]] == [2 * b.bytes_down for b in half.statistics()[1:]]
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)
    assert held_out["loss"] == pytest.approx(rounded[-1], rel=0.1)


def test_one_precision_per_block():
    """The middle block alone computes in bf16; its neighbours take what it sends in their own type."""
    trainer, losses, _ = trained(["float32", "bf16", "float32"])
    full = trained("float32")[0].statistics()
    sent = [(b.bytes_up, b.bytes_down) for b in trainer.statistics()]
    assert sent[0][0] == full[0].bytes_up  # float32 goes into the block ...
    assert sent[1][0] == full[1].bytes_up / 2  # ... and bf16 comes out, in both directions
    assert sent[2][1] == full[2].bytes_down / 2
    assert losses == pytest.approx(trained("float32")[1], rel=0.03)


@pytest.mark.parametrize("spec", variants(), ids=str)
def test_every_method_trains_in_bf16(spec):
    assert all(loss == loss for loss in trained("bf16", spec, "simulated", epochs=1)[1])


def test_the_bits_are_the_same_on_every_runtime():
    one, two = trained("bf16", runtime="threads"), trained("bf16", runtime="simulated")
    assert all(torch.equal(a, b) for a, b in zip(one[0].model.parameters(), two[0].model.parameters(), strict=True))
    assert one[1:] == two[1:]


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp8", "unknown precision 'fp8'"),
        (["bf16", "bf17", "bf16"], "bf17.*Did you mean 'bf16'"),
        (["bf16"], "1 blocks of 3"),
    ],
)
def test_wrong_precisions_are_refused(precision, message):
    with pytest.raises(UserError, match=message):
        trained(precision)
