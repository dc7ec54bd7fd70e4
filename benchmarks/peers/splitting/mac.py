"""MAC, the method of auxiliary coordinates (Carreira-Perpinan and Wang 2014): a quadratic penalty that grows.

    min ||Y - W_L a_{L-1} - b_L||^2 / 2 + (mu/2) sum_{l<L} ||a_l - relu(W_l a_{l-1} + b_l)||^2

    W step   every layer alone: the last by ridge regression, the others by gradient steps with backtracking
    Z step   every sample alone: gradient steps with backtracking on a_1 .. a_{L-1}

mu doubles every `patience` iterations. The original fits the layers with whatever fits one, and takes Gauss-Newton
steps for the coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.benchmarks.peers.splitting.common import Layers, affine, backtracked, forward, initial, ridge


def descend(value, x: Tensor, theta: float, count: int) -> Tensor:
    """`count` gradient steps with backtracking on `value`."""
    for _ in range(count):
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), leaf)
        with torch.no_grad():
            x = backtracked(value, x.detach(), gradient, theta)
    return x


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones_like(a[:, :1])], 1)


def steps(
    x: Tensor,
    targets: Tensor,
    widths: Sequence[int],
    seed: int = 0,
    mu: float = 0.1,
    patience: int = 10,
    inner: int = 2,
) -> Iterator[Layers]:
    """Train; yields the layers after every iteration."""
    layers = initial(widths, seed, 0.05, 0.0)
    _, a = forward(layers, x)
    y, last = F.one_hot(targets, widths[-1]).to(x), len(layers) - 1
    iteration = 0
    while True:
        for k in range(last):
            ones, wanted = with_ones(a[k]), a[k + 1]
            fit = lambda Wb, ones=ones, wanted=wanted: (wanted - (ones @ Wb.T).relu()).square().mean() / 2  # noqa: E731
            Wb = descend(fit, torch.cat([layers[k][0], layers[k][1][:, None]], 1), 1e-3, inner)
            layers[k] = (Wb[:, :-1], Wb[:, -1])
        Wb = ridge(with_ones(a[last]), y, 1e-3 * len(x))
        layers[last] = (Wb[:, :-1], Wb[:, -1])
        for k in range(1, last + 1):

            def cost(v: Tensor, k: int = k, mu: float = mu) -> Tensor:
                above = affine(layers[k], v)
                up = (y - above).square().sum() if k == last else mu * (a[k + 1] - above.relu()).square().sum()
                return (up + mu * (v - affine(layers[k - 1], a[k - 1]).relu()).square().sum()) / 2

            a[k] = descend(cost, a[k], mu, inner)
        iteration += 1
        if iteration % patience == 0:
            mu *= 2
        yield list(layers)
