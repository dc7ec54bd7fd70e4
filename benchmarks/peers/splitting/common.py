"""What the splitting methods share: closed forms of one scalar, ridge regression, and a step with backtracking."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]


def initial(widths: Sequence[int], seed: int, scale: float, bias: float) -> Layers:
    """W ~ scale N(0, 1), b = bias."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(b, a, generator=draw), torch.full((b,), bias))
        for a, b in zip(widths, widths[1:], strict=False)  # noqa: RUF007
    ]


def affine(layer: tuple[Tensor, Tensor], a: Tensor) -> Tensor:
    """A layer's output before the ReLU: (n, out)."""
    return torch.addmm(layer[1], a, layer[0].T)


def forward(layers: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """All z_l, and all a_l with a_0 = x; the last z has no a."""
    zs: list[Tensor] = []
    activations = [x]
    for layer in layers:
        zs.append(affine(layer, activations[-1]))
        activations.append(zs[-1].relu())
    return zs, activations[:-1]


def relu_prox(center: Tensor, a: Tensor, alpha: float, gamma: float) -> Tensor:
    """argmin_z alpha (z - center)^2 + gamma (a - relu(z))^2: the better of the best z <= 0 and the best z >= 0."""
    low = center.clamp_max(0)
    high = ((alpha * center + gamma * a) / (alpha + gamma)).clamp_min(0)
    cost_low = alpha * (low - center) ** 2 + gamma * a**2
    cost_high = alpha * (high - center) ** 2 + gamma * (a - high) ** 2
    return torch.where(cost_low < cost_high, low, high)


def cross_entropy_prox(
    center: Tensor, targets: Tensor, rho: float, start: Tensor, iterations: int = 50, tolerance: float = 1e-3
) -> Tensor:
    """argmin_z sum_i CE(z_i, target_i) + (rho/2) ||z - center||^2 by FISTA; the Hessian of CE is at most 1/2."""
    z = y = start
    t = 1.0
    onehot = torch.nn.functional.one_hot(targets, start.shape[1]).to(start)
    for _ in range(iterations):
        new = y - (y.softmax(1) - onehot + rho * (y - center)) / (0.5 + rho)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y = new + (t - 1) / t_new * (new - z)
        moved, z, t = float((new - z).abs().max()), new, t_new
        if moved < tolerance:
            break
    return z


def ridge(a: Tensor, z: Tensor, weight: float) -> Tensor:
    """argmin_W ||z - a W'||^2 + weight ||W||^2: (out, in)."""
    gram = a.T @ a
    gram.diagonal().add_(weight)
    return torch.linalg.solve(gram, a.T @ z).T


def backtracked(value: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, theta: float) -> Tensor:
    """x - gradient / theta, with theta doubled until the quadratic upper bound at x holds there."""
    here, square = float(value(x)), float(gradient.square().sum())
    for _ in range(60):
        candidate = x - gradient / theta
        if float(value(candidate)) <= here - square / (2 * theta) + 1e-6 * abs(here):
            return candidate
        theta *= 2
    return x
