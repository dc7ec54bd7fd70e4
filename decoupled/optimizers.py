"""Optimizers that see a weight as a matrix. With late gradients it matters which optimizer it is that they reach.

    G   gradient of a weight, (rows, columns); one of more dimensions is flattened to (first, all others)
    M   average of G over the updates, m that of a vector          lr, decay   as of AdamW, for both kinds of weights

    soap   W - lr (decay W + U N V'),   N = U' M V / sqrt(average of (U' G V)^2)        U, V: eigenvectors of the
           averages of G G' and G' G; so it is Adam, in the basis in which rows and columns are uncorrelated
    muon   W - lr (decay W + 0.2 sqrt(max(rows, columns)) O),   O = nearly the orthogonal matrix next to M

What has fewer than two dimensions is updated as by AdamW. Which matrix is an embedding or the last layer, which Muon's
authors leave to AdamW, cannot be seen from a weight: here all are treated alike. Nor can one see that a tensor stacks
the weights of several layers, as the networks of policies do: those are not for these two.

Sources: Vyas et al. 2025 (SOAP, arXiv 2409.11321), Jordan et al. 2024 (Muon) with the scale of Liu et al. 2025 (arXiv
2502.16982), as in `torch.optim.Muon`, which takes matrices only. That late gradients harm Adam less in an eigenbasis
(Jung et al. 2026, arXiv 2602.03515), and Muon less than AdamW (Zmushko et al. 2026, arXiv 2606.30634), they claim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
LARGEST = 4096  # rows or columns that are rotated; a side of more (a vocabulary, wide kernels) stays as it is


class Matrices(Optimizer):
    """AdamW for vectors; what a matrix moves by is for subclasses."""

    @abstractmethod
    def direction(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """By how much a matrix should fall, per unit of lr: (rows, columns)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    moves = _adam if p.ndim < 2 else self.direction
                    by = moves(p.grad if p.ndim < 2 else p.grad.flatten(1), state, group)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * by.view_as(p))
        return loss


class Soap(Matrices):
    """Adam in the eigenbasis of Shampoo's preconditioner.

    Args:
        lr, weight_decay: as of AdamW. betas: decay of the averages of gradients, and of squares and covariances.
        frequency: updates from one refresh of the bases to the next.

    The first update only finds the bases: nothing moves (but by decay, and vectors), so that no gradient chooses the
    basis that it is seen in.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.95, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.0, frequency: int = 10,
    ) -> None:  # fmt: skip
        _check(lr, betas, eps, weight_decay)
        if frequency < 1:
            raise ValueError(f"frequency must be at least 1, got {frequency}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "frequency": frequency}
        super().__init__(params, defaults)

    def direction(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        (beta1, beta2), t = group["betas"], state["step"] - 1
        sides = (G @ G.T if len(G) <= LARGEST else None, G.T @ G if G.shape[1] <= LARGEST else None)
        if "bases" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(G), torch.zeros_like(G)
            state["covariances"] = [None if side is None else (1 - beta2) * side for side in sides]
            state["bases"] = [None if side is None else _eigenvectors(side) for side in sides]
            return torch.zeros_like(G)
        mean, square, bases = state["exp_avg"], state["exp_avg_sq"], state["bases"]
        mean.lerp_(G, 1 - beta1)
        square.lerp_(_rotated(G, *bases).square_(), 1 - beta2)
        N = _rotated(mean, *bases) / (1 - beta1**t) / ((square / (1 - beta2**t)).sqrt_() + group["eps"])
        moves = _rotated(N, *[None if basis is None else basis.T for basis in bases])
        for average, side in zip(state["covariances"], sides, strict=True):
            if side is not None:
                average.lerp_(side, 1 - beta2)
        if t % group["frequency"] == 0:
            _refresh(state)
        return moves


class Muon(Matrices):
    """Momentum, orthogonalised.

    Args:
        lr, weight_decay: as of AdamW, for matrices, too: their updates are scaled to its size.
        momentum: of matrices, Nesterov's form. betas: of vectors.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        _check(lr, (momentum, *betas), eps, weight_decay)
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def direction(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        momentum = group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(G)
        M = state["momentum_buffer"].lerp_(G, 1 - momentum)
        return 0.2 * max(G.shape) ** 0.5 * _orthogonal(G.lerp(M, momentum))


def _check(lr: float, betas: tuple[float, ...], eps: float, weight_decay: float) -> None:
    if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(
            f"lr, eps and weight_decay must be at least 0, betas and momentum in [0, 1); got {lr}, {eps}, "
            f"{weight_decay}, {betas}"
        )


def _adam(g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
    (beta1, beta2), t = group["betas"], state["step"]
    mean, square = state["exp_avg"].lerp_(g, 1 - beta1), state["exp_avg_sq"].lerp_(g.square(), 1 - beta2)
    return mean / (1 - beta1**t) / ((square / (1 - beta2**t)).sqrt_() + group["eps"])


def _rotated(X: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """U' X V; None is the identity."""
    X = X.clone() if U is None else U.T @ X
    return X if V is None else X @ V


def _eigenvectors(side: Tensor) -> Tensor:
    """In double precision, and off zero: a side of which whole rows are zero (tokens that did not come) breaks eigh."""
    exact = side.double().nan_to_num(0.0, 0.0, 0.0)  # what is not finite is for the loss to report
    return torch.linalg.eigh(exact + 1e-30 * torch.eye(len(side), dtype=exact.dtype, device=side.device))[1].to(side)


def _refresh(state: dict[str, Any]) -> None:
    """One step of orthogonal iteration on every basis, largest eigenvalues first; squares follow their directions."""
    for side, (covariance, basis) in enumerate(zip(state["covariances"], state["bases"], strict=True)):
        if basis is not None:
            moved = covariance @ basis
            order = (basis * moved).sum(0).argsort(descending=True, stable=True)
            state["bases"][side] = torch.linalg.qr(moved[:, order])[0]
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(side, order)


def _orthogonal(M: Tensor) -> Tensor:
    """U S V' -> nearly U V': five steps of a Newton-Schulz iteration leave singular values around 1."""
    a, b, c = NEWTON_SCHULZ
    X = M.T if len(M) > M.shape[1] else M
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if len(M) > M.shape[1] else X
