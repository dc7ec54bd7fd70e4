"""Multigrid in layers (MGRIT, two levels): forward and adjoint of residual layers, solved iteratively in parallel.

    fine     x[n+1] = x[n] + h F_n(x[n])                       N layers, cut into intervals of c layers
    coarse   X[j+1] = X[j] + c h F_{jc}(X[j])  =: G_j(X[j])    one step per interval, weights of its first layer

    Phi_j = the c fine layers of interval j, from C-point X[j];  one iteration:
      F, C, F-relaxation   X[j+1] <- Phi_j(X[j])                all intervals at once, from the values before
      coarse correction    X[j+1] <- G_j(X[j]) + Phi_j(X_old[j]) - G_j(X_old[j])     one interval after the other, cheap
    adjoint               the same for p[j] = (dPhi_j/dX)^T p[j+1], with the transposed coarse step

After enough iterations (one per interval without C-relaxation, half as many with) both equal serial propagation; after
one or two the gradient is inexact. It is a module: train it as a unit of any network, with any method.

Source: Guenther, Ruthotto, Schroder, Cyr and Gauger 2020 (abstract, and their published code); reproduced from the
description of the cycle in arXiv 2601.09026. With `relax=False` it is the parareal method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.errors import UserError

Tape = tuple[Tensor, Tensor]  # a leaf, and what a part of the network made of it


class Multigrid(nn.Module):
    """N residual layers ``x + h F_n(x)`` of one shape, solved by multigrid.

    Args:
        functions: the F_n; each maps (batch, *features) to the same shape, alike every time it is called.
        coarsening: c, layers per interval. h: step of a layer.
        iterations, adjoint_iterations: of the forward and of the backward.
        relax: with the C-relaxation; False: parareal.
        threads: intervals worked on at a time.

    Attributes:
        residuals: largest change of a C-point relative to its size, per iteration of the last forward; a factor above
            1 from one to the next says that more iterations do not help.

    Raises:
        UserError: layers that are no multiple of c, counts below 1, or layers that differ from call to call (BatchNorm
            in training counts every call, dropout draws anew).

    Example:
        >>> solver = Multigrid([nn.Linear(4, 4) for _ in range(8)], coarsening=4, h=0.1, iterations=2)
        >>> solver(torch.randn(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        functions: Sequence[nn.Module],
        coarsening: int = 4,
        h: float = 1.0,
        iterations: int = 1,
        adjoint_iterations: int = 1,
        relax: bool = True,
        threads: int = 1,
    ) -> None:
        super().__init__()
        if min(coarsening, iterations, adjoint_iterations, threads) < 1:
            raise UserError("coarsening, iterations and threads of multigrid must be at least 1")
        if not functions or len(functions) % coarsening:
            raise UserError(f"{len(functions)} layers are no multiple of coarsening={coarsening}; choose a divisor")
        changing = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        for layer in (m for function in functions for m in function.modules()):
            if isinstance(layer, changing):
                raise UserError(
                    f"multigrid calls every layer several times per batch, and {type(layer).__name__} does not do the "
                    "same each time; use GroupNorm, and no dropout"
                )
        self.functions, self.h, self.coarsening = nn.ModuleList(functions), h, coarsening
        self.iterations, self.adjoint_iterations, self.relax, self.threads = (
            iterations, adjoint_iterations, relax, threads,
        )  # fmt: skip
        self.residuals: list[float] = []

    @property
    def intervals(self) -> int:
        """Number of intervals."""
        return len(self.functions) // self.coarsening

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *features) -> the same shape: the last C-point."""
        return _Solve.apply(x, self, *self.parameters())  # type: ignore[no-any-return]

    def serial(self, x: Tensor) -> Tensor:
        """What the iterations converge to."""
        for j in range(self.intervals):
            x = self.fine(j, x)
        return x

    def fine(self, j: int, x: Tensor) -> Tensor:
        """Phi_j."""
        for function in self.functions[j * self.coarsening : (j + 1) * self.coarsening]:
            x = x + self.h * function(x)
        return x

    def coarse(self, j: int, x: Tensor) -> Tensor:
        """G_j."""
        return x + self.coarsening * self.h * self.functions[j * self.coarsening](x)

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        """`work` of every interval, `threads` at a time."""
        if self.threads == 1:
            return [work(j) for j in range(self.intervals)]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(work, range(self.intervals)))

    def states(self, x: Tensor) -> list[Tensor]:
        """The C-points X[0] = x .. X[M], after the iterations."""
        self.residuals = []
        points = [x]
        for j in range(self.intervals):  # first guess: the coarse network
            points.append(self.coarse(j, points[j]))
        for _ in range(self.iterations):
            before = points
            if self.relax:
                points = [x, *self._each_without_graph(self.fine, points)]
            ends, jumps = (self._each_without_graph(step, points) for step in (self.fine, self.coarse))
            corrected = [x]
            for j in range(self.intervals):
                corrected.append(self.coarse(j, corrected[j]) + ends[j] - jumps[j])
            points = corrected
            self.residuals.append(
                max(float((a - b).norm() / b.norm()) for a, b in zip(points[1:], before[1:], strict=True))
            )
        return points

    def _each_without_graph(self, step: Callable[[int, Tensor], Tensor], points: list[Tensor]) -> list[Tensor]:
        def work(j: int) -> Tensor:
            with torch.no_grad():  # the mode is the thread's own
                return step(j, points[j])

        return self.each(work)


class _Solve(torch.autograd.Function):
    """Forward and adjoint of `Multigrid` as one operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, solver: Multigrid, *parameters: Tensor) -> Tensor:
        points = solver.states(x)
        ctx.solver, ctx.points, ctx.parameters = solver, points, parameters
        ctx.versions = [p._version for p in parameters]
        return points[-1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        solver: Multigrid = ctx.solver
        if ctx.versions != [p._version for p in ctx.parameters]:
            raise UserError(
                "the weights of a multigrid solver moved between forward and backward; keep the graph short"
            )
        fine = solver.each(lambda j: _record(solver.fine, j, ctx.points[j]))
        coarse = solver.each(lambda j: _record(solver.coarse, j, ctx.points[j]))
        M, adjoints = solver.intervals, [cotangents[0]]  # adjoints[i] belongs to C-point M - i
        for i in range(M):
            adjoints.append(_pulled(coarse[M - 1 - i], adjoints[i]))
        for _ in range(solver.adjoint_iterations):
            if solver.relax:
                adjoints = [cotangents[0], *solver.each(lambda i, a=adjoints: _pulled(fine[M - 1 - i], a[i]))]
            ends = solver.each(lambda i, a=adjoints: _pulled(fine[M - 1 - i], a[i]))
            jumps = solver.each(lambda i, a=adjoints: _pulled(coarse[M - 1 - i], a[i]))
            corrected = [cotangents[0]]
            for i in range(M):
                corrected.append(_pulled(coarse[M - 1 - i], corrected[i]) + ends[i] - jumps[i])
            adjoints = corrected
        return adjoints[-1], None, *_weights(solver, fine, adjoints, ctx.parameters)


def _record(step: Callable[[int, Tensor], Tensor], j: int, x: Tensor) -> Tape:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return leaf, step(j, leaf)


def _pulled(tape: Tape, cotangent: Tensor) -> Tensor:
    """The vector-Jacobian product for the leaf; the graph stays."""
    return torch.autograd.grad(tape[1], tape[0], cotangent, retain_graph=True)[0]


def _weights(
    solver: Multigrid, fine: Sequence[Tape], adjoints: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the weights: every interval with the adjoint at its end, all at once."""
    M, wanted = solver.intervals, [p for p in parameters if p.requires_grad]
    if not wanted:
        return [None] * len(parameters)
    parts = solver.each(lambda j: torch.autograd.grad(fine[j][1], wanted, adjoints[M - 1 - j], allow_unused=True))
    sums = [sum(g for g in gradients if g is not None) for gradients in zip(*parts, strict=True)]
    found = {id(p): total for p, total in zip(wanted, sums, strict=True) if isinstance(total, Tensor)}
    return [found.get(id(p)) for p in parameters]
