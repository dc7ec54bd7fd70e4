"""pdADMM (Wang et al. 2020): every interface has both an input p and an output q, so that all layers move at once.

    R(z_L; y) + (nu/2) ( sum_l ||z_l - W_l p_l - b_l||^2 + sum_{l<L} ||q_l - relu(z_l)||^2 )   with p_{l+1} = q_l,
    a dual u_l and (rho/2) ||p_{l+1} - q_l||^2 per interface; p_1 the inputs

    p, W   one gradient step with backtracking        b   a step of 1/nu on the mean
    z      near its old value, exact                  q = (rho p_{l+1} + u_l + nu relu(z_l)) / (rho + nu)
    u_l += rho (p_{l+1} - q_l)

nu = rho, as in the authors' code. Their greedy start with fewer layers is left out: the networks here have three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from decoupled.benchmarks.peers.splitting.common import (
    Layers,
    affine,
    backtracked,
    cross_entropy_prox,
    forward,
    initial,
    relu_prox,
)

THETA = 10.0  # where backtracking starts


def inputs(
    layer: tuple[Tensor, Tensor], z: Tensor, p: Tensor, q: Tensor, u: Tensor, rho: float
) -> Tensor:  # fmt: skip
    """p of one layer, tied to the q of the layer below by u and rho."""

    def value(v: Tensor) -> Tensor:
        return rho / 2 * ((z - affine(layer, v)).square().sum() + (v - q).square().sum()) + (u * (v - q)).sum()

    gradient = rho * ((p - q) - (z - affine(layer, p)) @ layer[0]) + u
    return backtracked(value, p, gradient, THETA * rho)


def steps(x: Tensor, targets: Tensor, widths: Sequence[int], seed: int = 0, rho: float = 1e-3) -> Iterator[Layers]:
    """Train; yields the layers after every iteration."""
    layers = initial(widths, seed, 0.05, 0.0)
    zs, p = forward(layers, x)
    last = len(layers) - 1
    q = [v.clone() for v in p[1:]]
    u = [torch.zeros_like(v) for v in q]
    while True:
        for k in range(1, last + 1):
            p[k] = inputs(layers[k], zs[k], p[k], q[k - 1], u[k - 1], rho)
        for k, (W, b) in enumerate(layers):
            z, a = zs[k], p[k]
            value = lambda W, b=b, z=z, a=a: rho / 2 * (z - affine((W, b), a)).square().sum()  # noqa: E731
            W = backtracked(value, W, -rho * (z - affine((W, b), a)).T @ a, THETA * rho)
            layers[k] = (W, b + (z - affine((W, b), a)).mean(0))
        for k in range(last):
            center = (affine(layers[k], p[k]) + zs[k]) / 2
            zs[k] = relu_prox(center, q[k], 2.0, 1.0)
        zs[last] = cross_entropy_prox(affine(layers[last], p[last]), targets, rho, zs[last])
        for k in range(last):
            q[k] = (p[k + 1] + u[k] / rho + zs[k].relu()) / 2
            u[k] = u[k] + rho * (p[k + 1] - q[k])
        yield list(layers)
