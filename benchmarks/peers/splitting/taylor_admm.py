"""Taylor et al. 2016: no gradients, one multiplier on the output only (Bregman iteration).

    W_l = z_l pinv(a_{l-1})
    a_l = argmin beta ||z_{l+1} - W_{l+1} a||^2 + gamma ||a - relu(z_l)||^2
    z_l = argmin beta ||z - W_l a_{l-1}||^2 + gamma ||a_l - relu(z)||^2
    z_L = argmin ||z - y||^2 / 2 + <z, lambda> + (beta/2) ||z - W_L a_{L-1}||^2,   lambda += beta (z_L - W_L a_{L-1})

Layers have no bias, as there; labels are one-hot with a squared loss. `warm` sweeps leave lambda at 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.benchmarks.peers.splitting.common import Layers, affine, forward, initial, relu_prox, ridge


def hidden(above: tuple[Tensor, Tensor], z_above: Tensor, z: Tensor, beta: float, gamma: float) -> Tensor:
    """a_l: (n, width)."""
    W, b = above
    gram = beta * W.T @ W
    gram.diagonal().add_(gamma)
    return torch.linalg.solve(gram, (beta * (z_above - b) @ W + gamma * z.relu()).T).T


def steps(
    x: Tensor, targets: Tensor, widths: Sequence[int], seed: int = 0, beta: float = 1.0, gamma: float = 10.0,
    warm: int = 5, damping: float = 1e-3,
) -> Iterator[Layers]:  # fmt: skip
    """Train; yields the layers after every iteration."""
    layers = initial(widths, seed, 0.05, 0.0)
    zs, a = forward(layers, x)
    y = F.one_hot(targets, widths[-1]).to(x)
    lam = torch.zeros_like(y)
    last = len(layers) - 1
    for iteration in range(10**9):
        for k in range(last):
            layers[k] = (ridge(a[k], zs[k], damping * len(x)), layers[k][1])
            a[k + 1] = hidden(layers[k + 1], zs[k + 1], zs[k], beta, gamma)
            zs[k] = relu_prox(affine(layers[k], a[k]), a[k + 1], beta, gamma)
        layers[last] = (ridge(a[last], zs[last], damping * len(x)), layers[last][1])
        m = affine(layers[last], a[last])
        zs[last] = (y - lam + beta * m) / (1 + beta)
        if iteration >= warm:
            lam = lam + beta * (zs[last] - m)
        yield list(layers)
