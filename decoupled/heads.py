"""Auxiliary heads: from the output of an inner block to the shape of the network's output.

They are small, one per block, not shared, and dropped when the network is used.

    linear   mean over space (N, C, *space) -> (N, C), or (N, F) as it is; then one linear layer
    mlp      average-pool to at most 2 x 2, flatten; then linear - ReLU - linear (after Belilovsky et al. 2020)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from decoupled.errors import UserError, unknown

Shape = tuple[int, ...]


def _linear(shape: Shape, outputs: int) -> nn.Module:
    if len(shape) >= 2:
        return nn.Sequential(nn.Flatten(2), _Mean(), nn.Linear(shape[0], outputs))
    return nn.Linear(math.prod(shape), outputs)


def _mlp(shape: Shape, outputs: int, hidden: int = 128) -> nn.Module:
    layers: list[nn.Module] = []
    features = math.prod(shape)
    if len(shape) == 3:
        side = min(2, shape[1], shape[2])
        layers.append(nn.AdaptiveAvgPool2d(side))
        features = shape[0] * side * side
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class _Mean(nn.Module):
    """Mean over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


KINDS: dict[str, Callable[[Shape, int], nn.Module]] = {"linear": _linear, "mlp": _mlp}


def build(kind: str, shape: Shape, output: Shape) -> nn.Module:
    """Build a head.

    Args:
        kind: a name in `KINDS`.
        shape: what it reads, without the batch dimension.
        output: the network's output without the batch dimension; its last entry is the number of classes.

    Raises:
        UserError: unknown kind, or the network's output is not (batch, classes).
    """
    if kind not in KINDS:
        raise unknown("head", kind, KINDS)
    if len(output) != 1 or not shape:
        raise UserError(
            "an auxiliary head maps (batch, features) or (batch, channels, *space) to (batch, classes); here the block "
            f"ends in shape {shape} and the network in {output} per sample: use a method without heads"
        )
    return KINDS[kind](shape, output[-1])
