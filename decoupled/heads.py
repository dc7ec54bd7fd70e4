"""Auxiliary heads: from the output of an inner block to the shape of the network's output.

They are small, one per block, not shared, and dropped when the network is used. Classes stand right after the batch,
as `torch.nn.functional.cross_entropy` takes them: a network ends in (batch, classes), one that says something about
every position of a sequence in (batch, classes, length), with targets (batch) and (batch, length).

    kind       reads (batch, ...)             computes
    auto       anything                       sequence if the network ends in (classes, length), else linear
    linear     (C, *space) or (F,)            mean over space; one linear layer
    mlp        (C, H, W) or any, flattened    average-pool to at most 2 x 2; linear - ReLU - linear
    mlp_sr     (C, H, W) or (F,)              average-pool to a quarter of the side; three 1x1 convolutions, each with
                                              BatchNorm and ReLU; pool to at most 2 x 2; linear - ReLU twice, linear
    cnn        (C, H, W)                      two 3x3 convolutions with BatchNorm and ReLU; mean over space; linear
    sequence   (length, F)                    LayerNorm, then one linear layer for every position -> (classes, length)

Hidden layers have 128 units. mlp, mlp_sr and cnn are after Belilovsky et al. 2020. Count a head with `flops.count`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from decoupled.errors import UserError, unknown

Shape = tuple[int, ...]
HIDDEN = 128


def _linear(shape: Shape, classes: int) -> nn.Module:
    if len(shape) >= 2:
        return nn.Sequential(nn.Flatten(2), _Mean(), nn.Linear(shape[0], classes))
    return nn.Linear(math.prod(shape), classes)


def _mlp(shape: Shape, classes: int, hidden: int = HIDDEN) -> nn.Module:
    pool, features = _pooled(shape)
    return nn.Sequential(*pool, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def _mlp_sr(shape: Shape, classes: int, hidden: int = HIDDEN) -> nn.Module:
    layers: list[nn.Module] = []
    if len(shape) == 3:
        channels, height, width = shape
        shape = (channels, math.ceil(height / 4), math.ceil(width / 4))
        layers.append(nn.AdaptiveAvgPool2d(shape[1:]))
        for _ in range(3):
            layers += _convolution(channels, 1)
    pool, features = _pooled(shape)
    layers += [*pool, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def _cnn(shape: Shape, classes: int) -> nn.Module:
    channels = shape[0]
    return nn.Sequential(*_convolution(channels, 3), *_convolution(channels, 3), _linear(shape, classes))


def _sequence(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(shape[-1]), nn.Linear(shape[-1], classes), ClassesFirst())


def _pooled(shape: Shape) -> tuple[list[nn.Module], int]:
    """The layer that pools images to at most 2 x 2 (none for other shapes), and the features that are left."""
    if len(shape) != 3:
        return [], math.prod(shape)
    side = min(2, *shape[1:])
    return [nn.AdaptiveAvgPool2d(side)], shape[0] * side * side


def _convolution(channels: int, side: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, side, padding=side // 2, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]


class _Mean(nn.Module):
    """Mean over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


class ClassesFirst(nn.Module):
    """(batch, length, classes) -> (batch, classes, length), which cross entropy and accuracy expect."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


KINDS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "mlp_sr": _mlp_sr,
    "cnn": _cnn,
    "sequence": _sequence,
}


def build(kind: str, shape: Shape, output: Shape) -> nn.Module:
    """Build a head.

    Args:
        kind: "auto" or a name in `KINDS`.
        shape: what it reads, without the batch dimension.
        output: the network's output without the batch dimension: (classes,) or (classes, length).

    Raises:
        UserError: unknown kind, a kind that cannot read this shape, or an output that no head makes.
    """
    if kind not in ("auto", *KINDS):
        raise unknown("head", kind, ("auto", *KINDS))
    if len(output) not in (1, 2) or not shape:
        raise UserError(
            "an auxiliary head maps (batch, features), (batch, channels, *space) or (batch, length, features) to "
            f"(batch, classes) or (batch, classes, length); here the block ends in shape {shape} and the network in "
            f"{output} per sample: use a method without heads"
        )
    if kind == "auto":
        kind = "sequence" if len(output) == 2 else "linear"
    if (kind == "sequence") != (len(output) == 2):
        one, other = ("position", "'sequence'") if len(output) == 2 else ("sample", "'linear', 'mlp' or 'mlp_sr'")
        raise UserError(
            f"head {kind!r} does not fit a network that ends in {output} per sample, one decision per {one}; "
            f"use head 'auto' or {other}"
        )
    if kind == "sequence" and (len(shape) != 2 or shape[0] != output[1]):
        raise UserError(
            f"head 'sequence' reads (length, features) with length {output[1]}, as the network ends in {output}; here "
            f"the block ends in {shape} per sample: cut elsewhere, or let the block keep the sequence"
        )
    if kind == "cnn" and len(shape) != 3:
        raise UserError(
            f"head 'cnn' reads images (channels, height, width), here the block ends in {shape} per sample; use head "
            "'linear' or 'mlp'"
        )
    return KINDS[kind](shape, output[0])
