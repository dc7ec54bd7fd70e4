"""How far predictions of the family look ahead, and how momentum is scaled to a batch size.

    FromEntry, block k of K   forward: k // 2 + K-1-k updates ahead   backward: k // 2      one common moment per batch
    FromEntry, stashed        forward: K-1-k                          the forward's weights
    FromEntry, M micro        forward: ceil((K-1-k) / M) more         backward: (k // 2) // M

Of M micro-batches per update the first of a minibatch is the most updates late; all of them look as far ahead as it.

Sources: Chen et al. 2018 (arXiv 1809.02839); micro-batches: Guan et al. 2019 (XPipe); scaling: Kosson et al. 2021
(arXiv 2003.11666).
"""

from __future__ import annotations

from dataclasses import dataclass

from decoupled.correction import Site
from decoupled.prediction import Prediction


@dataclass(frozen=True)
class FromEntry(Prediction):
    """Predicts, at every block, the weights of one moment of a batch's way: forward and backward then agree on it."""

    stash: bool = False
    micro: int = 1

    def horizon(self, site: Site) -> tuple[float, float]:
        behind, later = -((site.K - 1 - site.k) // -self.micro), site.k // 2 // self.micro
        return (behind, 0.0) if self.stash else (later + behind, later)


def scaled(lr: float, momentum: float, reference: int, batch: int) -> tuple[float, float]:
    """Learning rate and momentum for batches of `batch` samples that do what `lr` and `momentum` did at `reference`.

    m = momentum ** (batch / reference),  lr (1 - m) batch / ((1 - momentum) reference): the same decay of momentum per
    sample, and the same total contribution of a sample.

    Returns:
        (learning rate, momentum).

    Example:
        >>> scaled(0.1, 0.9, 128, 128)
        (0.1, 0.9)
    """
    m = momentum ** (batch / reference)
    return lr * ((1 - m) * batch) / ((1 - momentum) * reference), m
