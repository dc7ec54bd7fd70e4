"""Zeng et al. 2019: block coordinate descent on three splittings, from the output to the input, full batch.

    min ||V_L - Y||^2 / 2 + sum_l (gamma/2) ||V_l - relu(U_l)||^2 + (rho/2) ||U_l - W_l V_{l-1} - b_l||^2,  V_L near U_L

and alpha/2 times the squared distance from where each variable was. All updates are closed forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.benchmarks.peers.splitting.common import Layers, affine, forward, initial, relu_prox


def weights(layer: tuple[Tensor, Tensor], V: Tensor, U: Tensor, rho: float, alpha: float) -> tuple[Tensor, Tensor]:
    """W_l near the old one, then b_l from the old W_l (as the authors' code does)."""
    W, b = layer
    gram = rho * V.T @ V
    gram.diagonal().add_(alpha)
    new = torch.linalg.solve(gram, alpha * W.T + rho * V.T @ (U - b)).T
    return new, (alpha * b + rho * (U - V @ W.T).sum(0)) / (rho * len(V) + alpha)


def steps(
    x: Tensor, targets: Tensor, widths: Sequence[int], seed: int = 0, gamma: float = 1.0, rho: float = 1.0,
    alpha: float = 5.0,
) -> Iterator[Layers]:  # fmt: skip
    """Train; yields the layers after every iteration."""
    layers = initial(widths, seed, 0.01, 0.1)
    U, V = forward(layers, x)
    y, last = F.one_hot(targets, widths[-1]).to(x), len(layers) - 1
    out = U[last].clone()
    while True:
        out = (y + gamma * U[last] + alpha * out) / (1 + gamma + alpha)
        U[last] = (gamma * out + rho * affine(layers[last], V[last])) / (gamma + rho)
        for k in range(last, -1, -1):
            layers[k] = weights(layers[k], V[k], U[k], rho, alpha)
            if k == 0:
                break
            W, b = layers[k]
            gram = rho * W.T @ W
            gram.diagonal().add_(gamma)
            V[k] = torch.linalg.solve(gram, (rho * (U[k] - b) @ W + gamma * U[k - 1].relu()).T).T
            center = (rho * affine(layers[k - 1], V[k - 1]) + alpha * U[k - 1]) / (rho + alpha)
            U[k - 1] = relu_prox(center, V[k], rho + alpha, gamma)
        yield list(layers)
