"""Forward-forward: each step against formulas written out here, what the streams hold, and what is evaluated."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from decoupled.coupling import Place
from decoupled.errors import UserError
from decoupled.messages import Data, Up
from decoupled.methods.local_parallelism.goodness import Contrast, UnitLength, codes, goodness, others
from decoupled.testing import OPTIMIZERS, Case, Tap, compare, flat, train

CASE = Case(widths=(5, 6, 4, 5, 3), cuts=(1, 2), sizes=(6, 6, 5))
K, CLASSES = CASE.K, 3


def written(x, label):
    """One sample with a label over its first three features, on the scale of the batch."""
    low, high = float(x.min()), float(x.max())
    rows = []
    for sample, t in zip(x.tolist(), label.tolist(), strict=True):
        rows.append([high if i == t else low for i in range(CLASSES)] + sample[CLASSES:])
    return torch.tensor(rows, dtype=x.dtype)


def normal(h):
    return torch.stack([row / math.sqrt(float((row @ row).detach()) / len(row) + 1e-8) for row in h])


def test_a_step_by_hand():
    """Two epochs: every block but the last on its own logistic loss, the last on the plain stream."""
    run, blocks = train(CASE, {"name": "forward_forward", "threshold": 0.5}, epochs=2), CASE.blocks()
    made = [OPTIMIZERS["sgd"](list(block.parameters())) for block in blocks]
    weights = [[flat(block)] for block in blocks]
    bottom: Any = run.trainer.workers[0].upper
    for number, (x, y, _) in enumerate(CASE.batches() * 2, bottom._seed):
        streams = [x, written(x, y), written(x, others(y, CLASSES, number))]
        for k, block in enumerate(blocks[:-1]):
            streams = [block(h.detach() if k == 0 else normal(h.detach())) for h in streams]
            theta = 0.5 * streams[0].shape[1]
            loss = torch.zeros((), dtype=torch.float64)
            for plus, minus in zip(*streams[1:], strict=True):
                loss = (
                    loss
                    + torch.log(1 + torch.exp(theta - plus @ plus))
                    + torch.log(1 + torch.exp(minus @ minus - theta))
                )
            (loss / (2 * len(x))).backward()
        F.cross_entropy(blocks[-1](normal(streams[0].detach())), y).backward()
        for k, block in enumerate(blocks):
            made[k].step()
            made[k].zero_grad()
            weights[k].append(flat(block))
    compare(run.weights, weights)


def test_negative_labels_are_wrong_and_even_and_repeat():
    labels = torch.arange(4).repeat(500)
    wrong = others(labels, 4, 3)
    assert not (wrong == labels).any()
    for label in range(4):
        counts = torch.bincount(wrong[labels == label], minlength=4)
        assert sorted(counts.tolist())[1] > 120
    assert torch.equal(wrong, others(labels, 4, 3))
    assert not torch.equal(wrong, others(labels, 4, 4))


def test_wrong_labels_come_from_the_seed():
    """They were the same for every seed."""
    one, again, other = (train(CASE, "forward_forward", seed=seed).weights for seed in (0, 0, 1))
    compare(one, again, tolerance=0.0)
    with pytest.raises(AssertionError, match="block 0 differs"):
        compare(one, other)


def test_codes_are_one_hot_where_there_is_room_and_differ_everywhere():
    assert torch.equal(codes(4, 9), torch.eye(4))
    for features in range(1, 6):
        made = codes(5, features)
        assert made.shape == (5, features)
        assert len({tuple(row) for row in made.tolist()}) == 5


def test_goodness_of_images_is_averaged_over_space():
    y = torch.randn(2, 3, 4, 5)
    by_hand = [sum(float(channel.square().sum()) / 20 for channel in image) for image in y]
    torch.testing.assert_close(goodness(y), torch.tensor(by_hand))
    torch.testing.assert_close(goodness(y[..., 0, 0]), y[..., 0, 0].square().sum(1))


def test_a_weight_counts_a_sample_as_often():
    half = Contrast(Place(0, 3, F.cross_entropy, ((4,), (4,), (CLASSES,)), (5,)), 0.5)
    y, weights = torch.randn(3 * 3, 4), torch.tensor([2.0, 0.0, 1.0])
    found = half.objective(y, Data(0, batch=0, weights=weights))
    rows = [half.objective(y[i::3], None) for i in range(3)]  # one sample each, its three streams
    torch.testing.assert_close(found, (2 * rows[0] + rows[2]) / 3)


def test_streams_go_up_and_only_the_plain_one_to_the_last_block():
    tap = Tap()
    train(CASE, "forward_forward", observers=[tap])
    ups: list[Any] = [(e.target, m) for e, m in tap.messages if isinstance(m, Up)]
    assert {target: len(m.payload) for target, m in ups} == {"block1": 3, "block2": 1}
    assert {e.target for e, m in tap.messages if isinstance(m, Data) and m.inputs is not None} == {"block0"}


def test_the_network_that_is_evaluated_sees_plain_inputs_and_normalises_between_blocks():
    run = train(CASE, "forward_forward")
    network, (x, y, _) = run.trainer.model, CASE.batches()[0]
    blocks = [unit for unit in network if not isinstance(unit, UnitLength)]
    h = blocks[0](x)
    for block in blocks[1:]:
        h = block(normal(h))
    torch.testing.assert_close(network(x), h)
    accuracy = float((h.argmax(1) == y).double().mean())
    expected = pytest.approx({"loss": float(F.cross_entropy(h, y).detach()), "accuracy": accuracy})
    assert run.trainer.evaluate([(x, y)]) == expected
    run.trainer.close()
    assert run.trainer.evaluate([(x, y)]) == expected


def test_the_length_of_an_output_tells_the_next_block_nothing():
    h = torch.randn(4, 7)
    torch.testing.assert_close(UnitLength()(h), UnitLength()(100 * h))
    torch.testing.assert_close(UnitLength()(h).square().mean(1), torch.ones(4))


def test_blocks_learn_to_tell_right_labels_from_wrong_ones(tellable):
    """On data whose label can be told from the rest of the input."""
    x, y, how = tellable
    run = train(CASE, "forward_forward", epochs=30, **how)
    made = codes(3, 12) * float(x.max() - x.min()) + float(x.min())
    right, wrong = (torch.cat([made[labels], x[:, 3:]], 1) for labels in (y, (y + 1) % 3))
    for network in (run.trainer.model[:1], run.trainer.model[:3]):
        told = (goodness(network(right)) > goodness(network(wrong))).double().mean()
        assert told > 0.9


@pytest.mark.parametrize(
    ("spec", "batch", "message"),
    [
        ({"name": "forward_forward", "threshold": 0.0}, None, "forward_forward needs a positive threshold, got 0.0"),
        (
            "forward_forward",
            (torch.randn(4, 5), torch.rand(4, 3)),
            r"forward_forward needs class numbers \(N,\)",
        ),
    ],
)
def test_what_it_cannot_do_is_one_line(spec, batch, message):
    def loss(output, target):
        return output.square().mean()

    with pytest.raises(Exception, match=message) as caught:
        train(CASE, spec, blocks=[b.float() for b in CASE.blocks()], batches=[batch], loss=loss)
    assert isinstance(caught.value if batch is None else caught.value.__cause__, UserError)
