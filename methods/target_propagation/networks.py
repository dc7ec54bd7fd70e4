"""What stands beside a block: a network for the way back, and the noise at whose inputs it learns."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Feedback(nn.Module):
    """G: from outputs of a block to inputs; linear, or with one hidden layer; zero at first, so nothing comes down yet.

    Args:
        outputs, inputs: shapes of the block without the batch dimension; (features,) or (channels, height, width) each.
        hidden: channels, or features, of the hidden layer; 0: none.
    """

    def __init__(self, outputs: tuple[int, ...], inputs: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self._shape, images = inputs, len(outputs) == len(inputs) == 3

        def layer(a: int, b: int) -> nn.Module:
            return nn.Conv2d(a, b, 3, padding=1) if images else nn.Linear(a, b)

        start, end = (outputs[0], inputs[0]) if images else (math.prod(outputs), math.prod(inputs))
        self._prepare = partial(F.interpolate, size=inputs[1:]) if images else partial(torch.flatten, start_dim=1)
        self.layers = nn.Sequential(
            *([layer(start, hidden), nn.Tanh(), layer(hidden, end)] if hidden else [layer(start, end)])
        )
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor) -> Tensor:
        """(batch, *outputs) -> (batch, *inputs)."""
        return self.layers(self._prepare(y)).reshape(len(y), *self._shape)


class Noise(nn.Module):
    """Normal numbers from a generator that is saved and restored with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator("cpu").manual_seed(int(torch.randint(1 << 31, (), device="cpu")))

    def get_extra_state(self) -> Tensor:
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())

    def forward(self, x: Tensor, part: float) -> Tensor:
        """Noise like `x`, whose deviation is `part` of the root mean square of `x`."""
        size = x.to(torch.promote_types(x.dtype, torch.float32)).square().mean().sqrt()  # squares leave half precision
        drawn = torch.randn(x.shape, generator=self._generator, device="cpu", dtype=torch.float32).to(size)
        return (drawn * (part * size.clamp(min=1e-6))).to(x.dtype)
