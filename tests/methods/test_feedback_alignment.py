"""Feedback alignment: the updates of the equations, by hand, and what they depend on (A8, E4)."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import OperationError
from decoupled.methods.feedback_alignment import feedback
from decoupled.testing import Case, compare, flat, train

CASE = Case(widths=(4, 5, 3, 4, 5, 3), cuts=(1, 2, 4), sizes=(6,) * 9 + (4,))
K, LR = CASE.K, 0.2
FEATURES = [5, 3, 5]  # of the outputs of blocks 0, 1 and 2


def matrices(seed=0):
    """B_k as the seed gives them: uniform with variance 1 / classes."""
    torch.manual_seed(seed)
    return [(2 * torch.rand(3, n) - 1).double() * math.sqrt(3 / 3) for n in FEATURES]


def gradients(signals, blocks, x, y):
    """One vector per block: the chain rule inside of a block, `signals(k, e)` at its end, the true loss at the top."""
    inputs, found = [x], []
    for block in blocks:
        inputs.append(block(inputs[-1]).detach())
    out = inputs[-1].requires_grad_()
    (e,) = torch.autograd.grad(F.cross_entropy(out, y), out)
    for k, block in enumerate(blocks):
        h = block(inputs[k].detach())
        signal = e if k == len(blocks) - 1 else signals(k, e)
        found.append(
            torch.cat([g.flatten() for g in torch.autograd.grad((h * signal).sum(), list(block.parameters()))])
        )
    return found


def at(versions):
    """The network with these weights, one vector per block."""
    blocks = CASE.blocks()
    for block, vector in zip(blocks, versions, strict=True):
        nn.utils.vector_to_parameters(vector.clone(), block.parameters())
    return blocks


def by_hand(signals, late):
    history = [[flat(block)] for block in CASE.blocks()]
    for n, (x, y, _) in enumerate(CASE.batches()):
        met = at([history[k][max(0, n - late[k])] for k in range(K)])
        for k, g in enumerate(gradients(lambda k, e, y=y: signals(k, e, y), met, x, y)):
            history[k].append(history[k][n] - LR * g)
    return history


@pytest.mark.parametrize("recompute", [False, True])
def test_dfa_projects_the_error_at_the_output(recompute):
    B = matrices()
    expected = by_hand(lambda k, e, y: e @ B[k], late=[3, 2, 1, 0])
    compare(train(CASE, {"name": "dfa", "recompute": recompute}).weights, expected)


def test_drtp_projects_the_targets():
    B = matrices()
    expected = by_hand(lambda k, e, y: F.one_hot(y, 3).double() @ B[k] / len(y), late=[0, 0, 0, 0])
    compare(train(CASE, "drtp").weights, expected)


def layers(blocks: Any):
    return [unit for block in blocks for unit in block]


def chain_of_layers(signs, tied=False, late=(0, 0, 0, 0)):
    """Every layer's weight gradient from the gradient that has come through B, or |B| sign(W), of the layers above."""
    torch.manual_seed(0)
    fixed = [nn.init.xavier_uniform_(torch.empty(unit[0].weight.shape)).double() for unit in layers(CASE.blocks())]
    history = [[flat(block)] for block in CASE.blocks()]
    for n, (x, y, _) in enumerate(CASE.batches()):
        blocks, inputs = at([history[k][max(0, n - late[k])] for k in range(K)]), [x]
        units = list(zip(layers(blocks), fixed, strict=True))
        for unit, _ in units:
            inputs.append(unit(inputs[-1]).detach())
        logits, grads = inputs[-1].requires_grad_(), []
        (delta,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
        for i, (unit, B) in reversed(list(enumerate(units))):
            d = delta * (1 - inputs[i + 1] ** 2) if len(unit) > 1 else delta
            grads.insert(0, torch.cat([(d.T @ inputs[i]).flatten(), d.sum(0)]).detach())
            W = unit[0].weight.detach()
            delta = d @ (W if tied else B.abs() * W.sign() if signs else B)
        for k, block in enumerate(blocks):
            g = torch.cat([grads.pop(0) for _ in layers([block])])
            history[k].append(history[k][n] - LR * g)
    return history


@pytest.mark.parametrize("signs", [False, True])
def test_fa_goes_back_through_a_matrix_of_its_own_in_every_layer(signs):
    compare(train(CASE, {"name": "fa", "signs": signs}).weights, chain_of_layers(signs))
    with pytest.raises(AssertionError, match="differs by"):
        compare(train(CASE, "fa").weights, train(CASE, "backprop").weights)


def test_fa_with_the_weights_themselves_is_backpropagation(monkeypatch):
    """A8."""
    compare(chain_of_layers(signs=False, tied=True), train(CASE, "backprop").weights)
    monkeypatch.setattr(feedback._Feedback, "_as", lambda self, weight, B: weight.detach())
    compare(train(CASE, "fa").weights, train(CASE, "backprop").weights)


@pytest.mark.parametrize("recompute", [False, True])
def test_random_feedback_goes_with_late_gradients(recompute):
    """A correction as any other: through the weights of the forward or recomputed, the graph is the same."""
    spec = {"name": "pipedream", "recompute": recompute, "corrections": ["random_feedback"]}
    compare(train(CASE, spec).weights, chain_of_layers(signs=False, late=(3, 2, 1, 0)))


def test_convolutions_have_feedback_too():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), torch.randn(4, 2, 6, 6, requires_grad=True)
    (B,), d = (torch.randn_like(conv.weight),), torch.randn(4, 3, 3, 3)
    with feedback._Replaced({id(conv.weight): B}):
        y = conv(x)
    assert torch.equal(y, conv(x))
    found = torch.autograd.grad(y, [x, conv.weight], d)
    expected = F.conv_transpose2d(d, B, stride=2, padding=1, output_padding=1)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], torch.autograd.grad(conv(x), conv.weight, d)[0])


@pytest.mark.parametrize("name", ["fa", "dfa", "drtp"])
def test_the_matrices_come_from_the_seed(name):
    first, again, other = (train(CASE, name, seed=seed).weights for seed in (3, 3, 4))
    compare(first, again, tolerance=0.0)
    with pytest.raises(AssertionError, match="block 0 differs"):
        compare(first, other)


def test_with_the_transposed_jacobian_dfa_is_backpropagation(monkeypatch):
    """A8, for a network of linear blocks, whose Jacobian is the same for every sample."""

    def blocks():
        torch.manual_seed(1)
        return [nn.Linear(4, 5).double(), nn.Linear(5, 4).double(), nn.Linear(4, 3).double()]

    def first(name):
        net, seen = blocks(), []

        def frozen(parameters):
            made = torch.optim.SGD(parameters, lr=0.0)
            made.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in parameters]))
            return made

        run: Any = train(CASE, name, blocks=net, optimizer=frozen, batches=CASE.batches()[:1])
        return run, sorted(seen, key=lambda grads: len(grads[0]) * 10 + grads[0].shape[1])

    from decoupled.methods.feedback_alignment import method as family

    weights = [block.weight.detach() for block in blocks()]
    through = {(5,): weights[2] @ weights[1], (4,): weights[2]}
    drawn = family._Projection.__init__

    def transposed(self, place):
        drawn(self, place)
        self._matrix = through[place.shapes[place.k]]

    monkeypatch.setattr(family._Projection, "__init__", transposed)
    for mine, theirs in zip(first("dfa")[1], first("backprop")[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("name", "moved"), [("drtp", []), ("dfa", [0, 1, 2]), ("fa", [0, 1, 2])])
def test_what_later_blocks_matter_for(name, moved):
    """E4: under drtp nothing above a block matters to it; under dfa it does, through the error."""
    base, blocks = train(CASE, name).weights, CASE.blocks()
    with torch.no_grad():
        for p in blocks[-1].parameters():
            p.mul_(1.5).add_(0.1)
    other = train(CASE, name, blocks=blocks).weights
    assert [k for k in range(K - 1) if not torch.equal(base[k][-1], other[k][-1])] == moved


def test_errors_are_small_messages():
    """The error has the size of the output, whatever the blocks below it have."""
    blocks = train(CASE, "dfa").trainer.statistics()
    assert [block.bytes_down for block in blocks] == [0] + [8 * 3 * sum(CASE.sizes)] * 3


def test_targets_must_be_class_numbers():
    batches = [(x, F.one_hot(y, 3).double()) for x, y, _ in CASE.batches()]
    with pytest.raises(OperationError, match="random target projection needs class numbers, got targets"):
        train(CASE, "drtp", batches=batches)
