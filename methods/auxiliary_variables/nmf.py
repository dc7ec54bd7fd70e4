"""Non-negative matrix factorisation as a block: Z ~ S M, codes S >= 0 per sample, basis M >= 0 shared (DeepFacto).

    Z (n, d) --> S = argmin_{S>=0} ||Z - S M||^2 --> codes (n, r)     by ADMM, at test time and as the start of S
    prox         v = argmin_v ||v - Z||^2 / 2 + (weight/2) ||v - S M||^2 = (Z + weight S M) / (1 + weight)
    fit          A <- keep A + S'S / n,  B <- keep B + S'Z / n,  then M moves to lower tr(M'A M) / 2 - tr(M'B)

The block above takes S, and S is the auxiliary variable on the edge between: what comes down moves it, so labels reach
the codes, the basis fits codes that serve the labels, and the block below is pulled towards S M. Rows of M have norm 1;
their scale is in S.

Sources: the structure is of DeepFacto (Khorram et al. 2021, abstract only); HALS as in Cichocki and Phan 2009 and the
online statistics as in Mairal et al. 2010, multiplicative updates as in Lee and Seung 2001; all from memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled.errors import UserError, unknown
from decoupled.methods.auxiliary_variables.proximal import Proximal

EPS = 1e-12


def nnls(z: Tensor, basis: Tensor, iterations: int) -> Tensor:
    """argmin over S >= 0 of ||z - S basis||^2 by ADMM with one Cholesky factor for all iterations.

    Args:
        z: (n, d). basis: (r, d). iterations: of ADMM.

    Returns:
        S: (n, r).
    """
    gram = basis @ basis.T
    rho = gram.trace() / len(gram) + EPS
    factor = torch.linalg.cholesky(gram + rho * torch.eye(len(gram), dtype=z.dtype, device=z.device))
    inverse = torch.cholesky_inverse(factor)
    fixed = z @ basis.T
    codes = dual = torch.zeros_like(fixed)
    for _ in range(iterations):
        free = (fixed + rho * (codes + dual)) @ inverse
        codes = (free - dual).clamp_min(0)
        dual = dual + codes - free
    return codes


def hals(basis: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """One sweep over the rows of the basis (r, d), each to its minimum with the others fixed."""
    basis = basis.clone()
    for j in range(len(basis)):
        if A[j, j] > EPS:
            basis[j] = (basis[j] + (B[j] - A[j] @ basis) / A[j, j]).clamp_min(0)
    return basis


def multiplicative(basis: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """One multiplicative update of all rows; never increases the error, and an entry that is 0 stays so."""
    return basis * B.clamp_min(0) / (A @ basis + EPS)


UPDATES = {"hals": hals, "multiplicative": multiplicative}


class NMF(Proximal):
    """A block that factorises its input.

    Args:
        features: d. rank: r, number of basis vectors.
        update: of the basis, "hals" or "multiplicative". keep: share of the statistics kept from batch to batch.
        iterations: of ADMM in the forward. sweeps: updates of the basis per batch.
        seed: of the basis at the start.

    Raises:
        UserError: a wrong option; in `forward`, an input with negative entries.
    """

    nonnegative = learns = True
    basis: Tensor  # (r, d)
    A: Tensor  # (r, r)
    B: Tensor  # (r, d)

    def __init__(
        self, features: int, rank: int, update: str = "hals", keep: float = 0.95, iterations: int = 50,
        sweeps: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(features, rank, iterations, sweeps) < 1 or not 0 <= keep < 1:
            raise UserError(
                f"NMF: features {features}, rank {rank}, iterations {iterations}, sweeps {sweeps}, keep {keep}; the "
                "first four must be at least 1, keep in [0, 1)"
            )
        if update not in UPDATES:
            raise unknown("update of the basis", update, UPDATES)
        self._update, self._keep, self._iterations, self._sweeps = UPDATES[update], keep, iterations, sweeps
        start = torch.rand(rank, features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("basis", start / start.norm(dim=1, keepdim=True))
        self.register_buffer("A", torch.zeros(rank, rank))
        self.register_buffer("B", torch.zeros(rank, features))

    def forward(self, x: Tensor) -> Tensor:
        if (lowest := float(x.detach().min())) < 0:
            raise UserError(
                f"NMF factorises what is not negative, its input goes down to {lowest:.3g}; end the block below in a "
                "ReLU, and train with an auxiliary-variable method, which keeps the variable so"
            )
        with torch.no_grad():
            return nnls(x.detach(), self.basis, self._iterations)

    def prox(self, x: Tensor, target: Tensor, weight: float) -> Tensor:
        return (x + weight * target.clamp_min(0) @ self.basis) / (1 + weight)

    @torch.no_grad()
    def fit(self, x: Tensor, target: Tensor) -> None:
        codes = target.clamp_min(0)
        self.A.mul_(self._keep).add_(codes.T @ codes / len(x))
        self.B.mul_(self._keep).add_(codes.T @ x / len(x))
        for _ in range(self._sweeps):
            self.basis.copy_(self._update(self.basis, self.A, self.B))
        norms = self.basis.norm(dim=1, keepdim=True)
        norms = torch.where(norms > EPS, norms, torch.ones_like(norms))
        self.basis.div_(norms)  # S M stays the same if S is scaled by the norms, and so do A and B
        self.A.mul_(norms).mul_(norms.T)
        self.B.mul_(norms)
