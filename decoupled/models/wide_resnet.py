"""The wide residual network as a list of units: the stem, every residual block, and the classifier.

Zagoruyko and Komodakis, "Wide residual networks" (2016), WRN-d-k of depth d = 6n + 4 and widening k::

    x (N, C, H, W)
      -> [conv 3x3]                                unit 0               (N, 16, H, W)
      -> n residual blocks, 16k                    units 1 ... n        (N, 16k, H, W)
      -> n residual blocks, 32k                    units n+1 ... 2n     (N, 32k, H/2, W/2)
      -> n residual blocks, 64k                    units 2n+1 ... 3n    (N, 64k, H/4, W/4)
      -> [BN, ReLU, global average pool, linear]   unit 3n+1            (N, classes)

A block is pre-activated: ``x + conv(dropout(relu(bn(conv(relu(bn(x)))))))``; where the shape changes, the shortcut is a
1x1 convolution of ``relu(bn(x))``. Halved sizes are rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from decoupled.errors import UserError
from decoupled.models.resnet import conv3x3
from decoupled.specs import positive


class PreactivatedBlock(nn.Module):
    """One pre-activated residual block; no operation is in place."""

    def __init__(self, channels: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        between = [nn.Dropout(dropout)] if dropout else []
        self.residual = nn.Sequential(
            conv3x3(channels, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            *between,
            conv3x3(outputs, outputs),
        )
        same = stride == 1 and channels == outputs
        self.shortcut = None if same else nn.Conv2d(channels, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        active = self.activation(x)
        return self.residual(active) + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(
    inputs: Sequence[int], classes: int, *, depth: int = 16, widen: int = 4, dropout: float = 0.0
) -> list[nn.Module]:
    """Build a wide residual network for small images.

    Args:
        inputs: shape of one image, ``(C, H, W)``; any number of channels.
        classes: number of outputs.
        depth: number of convolutions on the longest path, 6n + 4: 10, 16, 22, 28, 40, ...
        widen: factor on the channels 16, 32 and 64 of the three stages.
        dropout: probability, between the two convolutions of a block.

    Returns:
        3n + 2 units; applied one after the other they map ``(N, C, H, W)`` to logits ``(N, classes)``.

    Raises:
        UserError: a depth that is not 6n + 4, inputs that are no image, a size below 1 or no probability.

    Example:
        >>> len(wide_resnet((3, 32, 32), 10, depth=10, widen=1))
        5
    """
    if len(inputs) != 3:
        raise UserError(f"wide_resnet takes images (C, H, W), got inputs of shape {tuple(inputs)}; use mlp")
    channels, height, columns = inputs
    positive("wide_resnet", classes=classes, depth=depth, widen=widen, channels=channels, height=height, width=columns)
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must lie in [0, 1), got {dropout}")
    if depth < 10 or (depth - 4) % 6:
        near = 6 * max(1, round((depth - 4) / 6)) + 4
        raise UserError(
            f"the depth of a wide_resnet must be 6n + 4 (10, 16, 22, 28, ...), got {depth}; the nearest is {near}"
        )
    units: list[nn.Module] = [conv3x3(channels, 16)]
    channels = 16
    for stage in range(3):
        outputs = 16 * widen * 2**stage
        for index in range((depth - 4) // 6):
            units.append(PreactivatedBlock(channels, outputs, 2 if stage and not index else 1, dropout))
            channels = outputs
    head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    units.append(nn.Sequential(*head))
    return units
