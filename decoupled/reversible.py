"""Reversible blocks: nothing is kept; the input is made again from the output, which comes back with its gradient.

    F   x --block--> y                     y goes up, nothing is kept
    B   x~ = block^-1(y~; today's w)       y~ comes down with the gradient d of y~
        vjp of block at x~, today's w      x~ goes down with the gradient of x~

A block is invertible if its module has `inverse(y)`, or is a Sequential of such. Others keep their input, and a block
whose backward comes right behind its forward (the top one) keeps its graph. The inverse meets today's weights, so x~
differs from x by what the updates since F have changed (Rivaud et al. 2025, eq. 5); without a step between it is x up
to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from decoupled.block import Block
from decoupled.errors import ProtocolError, UserError
from decoupled.retention import KeepInput
from decoupled.tape import Tape


def invertible(module: nn.Module) -> bool:
    """Whether the input of a module can be made from its output."""
    if isinstance(module, nn.Sequential):
        return all(map(invertible, module))
    return callable(getattr(module, "inverse", None))


def invert(module: nn.Module, y: Tensor) -> Tensor:
    """The input of an invertible module, from its output; shapes as in its forward."""
    if not isinstance(module, nn.Sequential):
        return module.inverse(y)  # type: ignore[operator]
    for part in reversed(module):
        y = invert(part, y)
    return y


class _Inverse(nn.Module):
    """The inverse as a module, so that it can be called with copies of the running statistics."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, y: Tensor) -> Tensor:
        return invert(self.module, y)


class Reconstruct(KeepInput):
    """Keeps nothing of an invertible block, the input of another one, the graph where B comes at once."""

    keeps = "nothing"

    def __init__(self, block: Block, steps_between: bool, at_once: bool = False) -> None:
        super().__init__(block, steps_between, at_once)
        self._inverse = _Inverse(block.module) if invertible(block.module) else None
        self._outputs: dict[int, Tensor] = {}

    def keep(self, n: int, x: Tensor, version: int | None = None) -> Tensor:
        if self._inverse is None or not self._replays:
            return super().keep(n, x, version)
        with torch.no_grad():
            y = self._block.run(x, None if self.forward_weights is None else self._copy(self.forward_weights))
        if self._block.random_state() is not None:
            raise UserError(
                f"{self._block.name} draws random numbers, which an inverse cannot draw again in reverse; "
                "leave dropout out of reversible blocks"
            )
        self._hold(n, None, 0)
        return y

    def restore(self, n: int, y: Tensor) -> None:
        if n in self._kept and self._kept[n] is None:
            self._outputs[n] = y

    def open(self, n: int) -> Tape:
        if self._kept[n] is None:
            if n not in self._outputs:
                raise ProtocolError(f"{self._block.name}: pass {n} cannot be reversed, its output has not come back")
            self._kept[n] = self._reverse(self._outputs.pop(n))
        return super().open(n)

    def close(self, n: int) -> None:
        self._outputs.pop(n, None)
        super().close(n)

    def clear(self) -> None:
        self._outputs.clear()
        super().clear()

    def _reverse(self, y: Tensor) -> Tape:
        assert self._inverse is not None
        weights = None if self.backward_weights is None else self._copy(self.backward_weights)
        names = [name for name, _ in self._inverse.named_parameters()]
        state = {name: buffer.clone() for name, buffer in self._inverse.named_buffers()}  # statistics stay as they are
        state |= dict(zip(names, weights or [], strict=weights is not None))
        with torch.no_grad(), self._block.precision():
            x = functional_call(self._inverse, state, (y,))
        return self._record(x.detach().requires_grad_(), weights, again=True)
