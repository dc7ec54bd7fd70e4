"""Carry: what has to reach a later unit beside the activation (a mask, a skip connection) travels in further channels.

    x = [h | side]  --->  y = unit(h, side)  --->  [y | side]

The chain stays one of single tensors, so every method and runtime can cut it anywhere; a gradient for what is carried
comes down with that of the activation, and backpropagation through a skip connection is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decoupled.errors import UserError
from decoupled.specs import positive


class Carry(nn.Module):
    """A unit of two inputs, made one of a single tensor.

    What begins to carry is a unit that returns ``torch.cat([h, side], dim)``. Auxiliary heads see all channels.

    Args:
        unit: (h, side) -> y, which may have another number of channels than `h`, but no other size where `onward`.
        channels: how many channels at the end of the input are `side`.
        dim: dimension of the channels: 1 for images (N, C, H, W), -1 for sequences (N, length, width).
        onward: whether later units need `side`, too; else the output is `y` alone.

    Shapes: (N, ..., C + channels, ...) -> (N, ..., C' + channels, ...), or y's own unless `onward`.

    Raises:
        UserError: `channels` is below 1; in the forward: there are no more channels than the carried ones, or y has
            other sizes than what is carried on.

    Example:
        >>> layer = Carry(nn.Bilinear(4, 1, 6), channels=1, dim=-1)
        >>> layer(torch.randn(2, 5)).shape
        torch.Size([2, 7])
    """

    def __init__(self, unit: nn.Module, channels: int, dim: int = 1, onward: bool = True) -> None:
        super().__init__()
        positive("Carry", channels=channels)
        self.unit, self.channels, self.dim, self.onward = unit, channels, dim, onward

    def forward(self, x: Tensor) -> Tensor:
        own = x.shape[self.dim] - self.channels
        if own < 1:
            shape = tuple(x.shape)
            raise UserError(f"{self.channels} channels are carried, but dimension {self.dim} of {shape} has no more")
        h, side = x.split([own, self.channels], self.dim)
        y = self.unit(h, side)
        if not self.onward:
            return y
        try:
            return torch.cat([y, side.to(y.dtype)], self.dim)
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"an output {tuple(y.shape)} cannot carry {tuple(side.shape)} on in dimension {self.dim}; keep all "
                "other sizes, or say onward=False"
            ) from error

    def extra_repr(self) -> str:
        return f"channels={self.channels}, dim={self.dim}, onward={self.onward}"
