"""The reversible residual network as a list of units; two streams stand side by side in the channels.

Gomez, Ren, Urtasun and Grosse, "The reversible residual network" (2017), in the form of Rivaud et al. (2025)::

    x (N, C, H, W)
      -> [conv 3x3, BN, ReLU, doubled]           unit 0     (N, 2 width, H, W)      both streams alike
      -> `units` reversible units, width                    (N, 2 width, H, W)
      -> [BN, ReLU, conv 3x3 stride 2 per stream]           (N, 4 width, H/2, W/2)  between stages; not reversible
      -> ... `stages` stages, each with twice the channels
      -> [BN, ReLU, mean over space, linear]     last unit  (N, classes)

A reversible unit is `decoupled.reversible.Coupled` with f = conv BN ReLU conv BN. No operation is in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decoupled.errors import UserError
from decoupled.reversible import Coupled
from decoupled.specs import positive


class Streams(nn.Module):
    """Applies one module to both streams; changes the shape, so it cannot be reversed."""

    def __init__(self, change: nn.Module) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 2C, ...) to (N, 2C', ...)."""
        return torch.cat([self.change(stream) for stream in x.chunk(2, dim=1)], dim=1)


class Doubled(nn.Module):
    """Both streams begin alike: (N, C, ...) to (N, 2C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the channels."""
        return torch.cat((x, x), dim=1)


def _conv(channels: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def revnet(inputs: Sequence[int], classes: int, *, width: int = 16, stages: int = 3, units: int = 2) -> list[nn.Module]:
    """Build a reversible network for small images.

    Args:
        inputs: shape of one image, ``(C, H, W)``.
        classes: number of outputs.
        width: channels of one stream in the first stage; every later stage has twice those of the one before.
        stages: stages; between two of them the image is halved.
        units: reversible units per stage.

    Returns:
        ``stages * (units + 1) + 1`` units; applied one after the other they map ``(N, C, H, W)`` to ``(N, classes)``.

    Raises:
        UserError: inputs that are no image, or a size below 1.

    Example:
        >>> len(revnet((1, 28, 28), 10))
        10
    """
    if len(inputs) != 3:
        raise UserError(f"revnet takes images (C, H, W), got inputs of shape {tuple(inputs)}; add a dimension")
    channels, height, columns = inputs
    positive("revnet", classes=classes, width=width, stages=stages, units=units, channels=channels, height=height)
    positive("revnet", columns=columns)
    made: list[nn.Module] = [nn.Sequential(_conv(channels, width), nn.BatchNorm2d(width), nn.ReLU(), Doubled())]
    for stage in range(stages):
        wide = width * 2**stage
        if stage:
            made.append(Streams(nn.Sequential(nn.BatchNorm2d(wide // 2), nn.ReLU(), _conv(wide // 2, wide, stride=2))))
        made += [Coupled(_residual(wide)) for _ in range(units)]
    last = 2 * width * 2 ** (stages - 1)
    made.append(
        nn.Sequential(nn.BatchNorm2d(last), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))
    )
    return made


def _residual(channels: int) -> nn.Module:
    return nn.Sequential(
        _conv(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(), _conv(channels, channels),
        nn.BatchNorm2d(channels),
    )  # fmt: skip
