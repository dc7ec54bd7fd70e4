"""Reversible blocks: nothing is kept; the input is made again from the output, which comes back with its gradient.

    F   x --block--> y                     y goes up, nothing is kept
    B   x~ = block^-1(y~; today's w)       y~ comes down with the gradient d of y~
        vjp of block at x~, today's w      x~ goes down with the gradient of x~

A block is invertible if its module has `inverse(y)`, or is a Sequential of such. Others keep their input, and a block
whose backward comes right behind its forward (the top one) keeps its graph. The inverse meets today's weights, so x~
differs from x by what the updates since F have changed (Rivaud et al. 2025, eq. 5); without a step between it is x up
to rounding.

A backward runs every module twice, for its inverse and for its graph; f of a `Coupled` unit once, which serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from decoupled.block import Block, Weights
from decoupled.errors import ProtocolError, UserError
from decoupled.retention import KeepInput
from decoupled.tape import Grads, Tape


class Coupled(nn.Module):
    """The reversible unit: ``(x1, x2) -> (x2 + f(x1), x1)``, streams side by side in dimension 1.

    Args:
        f: maps one stream to one of the same shape.

    Source: Gomez, Ren, Urtasun and Grosse, "The reversible residual network" (2017), as in Rivaud et al. (2025).

    Example:
        >>> unit, x = Coupled(nn.Linear(3, 3)).double(), torch.randn(2, 6, dtype=torch.float64)
        >>> torch.allclose(unit.inverse(unit(x)), x)
        True
    """

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 2C, ...) to (N, 2C, ...)."""
        first, second = x.chunk(2, dim=1)
        return torch.cat((second + self.f(first), first), dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """The input that gives `y`; same shape."""
        first, second = y.chunk(2, dim=1)
        return torch.cat((second, first - self.f(second)), dim=1)


def invertible(module: nn.Module) -> bool:
    """Whether the input of a module can be made from its output."""
    if isinstance(module, nn.Sequential):
        return len(module) > 0 and all(map(invertible, module))
    return callable(getattr(module, "inverse", None))


def invert(module: nn.Module, y: Tensor) -> Tensor:
    """The input of an invertible module, from its output; shapes as in its forward."""
    for part in _backwards(module):
        y = part.inverse(y)  # type: ignore[operator]
    return y


@dataclass
class Undone(Tape):
    """A `Coupled` unit reversed: `f` is the tape of its f at x1, which both x2 and the gradients are made of.

    y = (x2 + f(x1), x1), so of a gradient (a, b) for y come a for x2, b + J^T a for x1, and that of <a, f> for weights.
    """

    f: Tape | None = None

    def vjp(self, cotangent: Tensor, *, to_input: bool, to_weights: bool, again: bool) -> tuple[Tensor | None, Grads]:
        assert self.f is not None
        a, b = cotangent.chunk(2, dim=1)
        through, grads = self.f.vjp(a, to_input=to_input, to_weights=to_weights, again=again)
        return None if through is None else torch.cat((b + through, a), dim=1), grads


@dataclass
class Chain(Tape):
    """Tapes of modules that follow one another, from the last to the first; a W after an I walks through f again."""

    parts: tuple[Tape, ...] = ()

    def vjp(self, cotangent: Tensor, *, to_input: bool, to_weights: bool, again: bool) -> tuple[Tensor | None, Grads]:
        found: Tensor | None = cotangent
        total: Grads = []
        for part in self.parts:
            assert found is not None
            more = to_input or part is not self.parts[-1]
            found, grads = part.vjp(found, to_input=more, to_weights=to_weights, again=again)
            total = [_sum(*pair) for pair in zip(total, grads, strict=True)] if total and grads else total or grads
        return found if to_input else None, total


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


class _Undo(nn.Module):
    """The way back as a module, so that it can be called with other weights and copies of the running statistics."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, y: Tensor, weights: Weights) -> Chain:
        parts: list[Tape] = []
        for module in _backwards(self.module):
            parts.append(_undo(module, parts[-1].x.detach() if parts else y, weights))
        return Chain(parts[-1].x, y, weights, parts=tuple(parts))


def _backwards(module: nn.Module) -> Iterator[nn.Module]:
    """The invertible modules that it consists of, from the last to the first."""
    if isinstance(module, nn.Sequential):
        for part in reversed(module):
            yield from _backwards(part)
    else:
        yield module


def _undo(module: nn.Module, y: Tensor, weights: Weights) -> Tape:
    if type(module) is Coupled:  # others may have another forward
        above, first = y.chunk(2, dim=1)
        first = first.detach().requires_grad_()
        through = module.f(first)
        x = torch.cat((first.detach(), above - through.detach()), dim=1)
        return Undone(x, y, weights, f=Tape(first, through, weights))
    with torch.no_grad():
        x = invert(module, y)
    x = x.detach().requires_grad_()
    return Tape(x, module(x.clone()), weights)  # it may write over its input


class Reconstruct(KeepInput):
    """Keeps nothing of an invertible block, the input of another one, the graph where B comes at once."""

    keeps = "nothing"

    def __init__(self, block: Block, steps_between: bool, at_once: bool = False) -> None:
        super().__init__(block, steps_between, at_once)
        self._undo = _Undo(block.module) if invertible(block.module) else None
        self._outputs: dict[int, Tensor] = {}

    def keep(self, n: int, x: Tensor, version: int | None = None) -> Tensor:
        if self._undo is None or not self._replays:
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
        assert self._undo is not None
        weights = None if self.backward_weights is None else self._copy(self.backward_weights)
        leaves = self._block.weights if weights is None else weights
        names = [name for name, _ in self._undo.named_parameters()]
        state = {name: buffer.clone() for name, buffer in self._undo.named_buffers()}  # statistics stay as they are
        state |= dict(zip(names, weights or [], strict=weights is not None))
        with torch.set_grad_enabled(self.records), self.recording(leaves), self._block.precision():
            return functional_call(self._undo, state, (y, leaves))
