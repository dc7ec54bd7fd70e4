"""A block that takes twice its time, unevenly: a slower device, or one that is shared with others.

    forward     the block, then sleep r times the processor time that took
    backward    the block, then sleep r times the processor time that took

r goes through 1/8, 3/8, .. 15/8 in an order drawn from a fixed seed, and again in another order: 1 on average, so every
contestant is slowed by the same amount. Processor time does not grow when others use the cores. It sleeps rather than
computes, as waiting for a slow device would: nobody else gains or loses a core. Only training is slowed.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 8


class Jitter:
    """Factors between 0 and 2 whose average over every `STEPS` of them is 1."""

    def __init__(self, seed: int) -> None:
        self._random, self._left = random.Random(seed), list[float]()

    def draw(self) -> float:
        """The next factor."""
        if not self._left:
            self._left = [(2 * step + 1) / STEPS for step in range(STEPS)]
            self._random.shuffle(self._left)
        return self._left.pop()


class Slowed(nn.Module):
    """`block`, twice as slow on average; torch's work for it is to run in the calling thread.

    Args:
        block: a module from one tensor to one tensor. Its backward is slowed if its input needs a gradient.
        seed: of the order of the factors.
    """

    def __init__(self, block: nn.Module, seed: int = 0) -> None:
        super().__init__()
        self.block = block
        self._forward, self._backward = Jitter(seed), Jitter(seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.block(x)
        timer = _Timer(self._backward)
        start = time.thread_time()
        if x.requires_grad:
            x = _Last.apply(x, timer)
        y = _First.apply(self.block(x), timer)
        time.sleep((time.thread_time() - start) * self._forward.draw())
        return y


class _Timer:
    """Of one pass: when its backward began, in the thread's processor time."""

    def __init__(self, jitter: Jitter) -> None:
        self.jitter, self.start = jitter, 0.0


class _First(torch.autograd.Function):
    """The identity behind the block: its backward runs before the block's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, timer: _Timer) -> Tensor:
        ctx.timer = timer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.timer.start = time.thread_time()
        return gradients[0], None


class _Last(torch.autograd.Function):
    """The identity before the block: its backward runs after the block's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, timer: _Timer) -> Tensor:
        ctx.timer = timer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep((time.thread_time() - ctx.timer.start) * ctx.timer.jitter.draw())
        return gradients[0], None
