"""AugLocal: which layers are taken, that they are the block's own, the step by hand, and what cannot be copied."""

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled import models
from decoupled.coupling import Place
from decoupled.errors import UserError
from decoupled.flops import cost
from decoupled.methods.local_parallelism.auxiliary import chosen, depth, renewed
from decoupled.testing import OPTIMIZERS, Case, compare, flat, train

CASE = Case(widths=(4, 5, 3, 4, 5, 6, 3), cuts=(1, 2, 3, 4, 5), sizes=(6, 6, 6, 5))
K = CASE.K


def place(k, K):
    return Place(k, K, F.cross_entropy, ((2,),) * K)


@pytest.mark.parametrize(
    ("last", "layers", "depth", "units"),
    [
        (0, 9, 2, [4, 8]),
        (0, 9, 4, [2, 4, 6, 8]),
        (3, 9, 2, [6, 8]),  # 5.5 rounds to even
        (0, 9, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (6, 9, 5, [7, 8]),
        (8, 9, 3, []),
    ],
)
def test_layers_are_evenly_spread_up_to_the_last(last, layers, depth, units):
    assert chosen(last, layers, depth) == units


def test_fewer_layers_towards_the_top():
    """max(1, round(d (1 - t) + t)), t = c k / (K - 2)."""
    assert [depth(place(k, 10), 9, 0.5) for k in range(9)] == [9, 8, 8, 8, 7, 6, 6, 6, 5]
    assert [depth(place(k, 10), 9, 0.0) for k in range(9)] == [9] * 9
    assert [depth(place(k, 10), 9, 1.0) for k in (0, 8)] == [9, 1]
    assert [depth(place(0, K), 3, 0.5) for K in (2, 3)] == [3, 3]


def fresh(spec, blocks=None) -> list[Any]:
    case = Case(CASE.widths, CASE.cuts, CASE.sizes[:1], CASE.seed)
    run = train(case, spec, blocks=blocks, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    return [cast(nn.Module, worker.lower.module) for worker in run.trainer.workers[: K - 1]]


def test_the_step_by_hand():
    """Every inner block descends the loss behind its copies; the weights of the copies are the library's."""
    spec = {"name": "auglocal", "depth": 2, "decline": 0.0}
    run = train(CASE, spec, optimizer=OPTIMIZERS["momentum"], epochs=2)
    blocks, networks = CASE.blocks(), fresh(spec)
    made = [OPTIMIZERS["momentum"](list(m.parameters())) for m in [*blocks, *networks]]
    weights = [[flat(block)] for block in blocks]
    for x, target, _ in CASE.batches() * 2:
        h = x
        for k, block in enumerate(blocks):
            h = block(h.detach())
            out = h
            if k < K - 1:
                linear = [layer for layer in networks[k].modules() if isinstance(layer, nn.Linear)]
                tanh = follows_tanh(networks[k])
                for layer, bends in zip(linear, tanh, strict=True):
                    out = out @ layer.weight.T + layer.bias
                    out = out.tanh() if bends else out
            F.cross_entropy(out, target).backward()
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
        for versions, block in zip(weights, blocks, strict=True):
            versions.append(flat(block))
    compare(run.weights, weights)


def follows_tanh(network):
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Tanh)]
    pairs = zip(layers, [*layers[1:], None], strict=True)
    return [isinstance(behind, nn.Tanh) for layer, behind in pairs if isinstance(layer, nn.Linear)]


def test_sizes_of_the_copies_and_of_what_fits_them_in():
    """Block 0 gives 5 features; units 1 .. 4 are copied, of which 2 and 4 need 3 and 5 features."""
    first = fresh({"name": "auglocal", "depth": 2, "decline": 0.0})[0]
    sizes = [(m.in_features, m.out_features) for m in first.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(5, 3), (3, 4), (4, 5), (5, 6), (6, 3)]
    last = fresh({"name": "auglocal", "depth": 2, "decline": 0.0})[K - 2]
    assert [(m.in_features, m.out_features) for m in last.modules() if isinstance(m, nn.Linear)] == [(6, 3)]


def test_copies_are_new_and_the_blocks_own():
    blocks = CASE.blocks()
    networks = fresh({"name": "auglocal", "depth": 9}, blocks)
    theirs = {p.data_ptr() for block in blocks for p in block.parameters()}
    values = [p.detach() for block in blocks for p in block.parameters()]
    for network in networks:
        for p in network.parameters():
            assert p.data_ptr() not in theirs
            assert p.requires_grad
            assert not any(p.shape == v.shape and torch.equal(p, v) for v in values)


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
def test_residual_networks_and_dropout(runtime):
    """Halved images and doubled channels get adapters; dropout does not come along, so nothing unseeded is drawn."""
    x, y = torch.randn(6, 1, 8, 8), torch.randint(3, (6,))
    weights = []
    for noise in (0, 1):
        units = models.build("resnet14", (1, 8, 8), 3)
        units[2].add_module("dropout", nn.Dropout(0.5))
        torch.manual_seed(noise)
        blocks = [nn.Sequential(unit) for unit in units]
        run = train(CASE, "auglocal", blocks=blocks, batches=[(x, y)] * 2, runtime=runtime)
        weights.append(run.weights)
        modules = [m for worker in run.trainer.workers for m in (worker.lower.module or nn.Identity()).modules()]
        assert not any(isinstance(m, nn.Dropout) for m in modules)
        assert any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in modules)
    compare(*weights, tolerance=0.0)


def test_sequences_keep_their_length():
    units = models.build({"name": "transformer", "width": 8, "depth": 3, "heads": 2}, (6,), 11)
    tokens = torch.randint(11, (4, 7))
    run = train(CASE, "auglocal", blocks=units, batches=[(tokens[:, :-1], tokens[:, 1:])] * 2)
    first: Any = run.trainer.workers[0].lower.module
    assert [type(layer).__name__ for layer in first.children()] == ["TransformerBlock"] * 2 + ["Sequential"]


def test_two_copies_of_a_layer_cost_four_times_the_work_of_a_greedy_block():
    """f + w without them; they add two forwards and two full backwards."""
    units: list[nn.Module] = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(9)]
    blocks = [nn.Sequential(unit) for unit in [*units, nn.Linear(64, 3)]]
    greedy, augmented = (
        cost(blocks, (64,), spec).blocks[3] for spec in ("greedy_local", {"name": "auglocal", "decline": 0.0})
    )
    assert augmented.work - augmented.head == greedy.work - greedy.head == 2 * greedy.forward
    assert augmented.head == greedy.head + 6 * greedy.forward


class Scale(nn.Module):
    """A layer with weights that nobody knows how to initialise."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.weight


def test_what_cannot_be_copied_is_one_line():
    with pytest.raises(UserError, match="unit 4 holds a Scale with weights and no reset_parameters, so it cannot be"):
        renewed(nn.Sequential(nn.Linear(3, 3), Scale()), 4)
    with pytest.raises(UserError, match=r"needs a depth of at least 1 and a decline from 0 to 1, got 0 and 0\.5"):
        train(CASE, {"name": "auglocal", "depth": 0})
