"""FLOPs: the figures worked out by hand for the wide MLP, every count against a formula, and what cannot be counted."""

import pytest
import torch
from torch import nn

from decoupled.errors import UserError
from decoupled.flops import COUNTED, cost, count
from decoupled.models import mlp, resnet, transformer
from decoupled.testing import label, point, variants

OVERLAPPING, TWO, THREE = "overlapping_local", *({"name": "chunked_local", "chunks": n} for n in (2, 3))


@pytest.fixture(scope="module")
def wide():
    """Eight hidden layers of 4096 for CIFAR-10, one block each; the output layer belongs to the last. No memory."""
    with torch.device("meta"):
        units = mlp((3072,), 10, width=4096, depth=9)
    return [*units[:7], nn.Sequential(*units[7:])]


@pytest.mark.parametrize(
    ("method", "sequential", "total"),
    [("backprop", 755, 755), (TWO, 369, 722), (THREE, 269, 689), (OVERLAPPING, 101, 757), ("greedy_local", 67, 522)],
    ids=str,
)
def test_the_wide_mlp_costs_what_was_worked_out(wide, method, sequential, total):
    """MFLOP per example: notes on Laskin et al. 2020, worked out from the layers' sizes."""
    counted = cost(wide, (3072,), method)
    assert [round(counted.sequential / 1e6), round(counted.total / 1e6)] == [sequential, total]


def test_a_full_backward_is_twice_a_forward(wide):
    """With `skip=False` greedy costs three forwards of its largest layer and head: 101 MFLOP."""
    counted = cost(wide, (3072,), "greedy_local", skip=False)
    assert round(counted.sequential / 1e6) == 101
    for block in counted.blocks:
        assert block.work == pytest.approx(3 * block.forward + block.head)
        assert block.both == 2 * block.forward
    assert cost(wide, (3072,), "backprop", skip=False).total == sum(3 * b.forward for b in counted.blocks)


def test_head_and_update_by_hand(wide):
    first, *_, last = cost(wide, (3072,), "greedy_local", update=4.0).blocks
    assert first.head == 3 * 2 * 4096 * 10
    assert last.head == 0  # its output layer is part of the block
    assert first.update == 4 * (3072 * 4096 + 4096 + 4096 * 10 + 10)
    assert last.update == 4 * (4096 * 4096 + 4096 + 4096 * 10 + 10)


def test_price_and_time_of_a_step(wide):
    """Examples are paid for one by one and run in parallel; so do the updates of the blocks."""
    counted = cost(wide, (3072,), "greedy_local")
    updates = [block.update for block in counted.blocks]
    assert counted.price(64) == 64 * counted.total + sum(updates)
    assert counted.time() == counted.sequential + max(updates)


def test_a_linear_layer():
    layer = count(nn.Linear(5, 7), (5,))
    assert (layer.forward, layer.weights, layer.inputs, layer.both) == (70, 70, 70, 140)


def test_two_linear_layers_go_through_the_upper_one_for_the_lower_ones_weights():
    a, b = 2 * 5 * 7, 2 * 7 * 3
    both = count(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), (5,))
    assert (both.forward, both.weights, both.inputs, both.both) == (a + b, a + 2 * b, a + b, 2 * a + 2 * b)


def test_a_convolution():
    layer = count(nn.Conv2d(3, 8, 3, padding=1), (3, 6, 5))
    assert layer.forward == 2 * 8 * 6 * 5 * 3 * 9
    assert layer.weights == layer.inputs == layer.forward


def test_frozen_weights_and_integers_have_no_gradient_to_pay_for():
    frozen = count(nn.Linear(5, 7).requires_grad_(False), (5,))
    assert (frozen.weights, frozen.inputs) == (0, 70)
    embedding = count(nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 7)), (4,), torch.int64)
    assert (embedding.forward, embedding.inputs) == (4 * 70, 0)


def test_a_transformer_block_and_its_head():
    """Projections 2 * 12 width^2 per token, attention 2 * 2 * length * width per token, the mask not subtracted."""
    with torch.device("meta"):
        units = transformer((16,), 256, width=32, depth=2, heads=4)
    counted = cost(units, (16,), "greedy_local", dtype=torch.int64).blocks
    assert counted[1].forward == 16 * (2 * 12 * 32 * 32 + 4 * 16 * 32)
    assert counted[1].head == 3 * 16 * 2 * 32 * 256
    assert (counted[0].forward, counted[0].weights) == (0, 0)  # look-ups are not products


def test_counting_changes_neither_modules_nor_random_numbers():
    units = resnet((3, 8, 8), 10, depth=8)
    blocks = [nn.Sequential(*units[:3]), nn.Sequential(*units[3:])]
    before = {k: v.clone() for k, v in nn.Sequential(*blocks).state_dict().items()}
    state = torch.random.get_rng_state()
    cost(blocks, (3, 8, 8), "greedy_local")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in nn.Sequential(*blocks).state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for b in blocks for p in b.parameters())


def layers(K=5, width=16):
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(K)]


def test_recomputing_costs_one_more_forward_below_the_top_block():
    kept, again = (cost(layers(), (16,), {"name": "ddg", "recompute": r}) for r in (False, True))
    assert again.total - kept.total == sum(block.forward for block in kept.blocks[:-1])


def test_reach_3_passes_one_gradient_on_twice():
    """Block k sends J_k down and relays J_{k+1}: two input gradients, one weight gradient."""
    f = 2 * 16 * 16
    middle = cost(layers(), (16,), {"name": "overlapping_local", "reach": 3}).blocks[2]
    assert middle.work == f + middle.head + 2 * f + f


def test_making_an_input_is_a_forward():
    true, made = (cost(layers(), (16,), {"name": "dni", "inputs": i}).blocks for i in (False, True))
    assert [b.head - a.head for a, b in zip(true, made, strict=True)] == [0, *[2 * 16 * 16] * 4]


def test_delayed_methods_do_not_take_turns_and_synchronous_ones_do():
    f = 2 * 16 * 16
    assert cost(layers(), (16,), "pipedream").sequential == 3 * f
    assert cost(layers(), (16,), "gpipe").sequential == 5 * 3 * f - f


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_every_method_is_counted_or_refused(spec):
    coupling = point(spec).coupling
    if not {*coupling.up, *coupling.down} <= COUNTED:
        with pytest.raises(UserError, match=r"cannot be counted: it sends .*; measure it instead"):
            cost(layers(), (16,), spec)
        return
    counted = cost(layers(), (16,), spec)
    trained = [bool(point(spec).facts.reach(k, 5)) for k in range(5)]
    assert counted.total >= sum(
        b.forward + b.weights * learns for b, learns in zip(counted.blocks, trained, strict=True)
    )
    assert max(b.work for b in counted.blocks) <= counted.sequential <= counted.total
    assert [k for run in counted.locked for k in run] == list(range(5))
    full = cost(layers(), (16,), spec, skip=False)
    assert full.total >= counted.total


def test_wrong_input_is_one_line():
    with pytest.raises(UserError, match=r"block1 does not take an input of shape \(16,\) per sample; check the blocks"):
        cost([*layers(1), nn.Linear(5, 3)], (16,), "backprop")
    with pytest.raises(UserError, match=r"cannot be traced without data .* takes class numbers"):
        cost(layers(), (16,), "backprop", loss=lambda output, target: output.sum() * output.mean().item())
    with pytest.raises(UserError, match="the network has no blocks"):
        cost([], (16,), "backprop")
