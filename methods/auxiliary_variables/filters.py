"""Downsampling filters: what is stored and sent on an edge is D(x), what the block above takes is U(D(x)).

    x (B, C, H, W) --D: r x r mean--> (B, C, H/r, W/r) --U: bilinear--> (B, C, H, W)       r^2 times less to store, send
    gradient for U(mu) --U^T--> gradient for mu

D loses what is finer than r pixels, so U(D(x)) != x: the block above is trained on blurred inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from decoupled.errors import UserError


class Filter:
    """The filter of one edge.

    Args:
        factor: r; None: nothing is changed.
        shape: of one sample on the edge. edge: what errors call it.

    Raises:
        UserError: samples are not images, or their sides cannot be divided by r.
    """

    def __init__(self, factor: int | None, shape: tuple[int, ...], edge: str) -> None:
        self.factor = 1 if factor is None else factor
        if self.factor < 1:
            raise UserError(f"downsample must be at least 1, got {factor}; leave it out for none")
        if self.factor > 1 and (len(shape) != 3 or shape[1] % self.factor or shape[2] % self.factor):
            raise UserError(
                f"{edge}: a filter of factor {self.factor} cannot divide samples of shape {shape}; cut the network "
                "where (channels, height, width) has sides it divides, or choose another downsample"
            )

    def down(self, x: Tensor) -> Tensor:
        """D: (batch, C, H, W) -> (batch, C, H/r, W/r)."""
        return x if self.factor == 1 else F.avg_pool2d(x, self.factor)

    def up(self, small: Tensor) -> Tensor:
        """U: (batch, C, H/r, W/r) -> (batch, C, H, W)."""
        if self.factor == 1:
            return small
        return F.interpolate(small, scale_factor=self.factor, mode="bilinear", align_corners=False)

    def transposed(self, gradient: Tensor) -> Tensor:
        """U^T: the gradient for what `up` has taken, from the gradient for what it has returned."""
        if self.factor == 1:
            return gradient
        *first, height, width = gradient.shape
        small, factor = [*first, height // self.factor, width // self.factor], float(self.factor)
        return torch.ops.aten.upsample_bilinear2d_backward(gradient, [height, width], small, False, factor, factor)
