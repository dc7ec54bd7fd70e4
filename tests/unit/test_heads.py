"""Auxiliary heads: every kind maps what it may read to the network's output, and refuses the rest in one line."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import heads
from decoupled.errors import UserError
from decoupled.randomness import seeded
from decoupled.testing import Case, train

IMAGE, FLAT, SEQUENCE = (6, 5, 7), (9,), (8, 12)


@pytest.mark.parametrize(
    ("kind", "shape", "output"),
    [
        *((kind, IMAGE, (4,)) for kind in ("auto", "linear", "mlp", "mlp_sr", "cnn")),
        *((kind, FLAT, (4,)) for kind in ("auto", "linear", "mlp", "mlp_sr")),
        *((kind, (3, 1, 1), (4,)) for kind in ("linear", "mlp", "mlp_sr", "cnn")),
        ("linear", (6, 5), (4,)),
        ("auto", SEQUENCE, (30, 8)),
        ("sequence", SEQUENCE, (30, 8)),
    ],
)
def test_a_head_has_the_shape_of_the_network_and_trains_all_it_has(kind, shape, output):
    head = heads.build(kind, shape, output)
    y = torch.randn(3, *shape, requires_grad=True)
    out = head(y)
    assert out.shape == (3, *output)
    targets = torch.randint(output[0], (3, *output[1:]))
    F.cross_entropy(out, targets).backward()
    assert all(p.grad is not None for p in [y, *head.parameters()])


def test_linear_reads_the_mean_over_space():
    head = heads.build("linear", IMAGE, (4,))
    y, weights = torch.randn(3, *IMAGE), [p for p in head.parameters()]
    torch.testing.assert_close(head(y), F.linear(y.mean((2, 3)), *weights))


def test_sequence_is_one_classifier_for_every_position():
    head = heads.build("sequence", SEQUENCE, (30, 8))
    y = torch.randn(3, *SEQUENCE)
    logits = head(y)
    alone = torch.stack([head(y[:, i : i + 1])[..., 0] for i in range(8)], dim=-1)
    torch.testing.assert_close(logits, alone)
    assert not torch.equal(head(2 * y + 1)[:, :, 0], logits.roll(1, 2)[:, :, 0])
    torch.testing.assert_close(head(2 * y + 1), logits, rtol=1e-3, atol=1e-4)  # LayerNorm comes first


def test_auto_is_linear_or_sequence_by_the_network():
    assert str(heads.build("auto", IMAGE, (4,))) == str(heads.build("linear", IMAGE, (4,)))
    assert str(heads.build("auto", SEQUENCE, (30, 8))) == str(heads.build("sequence", SEQUENCE, (30, 8)))


@pytest.mark.parametrize(
    ("kind", "shape", "output", "message"),
    [
        ("linaer", FLAT, (4,), r"unknown head 'linaer'\. Did you mean 'linear'\? Known: auto, cnn, linear, mlp, "),
        ("linear", (), (4,), "here the block ends in shape .* use a method without heads"),
        ("linear", IMAGE, (4, 5, 7), "use a method without heads"),
        ("linear", SEQUENCE, (30, 8), r"head 'linear' does not fit .*\(30, 8\).* per position; use head 'auto' or 's"),
        ("sequence", SEQUENCE, (4,), r"head 'sequence' does not fit .* one decision per sample; use head 'auto' or 'l"),
        ("auto", (9, 12), (30, 8), r"with length 8, .* ends in \(9, 12\) per sample: cut elsewhere"),
        ("auto", IMAGE, (30, 8), r"head 'sequence' reads \(length, features\)"),
        ("cnn", FLAT, (4,), r"head 'cnn' reads images .*here the block ends in \(9,\) per sample; use head 'linear'"),
        ("cnn", SEQUENCE, (4,), "head 'cnn' reads images"),
    ],
)
def test_what_does_not_fit_is_one_line(kind, shape, output, message):
    with pytest.raises(UserError, match=message) as error:
        heads.build(kind, shape, output)
    assert "\n" not in str(error.value)


def sequence_blocks():
    """Two blocks on token numbers: embedding, then a classifier of every position."""
    with seeded(0):
        return [nn.Embedding(5, 6), nn.Sequential(nn.Linear(6, 5), heads.ClassesFirst())]


def test_every_position_is_a_decision_for_loss_accuracy_and_label_check():
    """(batch, classes, length) and targets (batch, length): the greedy loss is that of plain torch, accuracy counts."""
    case = Case(widths=(4, 5, 3), cuts=(1,), sizes=(4, 4))
    x = torch.randint(5, (4, 7), generator=torch.Generator().manual_seed(0))
    y = x.roll(-1, 1)
    run = train(case, "greedy_local", blocks=sequence_blocks(), batches=[(x, y)] * 60, epochs=1)
    network = nn.Sequential(*sequence_blocks())
    assert run.history[0]["loss"] < F.cross_entropy(network(x), y).item()
    result = run.trainer.evaluate([(x, y)])
    with torch.no_grad():
        logits = run.trainer.model(x)
    assert result["loss"] == pytest.approx(float(F.cross_entropy(logits, y)))
    assert result["accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    with pytest.raises(UserError, match="labels go from 0 to 5, but the network has 5 outputs"):
        train(case, "greedy_local", blocks=sequence_blocks(), batches=[(x, y.clamp(max=0) + 5 * (y == 1))])
