"""A block that takes twice its time, unevenly: a slower device, or one that is shared with others.

    forward     the block, then sleep r times what it took      r uniform on [0, 2], drawn anew for every pass and
    backward    the block, then sleep r times what it took      direction from a fixed seed; 1 on average

It sleeps rather than computes, as a slow device would: the core is left to nobody else's advantage or harm. Only
training is slowed.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import Tensor, nn


class Slowed(nn.Module):
    """`block`, twice as slow on average.

    Args:
        block: a module from one tensor to one tensor.
        seed: of the random factors.
        mean: average of r; 1 doubles the time.
    """

    def __init__(self, block: nn.Module, seed: int = 0, mean: float = 1.0) -> None:
        super().__init__()
        self.block, self._draw, self._mean = block, random.Random(seed), mean

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.block(x)
        timer = _Timer(self)
        start = time.perf_counter()
        if x.requires_grad:
            x = _Last.apply(x, timer)
        y = _First.apply(self.block(x), timer)
        self.pause(time.perf_counter() - start)
        return y

    def pause(self, took: float) -> None:
        """Sleep r times `took` seconds."""
        time.sleep(took * self._draw.uniform(0.0, 2.0 * self._mean))


class _Timer:
    """Of one pass: when its backward began."""

    def __init__(self, module: Slowed) -> None:
        self.module, self.start = module, 0.0


class _First(torch.autograd.Function):
    """The identity behind the block: its backward runs before the block's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, timer: _Timer) -> Tensor:
        ctx.timer = timer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.timer.start = time.perf_counter()
        return gradients[0], None


class _Last(torch.autograd.Function):
    """The identity before the block: its backward runs after the block's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, timer: _Timer) -> Tensor:
        ctx.timer = timer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.timer.module.pause(time.perf_counter() - ctx.timer.start)
        return gradients[0], None
