"""Loss scales: the loss is multiplied before the backward, so that small gradients survive in float16, and all that
the backward gives is divided again before anybody uses it.

    J --x s--> s J --vjp--> s g --vjp--> s g' ---- Down(scale = s) ----> block k-1 --vjp--> s g"    s: of that batch,
                      |          |                                              |                   whatever today's is
               / s    v          v                                       / s    v
                    head    weights of block k                             weights of block k-1

Every objective has a scale of its own, which lives with the block that has the objective, as in torch.amp.GradScaler:

    it grows    by `growth`, after `interval` own steps in a row of which it heard nothing bad
    it shrinks  by `backoff`, when a gradient that it was in has overflowed: in its own block, or in one below, whose
                news (scale, blocks to go) comes up with the next activation. A scale that was left since is not
                shrunk again: gradients that were in flight overflow one after the other.

A block whose weight gradients are not finite skips its step. Corrections and clipping see gradients without a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoupled.correction import Gradients
from decoupled.errors import UserError, unknown
from decoupled.messages import Data
from decoupled.specs import parse

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What blocks compute in, and the scale of their losses.

    Attributes:
        name: "float32" (as they are), or "bf16", "fp16" (autocast).
        scale: the loss scale to begin with; None: 65536 for fp16, else no scale at all.
        growth, backoff: factors on the scale. interval: own steps without an overflow before it grows.
    """

    name: str = "float32"
    scale: float | None = None
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise unknown("precision", self.name, PRECISIONS)
        if self.name == "fp16" and self.scale is None:
            object.__setattr__(self, "scale", 65536.0)
        numbers = (self.growth, self.backoff, self.interval, 1 if self.scale is None else self.scale)
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < math.inf for n in numbers):
            raise UserError(f"scale, growth, backoff and interval of a precision must be positive numbers, got {self}")
        if self.growth < 1 or self.backoff >= 1 or self.interval < 1:
            raise UserError(f"a loss scale needs growth >= 1, backoff < 1 and interval >= 1, got {self}")

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast computes in; None: no autocast."""
        return PRECISIONS[self.name]


def precisions(spec: Any) -> list[Precision]:
    """From a name, a mapping with `name` and options, or a list of such with one per block.

    Raises:
        UserError: an unknown name, option or value, or blocks that scale losses in different ways.
    """
    several = isinstance(spec, Sequence) and not isinstance(spec, str)
    given: Sequence[Any] = spec if several else [spec]
    made = [_one(one) for one in given]
    if not made:
        raise UserError("precision is an empty list; give one for all blocks, or one per block")
    if len({(p.scale, p.growth, p.backoff, p.interval) for p in made if p.scale is not None}) > 1:
        raise UserError("blocks cannot scale losses in different ways; give fp16 the same options everywhere")
    return made


def _one(spec: str | Mapping[str, Any]) -> Precision:
    name, options = parse("precision", spec)
    if wrong := [option for option in options if option not in Precision.__dataclass_fields__]:
        raise unknown(f"option of precision {name!r}:", wrong[0], list(Precision.__dataclass_fields__))
    made = Precision(name=name, **options)
    if made.scale is None and options:
        raise UserError(f"precision {name} scales no loss: leave out {', '.join(options)}, or give it a scale")
    return made


@dataclass(frozen=True, slots=True)
class Scaled:
    """A gradient, and by how much it is too large."""

    tensor: Tensor
    scale: float = 1.0

    def __add__(self, other: Scaled) -> Scaled:
        """The sum, at the smaller of the two scales: that one is known not to overflow."""
        scale = min(self.scale, other.scale)
        a, b = (g.tensor if g.scale == scale else g.tensor * (scale / g.scale) for g in (self, other))
        return Scaled(a + b, scale)

    def plain(self) -> Tensor:
        """The gradient itself; a half-precision one in float32, as it may be too small without its scale."""
        return self.tensor if self.scale == 1.0 else _wide(self.tensor) / self.scale

    def through(self, change: Callable[[Tensor], Tensor]) -> Scaled:
        """What `change` makes of the gradient itself, with the same scale."""
        if self.scale == 1.0:
            return Scaled(change(self.tensor))
        return Scaled((change(self.plain()) * self.scale).to(self.tensor.dtype), self.scale)


def loss_of(loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, data: Data | None) -> Tensor:
    """The user's loss of an output.

    Raises:
        UserError: it is no tensor.
    """
    assert data is not None and data.targets is not None
    value = loss(output, data.targets)
    if not isinstance(value, Tensor):
        kind = "None (is a return missing?)" if value is None else f"a {type(value).__name__}"
        raise UserError(f"the loss must be a tensor of one number, got {kind}; return the mean loss of the batch alone")
    return value


def number(objective: Tensor) -> float:
    """The value of an objective.

    Raises:
        UserError: it is not one number that can be differentiated.
    """
    if objective.dim():
        raise UserError(f"the loss must be one number, got shape {tuple(objective.shape)}; use a mean")
    if not objective.requires_grad:
        raise UserError("the loss does not depend on the output; leave detach(), item() and no_grad() out of it")
    return float(objective.detach())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Scaling:
    """What one block knows of loss scales: that of its own objective, and news that are on their way up.

    Args:
        precision: how the chain scales.
        linear: whether what comes down from block to block is a scaled gradient (`Coupling.linear`).

    Attributes:
        active: whether losses are scaled at all.
        scale: for the next own objective (or gradient from above that has none).
        linear: as given.
        overflows: passes whose weight gradients were not finite here.
    """

    def __init__(self, precision: Precision | None = None, linear: bool = True) -> None:
        self._how = precision or Precision()
        self.active, self.linear = self._how.scale is not None, linear
        self.scale = self._how.scale or 1.0
        self.overflows = self._clean = 0
        self._news: tuple[float, ...] = ()

    def gradients(self, grads: Gradients, scale: float, blocks: int) -> Gradients | None:
        """Gradients without their scale, or None if one is not finite; its objective is (at most) `blocks` above."""
        if not self.active:
            return grads
        plain = [None if g is None else Scaled(g, scale).plain() for g in grads]
        finite = [torch.isfinite(g).all() for g in plain if g is not None]
        if not finite or bool(torch.stack(finite).all()):
            return plain
        self.overflows += 1
        self.hear((scale, blocks + 1.0 if self.linear else 1.0))
        return None

    def differentiate(
        self, objective: Tensor, share: float, y: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Scaled | None, Gradients | None]:
        """The gradient of `share` times the objective for `y`, and those for `weights` (None: one is not finite)."""
        goal = objective * (share * self.scale) if share * self.scale != 1.0 else objective
        gradient, *grads = torch.autograd.grad(goal, [y, *weights], allow_unused=True)
        return None if gradient is None else Scaled(gradient, self.scale), self.gradients(grads, self.scale, 0)

    def reply(self, gradient: Tensor | None, scale: float) -> tuple[Tensor | None, float] | None:
        """The gradient for the input as the block below may have it, and its scale; None: it is of no use there."""
        if gradient is None or self.linear or not self.active:
            return gradient, scale if self.linear else 1.0
        plain = Scaled(gradient, scale).plain()
        return (plain, 1.0) if bool(torch.isfinite(plain).all()) else None

    def seen(self, gradient: Scaled) -> Tensor:
        """A gradient as the coupling may see it: with its scale only where it is handed on as a gradient."""
        return gradient.tensor if self.linear else gradient.plain()

    def heard(self, gradient: Tensor, scale: float) -> Scaled:
        """A gradient from above: as it comes, or (one that was divided before it was sent) at this block's scale."""
        if self.linear or not self.active:
            return Scaled(gradient, scale)
        return Scaled(gradient * self.scale, self.scale)

    def stepped(self) -> None:
        """An own step was made."""
        if self.active:
            self._clean += 1
            if self._clean == self._how.interval:
                self.scale, self._clean = self.scale * self._how.growth, 0

    def tell(self) -> tuple[float, ...]:
        """News for the block above."""
        news, self._news = self._news, ()
        return news

    def hear(self, news: tuple[float, ...]) -> None:
        """A gradient has overflowed here or below: its scale, and how many blocks are yet to hear of it, with this."""
        if news:
            scale, blocks = news
            self._clean, self.scale = 0, min(self.scale, scale * self._how.backoff)
            if blocks > 1:
                older = self._news or (scale, 0.0)
                self._news = (min(scale, older[0]), max(blocks - 1, older[1]))

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "clean": self._clean, "news": list(self._news)} if self.active else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.active and state:
            self.scale, self._clean, self._news = state["scale"], state["clean"], tuple(state["news"])
