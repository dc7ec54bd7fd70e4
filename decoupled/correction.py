"""Corrections: what is done about staleness. They compose, in the order they are listed; a hook that is not overridden
changes nothing.

    F   forward(weights)             weights to run the forward with         linear_prediction, lookahead
    B   backward(weights)            weights to recompute a backward with    discrepancy, lookahead
    F/B recording(weights)           around the run whose graph is used      (feedback alignment)
        cotangent(gradient)          every gradient from above               shrink
        gradients(grads, weights)    weight gradients of one pass            delay_compensation, gap_aware
    S   clip                         gradients of a step, first of all       clip, clip_global
        before_step, after_step      around the optimizer step               spike_compensation, lookahead, rescale
        settle                       last of all: what the step has become   (all that look at changes of weights)
        tell, hear                   a number with every message             clip_global

In a step every correction does `clip` before any does `before_step`, and `after_step` before any does `settle`: so
whatever the order in the list, what reads gradients reads clipped ones, and what looks at w - w' sees the whole change.

`forward` and `backward` get copies and return copies: live weights are never predicted in place, so there is nothing to
undo. What is listed in a method is the configuration; `at(site)` makes what acts at one block (with that block's delay
and optimizer), and state lives there only.

Shrink(factor)   the gradient from above is multiplied by `factor` at every hop, so block k of K sees
                 factor ** (K-1-k) of it (FDG, Zhuang et al. 2021); the others: `decoupled.prediction`, `.compensation`
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from decoupled.errors import UserError, unknown
from decoupled.specs import parse

Weights = list[Tensor]
Gradients = Sequence[Tensor | None]
HOOKS = (
    "at", "forward", "backward", "recording", "cotangent", "gradients", "clip", "before_step", "after_step", "settle",
    "tell",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """What a correction knows of its block.

    Attributes:
        k, K: the block's number, and how many there are.
        delay: own updates between forward and backward of a pass in the steady state, on average.
        passes: that make one update; each brings its share of the gradient.
        parameters: of the block, in the order of all weight lists.
        optimizer: of the block; None if it has nothing to train.
    """

    k: int
    K: int
    delay: float
    parameters: Sequence[Tensor]
    optimizer: Optimizer | None
    passes: int = 1

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
    """

    needs: ClassVar[str] = ""
    about_delay: ClassVar[bool] = True
    moves_forward: ClassVar[bool] = False
    records: ClassVar[bool] = False

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

    def gradients(self, grads: Gradients, weights: Weights) -> Gradients:
        """Called with the weight gradients of a pass and the weights (trainable ones) that they were taken at."""
        return grads

    def clip(self) -> None:
        """Called with the gradients of a step in `.grad`, to bound them before anything reads them."""

    def before_step(self) -> None:
        """Called before the optimizers' step, with the gradients in `.grad`."""

    def after_step(self) -> None:
        """Called after the optimizers' step, to change it."""

    def settle(self) -> None:
        """Called when nothing changes the step any more, before gradients are forgotten and schedulers tick."""

    def tell(self, way: str) -> float:
        """A number that goes with every message "up" or "down"; a correction that tells acts at every block."""
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
        self.parts = [part for part in made if part is not None]
        self.forward, self.backward = self._chain("forward"), self._chain("backward")
        self.cotangent: Callable[[Tensor], Tensor] | None = self._chain("cotangent")
        self._gradients, self._recording, self._telling = map(self._those, ("gradients", "recording", "tell"))

    def recording(self, weights: Weights) -> AbstractContextManager[Any]:
        around = ExitStack()
        for part in self._recording:
            around.enter_context(part.recording(weights))
        return around

    def gradients(self, grads: Gradients, weights: Sequence[Tensor]) -> Gradients:
        if self._gradients:
            trainable = [w for w in weights if w.requires_grad]
            for part in self._gradients:
                grads = part.gradients(grads, trainable)
        return grads

    def before_step(self) -> None:
        for part in self.parts:
            part.clip()
        for part in self.parts:
            part.before_step()

    def after_step(self) -> None:
        for part in reversed(self.parts):
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
    def held_bytes(self) -> int:
        """Bytes of the tensors that they keep from step to step."""
        return sum(t.nbytes for state in self.state_dict() for kept in state.values() for t in _tensors(kept))

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


def _tensors(kept: Any) -> list[Tensor]:
    return [t for t in (kept if isinstance(kept, list | tuple) else [kept]) if isinstance(t, Tensor)]


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
    """Gradient shrinking; `factor` in (0, 1], 1 is off."""

    needs: ClassVar[str] = "gradient"

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise UserError(f"gradient shrinking needs a factor in (0, 1], got {self.factor}")

    def cotangent(self, gradient: Tensor) -> Tensor:
        return gradient if self.factor == 1 else gradient * self.factor
