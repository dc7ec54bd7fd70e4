"""The splitting peers: every closed form against a grid or its own optimality condition, and that each one learns."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from decoupled import data as datasets
from decoupled.benchmarks.peers.splitting import bcd, dladmm, pdadmm, taylor_admm
from decoupled.benchmarks.peers.splitting.common import (
    backtracked,
    cross_entropy_prox,
    forward,
    initial,
    relu_prox,
    ridge,
)

DOUBLE = torch.float64
scalar, weight = st.floats(-3, 3), st.floats(0.05, 4)


def layer(seed: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(outputs, inputs, generator=draw, dtype=DOUBLE),
        torch.randn(outputs, generator=draw, dtype=DOUBLE),
    )


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@settings(max_examples=80)
@given(center=scalar, a=scalar, alpha=weight, gamma=weight)
def test_the_relu_prox_beats_a_fine_grid(center, a, alpha, gamma):
    """alpha = gamma: dlADMM; alpha = 2 gamma around the mean of two points: pdADMM; other weights: Taylor, BCD."""
    found = relu_prox(torch.tensor([center], dtype=DOUBLE), torch.tensor([a], dtype=DOUBLE), alpha, gamma)
    grid = torch.linspace(-4, 4, 16001, dtype=DOUBLE)

    def cost(z):
        return alpha * (z - center) ** 2 + gamma * (a - z.relu()) ** 2

    assert cost(found) <= cost(grid).min() + 1e-12


@settings(max_examples=40)
@given(m=scalar, old=scalar, q=scalar)
def test_the_output_of_pdadmm_is_the_papers_pair_of_candidates(m, old, q):
    """(z - m)^2 + (q - relu z)^2 + (z - old)^2: min((m + old)/2, 0) or max((m + q + old)/3, 0), the better one."""
    m, old, q = (torch.tensor([v], dtype=DOUBLE) for v in (m, old, q))
    found = relu_prox((m + old) / 2, q, 2.0, 1.0)

    def cost(z):
        return (z - m) ** 2 + (q - z.relu()) ** 2 + (z - old) ** 2

    candidates = torch.cat([((m + old) / 2).clamp_max(0), ((m + q + old) / 3).clamp_min(0)])
    assert cost(found) == pytest.approx(float(cost(candidates).min()))


@settings(max_examples=20)
@given(rho=st.floats(0.05, 5), seed=st.integers(0, 1000))
def test_the_cross_entropy_prox_is_stationary(rho, seed):
    center, targets = some(seed, 4, 3), torch.tensor([0, 2, 1, 1])
    z = cross_entropy_prox(center, targets, rho, center, iterations=4000, tolerance=1e-12)
    gradient = z.softmax(1) - F.one_hot(targets, 3) + rho * (z - center)
    assert gradient.abs().max() < 1e-8


def gradient_of(value, x):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    return gradient


def test_matrix_updates_are_stationary():
    """The gradient of what each update minimises, by autograd, is zero at its result."""
    beta, gamma, rho, alpha = 0.7, 3.0, 1.3, 0.4
    a, z, out = some(1, 9, 4), some(2, 9, 5), some(3, 9, 3)
    (W, b), above = layer(4, 5, 4), layer(5, 3, 5)
    cases = [
        (lambda W: (z - a @ W.T).square().sum() + 0.2 * W.square().sum(), ridge(a, z, 0.2)),
        (
            lambda v: beta * (out - above[1] - v @ above[0].T).square().sum() + gamma * (v - z.relu()).square().sum(),
            taylor_admm.hidden(above, out, z, beta, gamma),
        ),
        (
            lambda V: rho * (z - b - a @ V.T).square().sum() + alpha * (V - W).square().sum(),
            bcd.weights((W, b), a, z, rho, alpha)[0],
        ),
        (
            lambda v: rho * (z - a @ W.T - v).square().sum() + alpha * (v - b).square().sum(),
            bcd.weights((W, b), a, z, rho, alpha)[1],
        ),
    ]
    for value, found in cases:
        assert gradient_of(value, found).abs().max() < 1e-9


def test_a_backtracked_step_lowers_its_objective():
    """pdADMM's input update and dlADMM's weight update, from anywhere."""
    z, p, q, u, one = some(1, 6, 5), some(2, 6, 4), some(3, 6, 4), some(4, 6, 4), layer(5, 5, 4)

    def value(v):
        return 0.3 / 2 * ((z - v @ one[0].T - one[1]).square().sum() + (v - q).square().sum()) + (u * (v - q)).sum()

    assert value(pdadmm.inputs(one, z, p, q, u, 0.3)) < value(p)
    gradient = gradient_of(value, p)
    candidate = backtracked(value, p, gradient, 1e-3)
    assert value(candidate) < value(p)
    torch.testing.assert_close((p - candidate) / (p - candidate).norm(), gradient / gradient.norm())


def test_dladmms_exact_updates_are_minima():
    x, targets = some(1, 8, 4).float(), torch.arange(8) % 3
    net = dladmm.Network(x, targets, (4, 5, 3), 0, 0.5)
    net.u = torch.randn(8, 3)
    for k in range(2):
        net.bias(k)
        W, b = net.layers[k]
        wanted, a = net.wanted(k), net.a[k]
        gradient = gradient_of(lambda v, W=W, a=a, wanted=wanted: (wanted - a @ W.T - v).square().sum(), b)
        assert gradient.abs().max() < 1e-4


def test_forward_is_a_relu_network():
    layers = initial((4, 5, 3), 0, 0.3, 0.1)
    x = torch.randn(6, 4)
    (W1, b1), (W2, b2) = layers
    torch.testing.assert_close(forward(layers, x)[0][-1], (x @ W1.T + b1).relu() @ W2.T + b2)


@pytest.mark.parametrize(
    ("name", "iterations", "reached"),
    [("dladmm", 30, 0.6), ("pdadmm", 30, 0.8), ("bcd", 10, 0.9), ("taylor_admm", 10, 0.9), ("mac", 25, 0.9)],
)
def test_a_peer_learns_digits(name, iterations, reached):
    data = datasets.load("digits")
    x, test = data.train.inputs.flatten(1), data.test
    steps = importlib.import_module(f"decoupled.benchmarks.peers.splitting.{name}").steps
    layers = next(itertools.islice(steps(x, data.train.targets, (64, 60, 60, 10)), iterations - 1, None))
    right = forward(layers, test.inputs.flatten(1))[0][-1].argmax(1) == test.targets
    assert float(right.float().mean()) > reached
