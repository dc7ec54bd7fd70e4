"""A method is a point on four axes: Method = Coupling x Retention x Order x Correction (and how minibatches are fed,
and what stands between the data and the blocks).

    coupling     what goes up and down on an edge, and each block's objective: decides the truncation
    retention    what a block keeps between sending and hearing back: decides which weights its backward uses
    order        the sequence of operations of each block: decides the delay
    corrections  what is done about staleness; more can be added to any method: `corrected`
    selection    which samples the blocks train on, and with which weights; any method can be the boss: `selecting`

`Facts` are the claims of a method's card as code; generic tests measure them. What they cannot: of `locks` more than
the names; which weights a backward uses, where corrections move weights; the reach, where a coupling `substitutes`
inputs; and where answers are learned, that nothing further than the declared objectives is heard in the long run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from decoupled.correction import Correction, Site
from decoupled.coupling import Coupling
from decoupled.errors import UserError
from decoupled.order import Order
from decoupled.retention import KeepGraph, Retention
from decoupled.selection import Selection
from decoupled.source import Whole


@dataclass(frozen=True)
class Facts:
    """What a method claims; `k` is the block, `K` the number of blocks.

    Attributes:
        exact: its updates equal those of plain backpropagation with the same minibatches.
        reach: objectives J_j whose gradient reaches the weights of block k; empty: it is not trained.
        surrogate: what reaches them is not the gradient itself, but something random or learned in its place.
        delay: own updates between forward and backward of a pass in the steady state; the most, where it varies.
        least_delay: the fewest, where that is another number (gradients accumulated over micro-batches).
        in_flight: most passes a block holds between forward and backward.
        backward_weights: "forward" (those its forward used), "current", "mixed" (current ones, over what the forward
            has stored), or "none" (nothing is held over an update).
        reads_indices: whether batches must carry sample indices.
        bubble: (K, forward, backward) -> idle share of equal blocks that take so long for a minibatch, without latency
            and steps; None: not claimed.
        locks: the locks of backpropagation it removes: "forward", "backward", "update"; and where, if not everywhere.
    """

    exact: bool
    reach: Callable[[int, int], Collection[int]]
    surrogate: bool = False
    delay: Callable[[int, int], int] = lambda k, K: 0
    least_delay: Callable[[int, int], int] | None = None
    in_flight: Callable[[int, int], int] = lambda k, K: 1
    backward_weights: str = "none"
    reads_indices: bool = False
    bubble: Callable[[int, float, float], float] | None = None
    locks: tuple[str, ...] = ()


def _own_draw(epoch: int) -> int:
    return epoch


@dataclass(frozen=True)
class Method:
    """One point of the grid.

    `channel` bounds how many messages may wait on an edge upwards if nothing else does. `draws(epoch)` is the epoch
    whose random augmentation an epoch repeats: its own, unless something is kept for a sample as it looked then.
    """

    coupling: Coupling
    order: Order
    facts: Facts
    retention: type[Retention] = KeepGraph
    corrections: tuple[Correction, ...] = ()
    feed: Whole = field(default_factory=Whole)
    channel: int = 2
    draws: Callable[[int], int] = _own_draw
    selection: Selection | None = None
    name: str = ""

    trains: ClassVar[str] = "networks cut into blocks (data=... model=..., no task)"

    def describe(self, K: int) -> dict[str, Any]:
        """Its facts for `K` blocks, as plain data."""
        facts, order = self.facts, self.order
        text = "takes what has arrived" if order.rule is None else order.text(0, K, 6)
        return {
            "up": list(self.coupling.up),
            "down": list(self.coupling.down),
            "order": f"{order}; block 0 of {K}, 6 passes: {text}",
            "retention": self.retention.__name__,
            "corrections": [str(correction) for correction in self.corrections],
            "selection": "none: every sample" if self.selection is None else str(self.selection),
            "exact": facts.exact,
            "surrogate": facts.surrogate,
            "objectives that reach block k": {k: list(facts.reach(k, K)) for k in range(K)},
            "updates between forward and backward": [facts.delay(k, K) for k in range(K)],
            "passes in flight": [facts.in_flight(k, K) for k in range(K)],
            "locks removed": list(facts.locks),
        }

    def keeps(self, k: int, K: int) -> str:
        """What block `k` keeps of a pass between F and B, if one comes back: "graph", "input" or "nothing"."""
        return "graph" if self.at_once(k, K) else self.retention.keeps

    def replays(self, k: int, K: int) -> bool:
        """Whether a backward of block `k` runs the forward again."""
        return self.retention.recomputes and not self.at_once(k, K)

    def at_once(self, k: int, K: int) -> bool:
        """Whether passes of block `k` come back right after their forward, to the same weights: of the top one only."""
        if k < K - 1 or not self.order.adjacent(k, K):
            return False
        return not any(correction.moves(Site(k, K, 0.0, (), None)) for correction in self.corrections)

    @property
    def fixed(self) -> bool:
        """Whether it is fixed beforehand which pass meets which weights; otherwise arrivals decide."""
        chosen = self.selection is None or self.selection.fixed
        return self.order.rule is not None and not self.coupling.lossy and chosen

    @property
    def epochs(self) -> int:
        """Epochs that are enough to see all that it does."""
        return max(self.order.epochs, 1 if self.selection is None else self.selection.warmup + 1)


class Described(Protocol):
    """What every registered method is, whatever it trains."""

    trains: ClassVar[str]

    @property
    def name(self) -> str: ...

    def describe(self, K: int) -> dict[str, Any]: ...


def corrected(method: Method, more: Sequence[Correction]) -> Method:
    """`method` with further corrections behind its own.

    Raises:
        UserError: a correction that means nothing there, or two that contradict each other; says why.
    """
    both, late = (*method.corrections, *more), any(method.facts.delay(k, 8) for k in range(8))
    for correction in more:
        name = type(correction).__name__
        if correction.about_delay and not late:
            raise UserError(f"{name} is about late gradients, and those of {method.name!r} never are; leave it out")
        if correction.needs == "gradient" and "gradient" not in method.coupling.down:
            raise UserError(f"{name} needs gradients that go down from block to block; those of {method.name!r} do not")
        if correction.needs == "stale" and method.retention.today:
            raise UserError(
                f"{name} compares today's weights with those of the forward, which {method.name!r} does not keep "
                f"({method.retention.__name__}); use a method that does, or leave it out"
            )
        if method.retention.live and (correction.needs == "today" or correction.moves_forward):
            raise UserError(
                f"{name} runs a pass with other weights, and {method.name!r} keeps its graphs over the live ones; "
                "leave it out"
            )
        if correction.needs == "today" and not method.retention.today:
            raise UserError(
                f"{name} estimates the weights of the forward, which {method.name!r} keeps anyway "
                f"({method.retention.__name__}); leave it out"
            )
    kinds = [type(correction).__name__ for correction in both]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise UserError(f"{twice[0]} is there twice; give it once, or set the option of {method.name!r}")
    moved = [type(c).__name__ for c in both if c.moves_forward]
    if len(moved) > 1:
        raise UserError(f"{' and '.join(moved)} each say which weights a forward runs with; use one of them")
    return replace(method, corrections=both, facts=replace(method.facts, exact=False))


def selecting(boss: Method, selection: Selection) -> Method:
    """`boss` with a selection in front of it.

    Raises:
        UserError: it has one already.
    """
    if boss.selection is not None:
        raise UserError(f"boss {boss.name!r} selects samples itself; name a method that takes all of them")
    facts = replace(boss.facts, exact=False, reads_indices=True, bubble=None)  # selecting takes time, too
    return replace(boss, selection=selection, facts=facts)


def own(k: int, K: int) -> Collection[int]:
    """Reach of a local method: a block hears its own objective only."""
    return (k,)


def top(k: int, K: int) -> Collection[int]:
    """Reach of a global method: every block hears the loss of the network only."""
    return (K - 1,)


ALL_LOCKS = ("forward", "backward", "update")


def late(passes: int, M: int = 1, weights: str = "forward", surrogate: bool = False) -> Facts:
    """Facts of late gradients: at block k by `passes` (K-1-k) passes, of which M make one update.

    1F1B without a flush and lockstep are late by 1 pass per block, a tick per hop by 2.
    """
    return Facts(
        exact=False,
        reach=top,
        surrogate=surrogate,
        delay=lambda k, K: -(passes * (K - 1 - k) // -M),
        least_delay=lambda k, K: passes * (K - 1 - k) // M,
        in_flight=lambda k, K: passes * (K - 1 - k) + 1,
        backward_weights=weights,
        locks=ALL_LOCKS,
    )
