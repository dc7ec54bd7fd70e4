"""The two halves of a backward: together they are the whole one, to the last bit and without a second walk."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from decoupled.tape import Tape, joins


class Tied(nn.Module):
    """One weight in two places, and one that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x).tanh()) + x


class Apart(nn.Module):
    """A weight on a path of its own, and an output that does not depend on the input."""

    def __init__(self, uses_input):
        super().__init__()
        self.uses_input, self.weight, self.scale = uses_input, nn.Parameter(torch.randn(4)), nn.Parameter(torch.ones(4))

    def forward(self, x):
        row = (self.weight * self.scale).exp()
        return x * row if self.uses_input else row.expand(len(x), 4)


NETWORKS = {
    "layers": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
    "norms": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.PReLU(), nn.Linear(6, 4)),
    "images": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.GroupNorm(1, 3),
                                    nn.Flatten(), nn.Linear(27, 4)),
    "attention": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, 0.0), nn.Flatten()),
    "tied": Tied,
    "a path of its own": lambda: Apart(True),
    "no input": lambda: Apart(False),
    "frozen": lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 4)),
    "nothing to train": nn.Tanh,
}  # fmt: skip


def tape(name):
    torch.manual_seed(0)
    module, x = NETWORKS[name](), torch.randn(5, 4, requires_grad=True)
    y = module(x)
    return Tape(x, y, list(module.parameters())), torch.randn_like(y)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_halves_are_the_whole_to_the_last_bit(name):
    (whole, cotangent), (split, same) = tape(name), tape(name)
    to_x, to_weights = whole.vjp(cotangent, to_input=True, to_weights=True, again=False)
    first, nothing = split.vjp(same, to_input=True, to_weights=False, again=True)
    none, second = split.vjp(same, to_input=False, to_weights=True, again=False)
    assert (nothing, none) == ([], None)
    torch.testing.assert_close(first, to_x, rtol=0, atol=0)
    assert len(second) == len(to_weights)
    for mine, theirs in zip(second, to_weights, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if name != "tied" else 1e-6)


def leads_to(node, end):
    return node is end or any(below is not None and leads_to(below, end) for below, _ in node.next_functions)


def everything(node):
    return {node}.union(*(everything(below) for below, _ in node.next_functions if below is not None))


@pytest.mark.parametrize("name", ["layers", "norms", "images", "attention", "frozen", "a path of its own"])
def test_the_second_half_walks_no_chain(name):
    """No node from which the input can be reached runs in it, but for the joins; in the whole all of them do."""
    recorded, cotangent = tape(name)
    met = set(joins(recorded.x, recorded.y, [w for w in recorded.weights if w.requires_grad]))
    assert None not in met
    bottom = get_gradient_edge(recorded.x).node
    chain: set[Any] = {n for n in everything(recorded.y.grad_fn) if leads_to(n, bottom)} - {bottom}
    walked: list = []
    handles = [node.register_prehook(lambda _, node=node: walked.append(node)) for node in chain]
    recorded.vjp(cotangent, to_input=True, to_weights=False, again=True)
    assert set(walked) == chain
    walked.clear()
    recorded.vjp(cotangent, to_input=False, to_weights=True, again=True)
    assert len(walked) == len(set(walked))
    assert set(walked) == met
    walked.clear()
    recorded.vjp(2 * cotangent, to_input=False, to_weights=True, again=True)
    used = {n for n in chain if any(leads_to(n, join) for join in met)}
    assert set(walked) == used  # another cotangent: the chain down to the lowest join, again
    for handle in handles:
        handle.remove()


def test_another_cotangent_is_walked_for_whole():
    recorded, cotangent = tape("layers")
    recorded.vjp(cotangent, to_input=True, to_weights=False, again=True)
    _, found = recorded.vjp(2 * cotangent, to_input=False, to_weights=True, again=True)
    _, single = recorded.vjp(cotangent, to_input=False, to_weights=True, again=False)
    for twice, once in zip(found, single, strict=True):
        assert once is not None
        torch.testing.assert_close(twice, 2 * once)
