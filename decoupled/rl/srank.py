"""Effective rank of features (Kumar et al. 2021): how many singular values hold 1 - delta of their sum.

srank(Phi) = min { k : sum_{i<=k} sigma_i >= (1 - delta) sum_i sigma_i },   sigma in decreasing order
"""

from __future__ import annotations

import torch
from torch import Tensor


def srank(features: Tensor, delta: float = 0.01) -> int:
    """Effective rank of a (samples, width) matrix; 0 for the zero matrix, and for one that is not finite."""
    x = features.double()
    if not x.isfinite().all():
        return 0
    gram = x @ x.mT if x.shape[0] < x.shape[1] else x.mT @ x  # its eigenvalues are the squares: far cheaper than an SVD
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    total = sigma.cumsum(0)
    if total[-1] == 0:
        return 0
    return int((total < (1 - delta) * total[-1]).sum()) + 1
