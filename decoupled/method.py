"""A method is a point on four axes: Method = Coupling x Retention x Order x Correction (and how minibatches are fed).

    coupling     what goes up and down on an edge, and each block's objective: decides the truncation
    retention    what a block keeps between sending and hearing back: decides which weights its backward uses
    order        the sequence of operations of each block: decides the delay
    corrections  what is done about staleness

`Facts` are the claims of a method's card as code; generic tests measure every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from decoupled.correction import Correction
from decoupled.coupling import Coupling
from decoupled.order import Order
from decoupled.retention import KeepGraph, Retention
from decoupled.source import Whole


@dataclass(frozen=True)
class Facts:
    """What a method claims; `k` is the block, `K` the number of blocks.

    Attributes:
        exact: its updates equal those of plain backpropagation with the same minibatches.
        reach: objectives J_j whose gradient reaches the weights of block k.
        delay: own updates between forward and backward of a pass in the steady state.
        in_flight: most passes a block holds between forward and backward.
        backward_weights: "forward" (those its forward used), "current", or "none" (nothing is held over an update).
        reads_indices: whether batches must carry sample indices.
        locks: the locks of backpropagation it removes: "forward", "backward", "update"; and where, if not everywhere.
    """

    exact: bool
    reach: Callable[[int, int], Collection[int]]
    delay: Callable[[int, int], int] = lambda k, K: 0
    in_flight: Callable[[int, int], int] = lambda k, K: 1
    backward_weights: str = "none"
    reads_indices: bool = False
    locks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One point of the grid. `channel` bounds how many messages may wait on an edge upwards if nothing else does."""

    coupling: Coupling
    order: Order
    facts: Facts
    retention: type[Retention] = KeepGraph
    corrections: tuple[Correction, ...] = ()
    feed: Whole = field(default_factory=Whole)
    channel: int = 2
    name: str = ""


def own(k: int, K: int) -> Collection[int]:
    """Reach of a local method: a block hears its own objective only."""
    return (k,)


def top(k: int, K: int) -> Collection[int]:
    """Reach of a global method: every block hears the loss of the network only."""
    return (K - 1,)
