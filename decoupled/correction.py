"""Corrections: what is done about staleness. They compose, in the order they are listed; a hook that is not overridden
changes nothing.

    F   forward(weights)             weights to run the forward with         linear_prediction, lookahead
    B   backward(weights)            weights to recompute a backward with    discrepancy, lookahead
    F/B recording(weights)           around the run whose graph is used      (feedback alignment)
        cotangent(gradient)          every gradient from above               shrink
        gradients(grads, then, now)  weight gradients of one pass            delay_compensation, gap_aware
        wanted(weights)              where they should have been taken now   lookahead
    S   clip                         gradients of a step, first of all       clip, clip_global
        before_step, after_step      around the optimizer step               spike_compensation, lookahead, rescale
        settle                       last of all: what the step has become   (all that look at changes of weights)
        tell, hear                   a number with every message             clip_global

In a step all do `clip` before any does `before_step`, and `after_step` (one that takes a share of the step, `shares`,
behind the others) before any does `settle`. So whatever the order in the list, what reads gradients reads clipped ones,
the share is one of the whole step, and what looks at w - w' sees the whole change.

`forward` and `backward` get copies and return copies: live weights are never predicted in place, so there is nothing to
undo. What is listed in a method is the configuration; `at(site)` makes what acts at one block (with that block's delay
and optimizer), and state lives there only.
Where they are: `decoupled.prediction`, `decoupled.compensation`, and `Shrink` here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from decoupled.errors import UserError, unknown
from decoupled.specs import parse

Weights = list[Tensor]
Gradients = Sequence[Tensor | None]
HOOKS = (
    "at", "forward", "backward", "recording", "cotangent", "gradients", "wanted", "clip", "before_step", "after_step",
    "settle", "tell")  # fmt: skip


@dataclass(frozen=True)
class Site:
    """What a correction knows of its block.

    Attributes:
        k, K: the block's number, and how many there are.
        delay: own updates between forward and backward of a pass in the steady state, on average.
        passes: that make one update; each brings its share of the gradient.
        rates: what corrections will multiply the next step's learning rate by.
        parameters: of the block, in the order of all weight lists.
        optimizer: of the block; None if it has nothing to train.
    """

    k: int
    K: int
    delay: float
    parameters: Sequence[Tensor]
    optimizer: Optimizer | None
    passes: int = 1
    rates: list[Callable[[], float]] = field(default_factory=list)

    @property
    def trainable(self) -> list[Tensor]:
        """The parameters that gradients are for, in the order of all gradient lists."""
        return [p for p in self.parameters if p.requires_grad]


class Correction:
    """Changes nothing until a method of it is overridden.

    Attributes:
        needs: "stale" (a backward with the weights of the forward), "today" (one with today's weights), "gradient"
            (gradients come from above), or "" (anything).
        about_delay: whether it is meaningless where nothing is late.
        moves_forward: whether forwards run with other weights than today's.
        records: whether what acts at a block does something in `recording`, whose work `decoupled.flops` then counts.
        shares: whether its `after_step` is about the whole step, with what the others have made of it.
    """

    needs: ClassVar[str] = ""
    about_delay: ClassVar[bool] = True
    moves_forward: ClassVar[bool] = False
    records: ClassVar[bool] = False
    shares: ClassVar[bool] = False

    def at(self, site: Site) -> Correction | None:
        """What acts at this block; None if nothing is to be done there.

        Raises:
            UserError: it cannot work with this optimizer.
        """
        return self

    def moves(self, site: Site) -> bool:
        """Whether passes of this block run with other weights than today's; `site` may be without optimizer."""
        return self.moves_forward or bool({"forward", "backward"} & hooks(self))

    def forward(self, weights: Weights) -> Weights:
        """The weights of a forward, made of copies of today's."""
        return weights

    def backward(self, weights: Weights) -> Weights:
        """The weights of a backward that is recomputed, made of today's."""
        return weights

    def recording(self, weights: Weights) -> AbstractContextManager[Any]:
        """Entered around the run of the block, over `weights`, whose graph its backward uses."""
        return nullcontext()

    def cotangent(self, gradient: Tensor) -> Tensor:
        """Called with every gradient that a block receives from above."""
        return gradient

    def gradients(self, grads: Gradients, then: Weights, now: Weights) -> Gradients:
        """Called with the weight gradients of a pass; trainable weights: those of the pass, and what is wanted now."""
        return grads

    def wanted(self, weights: Weights) -> Weights:
        """Where gradients should be taken now, made of the live trainable weights (a prediction wants just these)."""
        return weights

    def clip(self) -> None:
        """Called with the gradients of a step in `.grad`, to bound them before anything reads them."""

    def before_step(self) -> None:
        """Called before the optimizers' step, with the gradients in `.grad`."""

    def after_step(self) -> None:
        """Called after the optimizers' step, to change it."""

    def settle(self) -> None:
        """Called when nothing changes the step any more, before gradients are forgotten and schedulers tick."""

    def tell(self, way: str) -> float:
        """A number for every message "up" or "down"; a correction that tells acts at every block."""
        return 0.0

    def hear(self, way: str, number: float) -> None:
        """What the same correction of the block below ("up") or above ("down") has told."""

    def state_dict(self) -> dict[str, Any]:
        """State of what acts at a block: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`."""


class Acting:
    """The corrections at work at one block, one method per hook.

    Attributes:
        parts: those that have something to do here.
        forward, backward: weights -> weights, or None if no part changes them.
        cotangent: gradient from above -> gradient, or None likewise.
    """

    def __init__(self, corrections: Sequence[Correction] = (), site: Site | None = None) -> None:
        made = (correction if site is None else correction.at(site) for correction in corrections)
        self.parts, self._site = [part for part in made if part is not None], site
        self.forward, self.backward = self._chain("forward"), self._chain("backward")
        self.cotangent: Callable[[Tensor], Tensor] | None = self._chain("cotangent")
        self._wanted = self._chain("wanted")
        self._gradients, self._recording, self._telling = map(self._those, ("gradients", "recording", "tell"))

    def recording(self, weights: Weights) -> AbstractContextManager[Any]:
        around = ExitStack()
        for part in self._recording:
            around.enter_context(part.recording(weights))
        return around

    def gradients(self, grads: Gradients, weights: Sequence[Tensor]) -> Gradients:
        if self._gradients and self._site is not None:
            then, now = ([w.detach() for w in some if w.requires_grad] for some in (weights, self._site.parameters))
            for part in self._gradients:
                grads = part.gradients(grads, then, self._wanted(now) if self._wanted else now)
        return grads

    def before_step(self) -> None:
        for part in self.parts:
            part.clip()
        for part in self.parts:
            part.before_step()

    def after_step(self) -> None:
        for part in sorted(self.parts, key=lambda part: part.shares):
            part.after_step()
        for part in self.parts:
            part.settle()

    def tell(self, way: str) -> tuple[float, ...]:
        return tuple(part.tell(way) for part in self._telling)

    def hear(self, way: str, news: tuple[float, ...]) -> None:
        for part, number in zip(self._telling, news, strict=False):  # a message may bring none
            part.hear(way, number)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    @property
    def held_bytes(self) -> int:  # of the tensors that they keep from step to step
        kept = (thing for state in self.state_dict() for thing in state.values())
        return sum(t.nbytes for one in kept for t in (one if isinstance(one, list) else [one]) if isinstance(t, Tensor))

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)

    def _those(self, hook: str) -> list[Correction]:
        return [part for part in self.parts if hook in hooks(part)]

    def _chain(self, hook: str) -> Callable[[Any], Any] | None:
        parts = self._those(hook)

        def run(given: Any) -> Any:
            for part in parts:
                given = getattr(part, hook)(given)
            return given

        return run if parts else None


def hooks(correction: Correction) -> set[str]:
    """The hooks in which a correction does something ("at" where it differs from block to block)."""
    return {hook for hook in HOOKS if getattr(type(correction), hook) is not getattr(Correction, hook)}


# --- names, for configurations ------------------------------------------------------------------------------------

_named: dict[str, type[Correction]] = {}
_SHORT = {"dc": "delay_compensation"}  # as papers call it


def named(name: str) -> Callable[[type], type]:
    """Give the decorated frozen dataclass the name `name`; its fields are its options."""

    def add(kind: type[Correction]) -> type[Correction]:
        if name in _named and _named[name].__qualname__ != kind.__qualname__:
            raise ValueError(f"correction {name!r} is registered already; choose another name")
        _named[name] = kind
        return kind

    return add


def names() -> list[str]:
    """Names of all corrections that have been loaded, sorted."""
    return sorted(_named)


def make(spec: str | Mapping[str, Any]) -> Correction:
    """Build a correction from its name, or from a mapping with `name` and options.

    Raises:
        UserError: unknown name or option (with the nearest one), or a value that it refuses.
    """
    name, given = parse("correction", spec)
    name = _SHORT.get(name, name)
    if name not in _named:
        raise unknown("correction", name, names())
    known: dict[str, Any] = {field.name: field for field in dataclasses.fields(_named[name])}  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in known:
            raise unknown(f"option of correction {name!r}:", key, list(known))
        kinds = {"float": (int, float), "int": int, "bool": bool, "str": str}[known[key].type]
        if not isinstance(value, kinds) or (isinstance(value, bool) and known[key].type != "bool"):
            raise UserError(f"correction {name!r}: option {key!r} must be {known[key].type}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"correction {name!r}: option {key!r} must be a finite number, got {value}")
    missing = [key for key, field in known.items() if key not in given and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"correction {name!r} needs {', '.join(missing)}; write {{name: {name}, {missing[0]}: ...}}")
    return _named[name](**given)


@named("shrink")
@dataclass(frozen=True)
class Shrink(Correction):
    """Multiplies the gradient at every hop down: block k of K sees factor ** (K-1-k) of it (FDG, Zhuang et al. 2021).

    `factor` in (0, 1], 1 is off.
    """

    needs: ClassVar[str] = "gradient"

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise UserError(f"gradient shrinking needs a factor in (0, 1], got {self.factor}")

    def cotangent(self, gradient: Tensor) -> Tensor:
        return gradient if self.factor == 1 else gradient * self.factor
