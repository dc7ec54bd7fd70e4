"""Signal propagation: each step against formulas written out here, what the streams hold, and what is evaluated."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.coupling import Place
from decoupled.errors import UserError
from decoupled.messages import Data, Up
from decoupled.methods.local_parallelism.goodness import Written
from decoupled.methods.local_parallelism.signal import Coded, Meeting, Signal
from decoupled.testing import OPTIMIZERS, Case, Tap, compare, flat, train

CASE = Case(widths=(5, 6, 4, 5, 3), cuts=(1, 2), sizes=(6, 6, 5))
TWO = Case(widths=(5, 6, 3), cuts=(1,), sizes=(6,) * 8)
K, CLASSES = CASE.K, 3


def place(k, shape, inputs=(5,)):
    return Place(k, 3, F.cross_entropy, (shape, shape, (CLASSES,)), inputs)


def test_a_step_by_hand():
    """Two epochs: every block but the last brings inputs and targets together, the last follows the network's loss."""
    tap = Tap()
    run, blocks = train(CASE, "sigprop", epochs=2, observers=[tap]), CASE.blocks()
    first = [message for event, message in tap.messages if isinstance(message, Up) and event.target == "block1"]
    made = [OPTIMIZERS["sgd"](list(block.parameters())) for block in blocks]
    weights = [[flat(block)] for block in blocks]
    coded = run.trainer.workers[0].upper
    for (x, y, _), up in zip(CASE.batches() * 2, first, strict=True):
        h, t = coded.receive((), Data(0, batch=0, inputs=x, targets=y)).chunk(2)
        assert torch.equal(h, x)
        for k, block in enumerate(blocks[:-1]):
            h, t = block(h.detach()), block(t.detach())
            if k == 0:
                torch.testing.assert_close(up.payload, (h.detach(), t.detach()))
            loss = torch.zeros((), dtype=torch.float64)
            for i, one in enumerate(h):
                scores = torch.stack([one @ other for other in t])
                loss = loss + torch.log(torch.exp(scores).sum()) - scores[i]
            (loss / len(x)).backward()
        F.cross_entropy(blocks[-1](h.detach()), y).backward()
        for k, block in enumerate(blocks):
            made[k].step()
            made[k].zero_grad()
            weights[k].append(flat(block))
    compare(run.weights, weights)


def test_a_class_has_one_code_shaped_like_the_input_that_the_seed_decides():
    torch.manual_seed(3)
    coded = Coded(place(0, (4,), (2, 3, 3)), "sigprop", 2)
    torch.manual_seed(3)
    again = Coded(place(0, (4,), (2, 3, 3)), "sigprop", 2)
    x, labels = torch.randn(5, 2, 3, 3), torch.tensor([2, 0, 2, 1, 0])
    h, t = coded.receive((), Data(0, batch=0, inputs=x, targets=labels)).chunk(2)
    assert torch.equal(h, x)
    assert t.shape == x.shape
    for i, j in ((0, 2), (1, 4)):
        assert torch.equal(t[i], t[j])
    assert len({tuple(code.flatten().tolist()) for code in t}) == CLASSES
    assert torch.equal(again.receive((), Data(1, batch=7, inputs=x, targets=labels)), torch.cat([h, t]))


def test_of_images_the_products_of_pixels_are_averaged():
    h, t = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    by_hand = torch.zeros(3, 3)
    for i in range(3):
        for j in range(3):
            by_hand[i, j] = sum(float(h[i, :, r, c] @ t[j, :, r, c]) for r in range(2) for c in range(5)) / 10
    expected = F.cross_entropy(by_hand, torch.arange(3))
    found = Meeting(place(0, (4, 2, 5)), 2).objective(torch.cat([h, t]), None)
    torch.testing.assert_close(found, expected)


def test_equal_targets_make_it_a_softmax_over_classes():
    """The gradient for the inputs is that of a classifier whose weights are the targets, with counts as prior."""
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    codes = torch.randn(CLASSES, 4)
    h = torch.randn(6, 4, requires_grad=True)
    loss = Meeting(place(0, (4,)), 2).objective(torch.cat([h, codes[labels]]), None)
    (found,) = torch.autograd.grad(loss, h)
    prior = torch.bincount(labels).float().log()
    (expected,) = torch.autograd.grad(F.cross_entropy(h @ codes.T + prior, labels), h)
    torch.testing.assert_close(found, expected)


def test_both_streams_go_up_and_only_the_inputs_to_the_last_block_and_targets_only_to_both_ends():
    tap = Tap()
    train(CASE, "sigprop", observers=[tap])
    ups: list[Any] = [(e.target, m) for e, m in tap.messages if isinstance(m, Up)]
    assert {target: len(m.payload) for target, m in ups} == {"block1": 2, "block2": 1}
    assert {e.target for e, m in tap.messages if isinstance(m, Data)} == {"block0", "block2"}


def test_the_network_that_is_evaluated_is_the_plain_one():
    run = train(CASE, "sigprop")
    x, y, _ = CASE.batches()[0]
    h = x
    for block in run.trainer.model:
        h = block(h)
    expected = {"loss": float(F.cross_entropy(h, y).detach()), "accuracy": float((h.argmax(1) == y).double().mean())}
    assert run.trainer.evaluate([(x, y)]) == pytest.approx(expected)
    assert Signal().substitutes


def test_inputs_come_to_lie_with_the_targets_of_their_own_label(tellable):
    x, y, how = tellable
    run = train(CASE, "sigprop", epochs=10, **how)
    coded, shown = run.trainer.workers[0].upper, torch.arange(3)
    codes = coded.receive((), Data(0, batch=0, inputs=torch.zeros(3, 12), targets=shown)).chunk(2)[1]
    for network in (run.trainer.model[:1], run.trainer.model[:2]):
        nearest = (network(x) @ network(codes).T).argmax(1)
        assert (nearest == y).double().mean() > 0.9


@pytest.mark.parametrize("method", ["sigprop", "forward_forward"])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.randn(4, 5), torch.rand(4), r"needs class numbers \(N,\)"),
        (torch.randn(4, 5), torch.zeros(4, 2, dtype=torch.int64), r"needs class numbers \(N,\)"),
        (torch.randint(3, (4, 5)), torch.arange(4), r".*got targets torch.int64 \(4,\) and inputs torch.int64"),
        (torch.randn(4, 5), torch.tensor([0, 1, -100, 2]), "needs a label for every sample"),
    ],
    ids=["numbers", "positions", "integers", "ignored"],
)
def test_data_without_a_class_per_sample_are_one_line(method, x, y, message):
    made = Coded if method == "sigprop" else Written
    with pytest.raises(UserError, match=f"^{method} {message}"):
        made(place(0, (4,)), method, 2).receive((), Data(0, batch=0, inputs=x, targets=y))


@pytest.mark.parametrize("outputs", [(1,), (3, 7)])
def test_networks_without_a_class_per_sample_are_one_line(outputs):
    there = Place(0, 2, F.cross_entropy, ((4,), outputs), (5,), (nn.Linear(5, 4), nn.Linear(4, 1)))
    with pytest.raises(UserError, match="sigprop needs one decision per sample between at least 2 classes"):
        Coded(there, "sigprop", 2)


def test_labels_may_be_bytes():
    coded, labels = Coded(place(0, (4,)), "sigprop", 2), torch.tensor([2, 0, 1])
    made = [
        coded.receive((), Data(0, batch=0, inputs=torch.ones(3, 5), targets=labels.to(kind)))
        for kind in (torch.uint8, torch.int64)
    ]
    assert torch.equal(*made)


def test_a_weight_counts_a_sample_as_often():
    """Weights 2, 0 and 1 are the first sample twice and the last one once, among the same targets."""
    y, weights = torch.randn(6, 4), torch.tensor([2.0, 0.0, 1.0])
    found = Meeting(place(0, (4,)), 2).objective(y, Data(0, batch=0, weights=weights))
    rows = F.cross_entropy(y[:3] @ y[3:].T, torch.arange(3), reduction="none")
    torch.testing.assert_close(found, (2 * rows[0] + rows[2]) / 3)
    specs = ("sigprop", {"name": "self_paced", "boss": "sigprop"})
    plain, weighed = (train(TWO, spec, epochs=3).weights for spec in specs)
    assert not torch.equal(plain[0][-1], weighed[0][-1])
    with pytest.raises(UserError, match="weighs samples, and block1 gets no data of its own"):
        train(CASE, {"name": "self_paced", "boss": "sigprop"})


def test_large_images_fit_into_half_precision():
    """The sum over all pixels is beyond float16; it is taken in float32, whatever the block computes in."""
    y = torch.full((4, 64, 96, 96), 1.5, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        found = Meeting(place(0, (64, 96, 96)), 2).objective(y, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(2.0).log())
