"""Auxiliary variables: every edge k has a variable Z_k that stands for block k's output, so that blocks need not wait.

    name        dual        variables                                    order               feed
    block_admm  U (scaled)  per minibatch, or per sample (stored)        rounds              Repeat(M)
    penalty     none        per sample (stored) or per minibatch         rounds              Whole / Repeat(M)

Symbols: X_k = f_k(Z_{k-1}; w_k), Z_{-1} = x, Z_k and U_k (batch, *features), B samples, K blocks.

    J_k     = (beta/2) sum_i ||Z_k[i] - X_k[i] + U_k[i]||^2 / B,  k < K-1;   J_{K-1} = loss(X_{K-1}, target)
    p_k     = B dJ_{k+1}/dZ_k                                       sent down (per sample, hence the factor B)
    Z_k    <- Z_k - eta (beta (Z_k - X_k + U_k) + p_k)              when p_k has come (step="gradient")
    U_k    <- U_k + sigma (Z_k - X_k)                               when the round is over; penalty: U = 0 always

Flow: up Z_k, sent before block k has run (operation E) unless it is the first visit; down dJ_{k+1}/dZ_k. All blocks
work on one minibatch at once (Jacobi); `sweep` updates the variables from right to left instead, each with its
neighbour's new one. Reproduced from the descriptions in Khorram et al. 2021 (arXiv 2105.00339) and Sun et al. (arXiv
2009.01462): their equations could not be read, so no number of theirs is claimed.
"""

from __future__ import annotations

from decoupled.methods.auxiliary_variables import (  # noqa: F401  (they register the methods)
    admm,
    auxnet,
    hybrid,
    penalty,
)
