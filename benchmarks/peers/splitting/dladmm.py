"""dlADMM (Wang et al. 2019): a sweep from the output to the input and one back; a dual for the last layer only.

    R(z_L; y) + (nu/2) sum_{l<L} ( ||z_l - W_l a_{l-1} - b_l||^2 + ||a_l - relu(z_l)||^2 )
              + (rho/2) ||z_L - W_L a_{L-1} - b_L + u/rho||^2

    W_l, a_l   one gradient step with backtracking: no matrix is inverted
    b_l, z_l   exact; z_L by FISTA on the cross entropy;   u += rho (z_L - W_L a_{L-1} - b_L)

nu = rho, raised tenfold up to 0.1 when the training loss has risen three times running, as the authors' code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.benchmarks.peers.splitting.common import (
    Layers,
    affine,
    backtracked,
    cross_entropy_prox,
    forward,
    initial,
    relu_prox,
)


class Network:
    """The variables and their updates; `k` counts layers from 0, the last is `last`."""

    def __init__(self, x: Tensor, targets: Tensor, widths: Sequence[int], seed: int, rho: float) -> None:
        self.layers = initial(widths, seed, 0.1, 0.1)
        self.zs, self.a = forward(self.layers, x)
        self.last, self.rho, self.targets = len(self.layers) - 1, rho, targets
        self.zs[self.last] = 2.0 * F.one_hot(targets, widths[-1]).to(x) - 1
        self.u = torch.zeros_like(self.zs[self.last])
        self.theta = 1.0

    def wanted(self, k: int) -> Tensor:
        """What layer k should put out."""
        return self.zs[k] + self.u / self.rho if k == self.last else self.zs[k]

    def weight(self, k: int) -> None:
        (W, b), a, z = self.layers[k], self.a[k], self.wanted(k)
        value = lambda W: self.rho / 2 * (z - affine((W, b), a)).square().sum()  # noqa: E731
        gradient = -self.rho * (z - affine((W, b), a)).T @ a
        self.layers[k] = (backtracked(value, W, gradient, self.theta), b)

    def bias(self, k: int) -> None:
        W, _ = self.layers[k]
        self.layers[k] = (W, (self.wanted(k) - self.a[k] @ W.T).mean(0))

    def activation(self, k: int) -> None:
        """a_k, the output of layer k - 1."""
        layer, target, z = self.layers[k], self.zs[k - 1].relu(), self.wanted(k)

        def value(a: Tensor) -> Tensor:
            return self.rho / 2 * ((a - target).square().sum() + (z - affine(layer, a)).square().sum())

        a = self.a[k]
        gradient = self.rho * ((a - target) - (z - affine(layer, a)) @ layer[0])
        self.a[k] = backtracked(value, a, gradient, self.theta)

    def output(self, k: int) -> None:
        """z_k."""
        m = affine(self.layers[k], self.a[k])
        if k < self.last:
            self.zs[k] = relu_prox(m, self.a[k + 1], 1.0, 1.0)
        else:
            self.zs[k] = cross_entropy_prox(m - self.u / self.rho, self.targets, self.rho, self.zs[k])


def steps(x: Tensor, targets: Tensor, widths: Sequence[int], seed: int = 0, rho: float = 1e-6) -> Iterator[Layers]:
    """Train; yields the layers after every iteration."""
    net = Network(x, targets, widths, seed, rho)
    before, risen = float("inf"), 0
    while True:
        for k in range(net.last, -1, -1):
            if k < net.last:
                net.activation(k + 1)
            net.output(k)
            net.bias(k)
            net.weight(k)
        for k in range(net.last + 1):
            net.weight(k)
            net.bias(k)
            net.output(k)
            if k < net.last:
                net.activation(k + 1)
        net.u = net.u + net.rho * (net.zs[net.last] - affine(net.layers[net.last], net.a[net.last]))
        loss = float(F.cross_entropy(forward(net.layers, x)[0][-1], targets))
        risen, before = (risen + 1 if loss > before else 0), loss
        if risen >= 3 and net.rho < 0.1:
            net.rho, net.theta, risen = min(10 * net.rho, 0.1), 10 * net.theta, 0
        yield list(net.layers)
