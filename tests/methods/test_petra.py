"""Reversible blocks: how exactly they reverse, what they keep, and that PETRA does what its equations say (D1-D3)."""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import OperationError, Trainer
from decoupled.block import Block
from decoupled.errors import ProtocolError, UserError
from decoupled.models import build
from decoupled.models.revnet import revnet
from decoupled.order import sync
from decoupled.randomness import seeded
from decoupled.reversible import Coupled, Reconstruct, invert, invertible
from decoupled.testing import OPTIMIZERS, Case, compare, flat, point, train

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def residual(width, norm=False):
    return nn.Sequential(nn.Linear(width, width), *[nn.BatchNorm1d(width)] * norm, nn.Tanh(), nn.Linear(width, width))


def network(norm=False, units=2):
    """Blocks 1 and 2 are reversible, the stem and the classifier are not."""
    with seeded(0):
        return [
            nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double(),
            nn.Sequential(*[Coupled(residual(3, norm)) for _ in range(units)]).double(),
            nn.Sequential(*[Coupled(residual(3, norm)) for _ in range(units)]).double(),
            nn.Sequential(nn.Linear(6, 3)).double(),
        ]


SAMPLES = Case(widths=(4, 3), cuts=(), sizes=(8,) * 10)


def fit(method, blocks, optimizer=OPTIMIZERS["momentum"], **options):
    return train(SAMPLES, method, blocks=blocks, optimizer=optimizer, **options)


# --- the inverse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("depth", [1, 8, 32])
def test_the_input_comes_back_up_to_rounding(dtype, depth):
    """D1: each unit adds and subtracts the same number, so the error is a few units in the last place per unit."""
    torch.manual_seed(0)
    units = nn.Sequential(*[Coupled(residual(16)) for _ in range(depth)]).to(dtype)
    x = torch.randn(8, 32, dtype=dtype)
    with torch.no_grad():
        y = units(x)
        error = float((invert(units, y) - x).abs().max())
    assert 0 < error <= 8 * depth * EPS[dtype] * float(y.abs().max())


def test_the_network_for_images_reverses_in_training_mode():
    """Batch statistics are those of the same stream on the way back."""
    units = revnet((1, 12, 12), 10, width=4, stages=2, units=2)
    assert [invertible(unit) for unit in units] == [False, True, True, False, True, True, False]
    x = torch.randn(5, 1, 12, 12)
    with torch.no_grad():
        h = units[0](x)
        for unit in units[1:3]:
            y = unit(h)
            assert y.shape == h.shape
            torch.testing.assert_close(invert(unit, y), h, rtol=0, atol=2e-5)
            h = y
        for unit in units[3:]:
            h = unit(h)
    assert h.shape == (5, 10)
    assert len(build({"name": "revnet", "width": 2}, (1, 28, 28), 10)) == 10
    with pytest.raises(UserError, match="revnet takes images"):
        revnet((4,), 10)
    with pytest.raises(UserError, match="units must be an integer of at least 1, got 0"):
        revnet((1, 8, 8), 10, units=0)


def test_the_error_grows_linearly_with_how_far_the_weights_have_moved():
    torch.manual_seed(0)
    unit = Coupled(residual(5)).double()
    x = torch.randn(8, 10, dtype=torch.float64)
    with torch.no_grad():
        y, before = unit(x), [p.clone() for p in unit.parameters()]
        errors = []
        for step in (1e-6, 1e-5, 1e-4):
            for p, old in zip(unit.parameters(), before, strict=True):
                p.copy_(old + step * old.cos())
            errors.append(float((unit.inverse(y) - x).norm()) / step)
    assert errors[1:] == pytest.approx(errors[:1] * 2, rel=1e-3)


# --- the method ---------------------------------------------------------------------------------------------------


def test_at_frozen_weights_it_is_backpropagation():
    """D2; the reversible path is really taken: nothing is held there."""
    seen: Any = {}
    for name in ("petra", "backprop"):
        blocks, seen[name] = network(), [[] for _ in range(4)]

        def frozen(parameters, blocks=blocks, rows=seen[name]):
            made = torch.optim.SGD(parameters, lr=0.0)
            k = next(k for k, block in enumerate(blocks) if next(block.parameters()) is parameters[0])
            made.register_step_pre_hook(lambda *_: rows[k].append(torch.cat([p.grad.flatten() for p in parameters])))
            return made

        fit(name, blocks, frozen)
    for mine, theirs in zip(seen["petra"], seen["backprop"], strict=True):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=0, atol=1e-13)


def test_reversible_blocks_keep_nothing_and_the_others_their_inputs():
    blocks = fit("petra", network()).trainer.statistics()
    assert [block.peak_in_flight for block in blocks] == [7, 5, 3, 1]
    assert [block.peak_held_bytes for block in blocks[:3]] == [7 * 8 * 4 * 8, 0, 0]
    assert [max(block.staleness) for block in blocks] == [6, 4, 2, 0]


def test_every_update_is_the_one_of_the_equations():
    """x~ = F^-1(x~ above; w today), delta and the weight gradient by vjp at x~ with w today (Rivaud et al., eq. 5)."""
    lr, late = 0.3, [6, 4, 2, 0]
    found = fit("petra", network(), lambda parameters: torch.optim.SGD(parameters, lr=lr))
    shapes = [[p.shape for p in block.parameters()] for block in network()]

    def at(k, vector):
        block = network()[k]
        parts = vector.split([shape.numel() for shape in shapes[k]])
        with torch.no_grad():
            for p, part in zip(block.parameters(), parts, strict=True):
                p.copy_(part.view(p.shape))
        return block

    history = [[flat(block)] for block in network()]
    for n, (x, y, _) in enumerate(SAMPLES.batches()):
        inputs = [x]
        for k in range(4):
            inputs.append(at(k, history[k][max(0, n - late[k])])(inputs[-1]).detach())
        output: Any = None
        delta: Any = None
        for k in reversed(range(4)):
            block = at(k, history[k][n])
            h = inputs[k] if k in (0, 3) else invert(block, output).detach()
            h = h.clone().requires_grad_()
            out = block(h)
            loss = F.cross_entropy(out, y) if k == 3 else (out * delta).sum()
            delta, *grads = torch.autograd.grad(loss, [h, *block.parameters()])
            output = h.detach()
            history[k].append(history[k][n] - lr * torch.cat([g.flatten() for g in grads]))
    compare(found.weights, history)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_where_nothing_is_reversible_it_is_dsp(microbatches):
    """Remove the reversible part, and what is left replays inputs with today's weights."""
    case = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2), sizes=(6,) * 9)
    petra = {"name": "petra", "microbatches": microbatches}
    dsp = replace(point("dsp"), order=point(petra).order, feed=point(petra).feed)
    compare(train(case, petra).weights, train(case, dsp).weights, tolerance=0.0)


class Unknown(nn.Module):
    """A unit that is only known to have an inverse."""

    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, x):
        return self.unit(x)

    def inverse(self, y):
        return self.unit.inverse(y)


def counted(wrap, norm, size):
    """Train on the first `size` batches; the run, and how often f ran in each reversible block."""
    blocks, calls = network(norm=norm), Counter[int]()
    for k in (1, 2):
        for unit in blocks[k]:
            unit.get_submodule("f").register_forward_hook(lambda *_, k=k: calls.update([k]))
        blocks[k] = nn.Sequential(*map(wrap, blocks[k]))
    return fit("petra", blocks, batches=SAMPLES.batches()[:size]), calls


class Doubling(Coupled):
    """A unit of another form: (2 x2 + f(x1), x1)."""

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return torch.cat((2 * second + self.f(first), first), dim=1)

    def inverse(self, y):
        first, second = y.chunk(2, dim=1)
        return torch.cat((second, (first - self.f(second)) / 2), dim=1)


class Leaky(nn.LeakyReLU):
    """Writes over its input."""

    def __init__(self):
        super().__init__(0.5, inplace=True)

    def inverse(self, y):
        return torch.where(y > 0, y, 2 * y)


@pytest.mark.parametrize("unit", [Doubling(residual(3)), Leaky(), nn.Sequential(Coupled(residual(3)), Leaky())])
def test_other_units_reverse_by_their_own_inverse(unit):
    """At frozen weights the gradients are those of backpropagation."""
    block = nn.Sequential(Coupled(residual(3)), copy.deepcopy(unit), Coupled(residual(3))).double()
    same = copy.deepcopy(block)
    kept, x = Reconstruct(Block(block, "block"), True), torch.randn(8, 6, dtype=torch.float64)
    leaf, given = x.clone().requires_grad_(), torch.randn(8, 6, dtype=torch.float64)
    y = kept.keep(0, x)
    kept.restore(0, y.clone())
    found = kept.open(0).vjp(given, to_input=True, to_weights=True, again=False)
    wanted = torch.autograd.grad(same(leaf.clone()), [leaf, *same.parameters()], given)
    for mine, theirs in zip((found[0], *found[1]), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_an_empty_block_is_not_reversed():
    assert not invertible(nn.Sequential())
    assert not invertible(nn.Sequential(Coupled(residual(3)), nn.Sequential()))


@pytest.mark.parametrize("norm", [False, True])
def test_f_runs_once_in_a_backward_and_that_changes_no_bit(norm):
    """Per batch twice: forward and backward. Of a module of which only the inverse is known three times."""
    runs = []
    for wrap, times in ((lambda unit: unit, 2), (Unknown, 3)):
        (_, few), (run, many) = (counted(wrap, norm, size) for size in (4, 8))  # building runs f, too
        assert {k: many[k] - few[k] for k in (1, 2)} == {1: 4 * 2 * times, 2: 4 * 2 * times}
        runs.append(run)
    compare(runs[0].weights, runs[1].weights, tolerance=0.0)


def test_running_statistics_move_once_per_batch_in_the_forward():
    """D3: neither the inverse nor the recomputed forward counts again."""
    blocks, same = network(norm=True, units=1), network(norm=True, units=1)
    frozen = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    fit("petra", blocks, **frozen)
    fit("backprop", same, **frozen)
    for mine, theirs in zip(nn.Sequential(*blocks).buffers(), nn.Sequential(*same).buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert int(next(b for name, b in blocks[1].named_buffers() if "tracked" in name)) == len(SAMPLES.sizes)


def test_in_the_sync_order_it_is_exact():
    locked = replace(point("petra"), order=sync)
    found, plain = (fit(method, network(norm=True)).weights for method in (locked, "backprop"))
    compare(found, plain)


def test_images_and_threads():
    torch.manual_seed(0)
    units = revnet((1, 8, 8), 3, width=2, stages=2, units=1)
    batches = [(torch.randn(6, 1, 8, 8), torch.randint(3, (6,))) for _ in range(6)]
    loss = nn.functional.cross_entropy
    with Trainer(nn.Sequential(*units), "petra", blocks=[1, 2, 4], loss=loss, optimizer=OPTIMIZERS["sgd"]) as trainer:
        trainer.fit(batches, epochs=2)
        blocks = trainer.statistics()
    assert [block.peak_held_bytes == 0 for block in blocks] == [False, True, False, False]
    assert [block.updates for block in blocks] == [12] * 4
    for block in blocks[1:]:  # twice as many bytes down as up: the activation comes back with its gradient
        assert block.bytes_down == 2 * blocks[block.block - 1].bytes_up


def test_what_cannot_be_reversed_is_refused():
    blocks = network()
    blocks[1] = nn.Sequential(Coupled(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))).double()
    with pytest.raises(OperationError, match="cannot draw again in reverse; leave dropout out of reversible blocks"):
        fit("petra", blocks)
    kept = Reconstruct(Block(network()[1], "block1"), steps_between=True)
    kept.keep(0, torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(ProtocolError, match="pass 0 cannot be reversed, its output has not come back"):
        kept.open(0)
    kept.close(0)
    assert kept.held_bytes == 0


def test_estimated_weights_reverse_too():
    """The correction of the backward's weights applies to the inverse: at a constant drift it is exact."""
    spec = {"name": "petra", "corrections": [{"name": "discrepancy", "decay": 0.1}]}
    found, plain = (fit(method, network()).weights for method in (spec, "petra"))
    with pytest.raises(AssertionError, match="differs by"):
        compare(found, plain)
