"""The CIFAR-style residual network as a list of units: the stem, every residual block, and the classifier.

He, Zhang, Ren and Sun, "Deep residual learning for image recognition" (2016), section 4.2, depth 6n + 2::

    x (N, C, H, W)
      -> [conv 3x3, BN, ReLU]                      unit 0               (N, width, H, W)
      -> n residual blocks, width                  units 1 ... n        (N, width, H, W)
      -> n residual blocks, 2 width                units n+1 ... 2n     (N, 2 width, H/2, W/2)
      -> n residual blocks, 4 width                units 2n+1 ... 3n    (N, 4 width, H/4, W/4)
      -> [global average pool, flatten, linear]    unit 3n+1            (N, classes)

Halved sizes are rounded up, so 8x8, 28x28 and 32x32 images all fit. The shortcut of the two blocks that halve the image
is the paper's option A: every second pixel, missing channels filled with zeros; it has no parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.errors import UserError
from decoupled.specs import positive


def conv3x3(channels: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution without bias (a BatchNorm follows), initialised for ReLU."""
    conv = nn.Conv2d(channels, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class ShortcutA(nn.Module):
    """The parameter-free shortcut: keep every `stride`-th pixel, append `extra` zero channels."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + extra, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """One residual block: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``; no operation is in place."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(channels, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            conv3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and channels == outputs
        self.shortcut = nn.Identity() if same else ShortcutA(stride, outputs - channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        return F.relu(self.residual(x) + self.shortcut(x))


def resnet(inputs: Sequence[int], classes: int, *, depth: int = 20, width: int = 16) -> list[nn.Module]:
    """Build a residual network for small images.

    Args:
        inputs: shape of one image, ``(C, H, W)``; any number of channels.
        classes: number of outputs.
        depth: number of weighted layers, 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...
        width: channels of the first stage; the others have twice and four times as many.

    Returns:
        3n + 2 units; applied one after the other they map ``(N, C, H, W)`` to logits ``(N, classes)``.

    Raises:
        UserError: a depth that is not 6n + 2, inputs that are no image, or a size below 1.

    Example:
        >>> len(resnet((1, 28, 28), 10, depth=8))
        5
    """
    if len(inputs) != 3:
        raise UserError(
            f"resnet takes images (C, H, W), got inputs of shape {tuple(inputs)}; use mlp, or add a dimension"
        )
    channels, height, columns = inputs
    positive("resnet", classes=classes, depth=depth, width=width, channels=channels, height=height, columns=columns)
    if depth < 8 or (depth - 2) % 6:
        near = 6 * max(1, round((depth - 2) / 6)) + 2
        raise UserError(
            f"the depth of a resnet must be 6n + 2 (8, 14, 20, 32, ...), got {depth}; the nearest is {near}"
        )
    units: list[nn.Module] = [nn.Sequential(conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU())]
    channels = width
    for stage in range(3):
        outputs = width * 2**stage
        for index in range((depth - 2) // 6):
            units.append(BasicBlock(channels, outputs, stride=2 if stage and not index else 1))
            channels = outputs
    units.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)))
    return units
