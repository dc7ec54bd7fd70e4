"""Timing: what operations and messages take on the simulator's clock."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from decoupled.errors import UserError
from decoupled.runtime.contract import Cost, Edge, Latency


@dataclass(frozen=True)
class Timing:
    """Virtual durations of a chain of blocks.

    Attributes:
        forward, backward: seconds per operation F and B, one number or one per block.
        step: seconds per S, one number or one per block.
        recompute: whether B also pays for a forward, for all blocks or one per block.
        latency: seconds per message between blocks, one way.
        jitter: relative spread; every duration is multiplied by 1 + jitter * u, u uniform in [0, 1) from `seed`.
        seed: of the jitter.
        slow: block number -> factor on all its operations.
        bandwidth: bytes per second of a link, each way, one message after the other; 0: no limit.
    """

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 2.0
    step: float | Sequence[float] = 0.0
    recompute: bool | Sequence[bool] = False
    latency: float = 0.0
    jitter: float = 0.0
    seed: int = 0
    slow: dict[int, float] | None = None
    bandwidth: float = 0.0

    def __post_init__(self) -> None:
        durations = np.concatenate([np.ravel(x) for x in (self.forward, self.backward, self.step)])
        others = (self.latency, self.jitter, self.bandwidth, *(self.slow or {}).values())
        if not all(0 <= x < float("inf") for x in (*durations, *others)):  # which nan is not
            raise UserError(
                "forward, backward, step, latency, jitter, bandwidth and slow must be 0 or more, and finite"
            )

    def cost(self) -> Cost:
        """The duration of an operation: F (and P), B (or its halves I and W), S; all else costs nothing."""
        spread, slow = self._spread("cost"), self.slow or {}

        @functools.cache  # one entry per block and kind
        def steady(actor: str, kind: str) -> float | None:
            if not actor.startswith("block"):
                return None
            k = int(actor[5:])
            return self._base(k, kind) * slow.get(k, 1.0)

        def cost(actor: str, operation: str) -> float:
            seconds = steady(actor, operation[0])
            return 0.0 if seconds is None else seconds * spread()

        return cost

    def delay(self) -> Latency:
        """The time a message between blocks is under way (from the source: none)."""
        if not self.latency:
            return lambda edge, message: 0.0
        spread = self._spread("latency")
        return lambda edge, message: self.latency * spread() if _apart(edge) else 0.0

    def _base(self, k: int, kind: str) -> float:
        forward = self.forward if isinstance(self.forward, int | float) else self.forward[k]
        backward = self.backward if isinstance(self.backward, int | float) else self.backward[k]
        backward += forward * (self.recompute[k] if isinstance(self.recompute, Sequence) else bool(self.recompute))
        step = self.step if isinstance(self.step, int | float) else self.step[k]
        durations = {"F": forward, "P": forward, "B": backward, "I": backward / 2, "W": backward / 2, "S": step}
        return durations.get(kind, 0.0)

    def _spread(self, what: str) -> Callable[[], float]:
        if not self.jitter:
            return lambda: 1.0
        draw = random.Random(f"{self.seed}/{what}")
        return lambda: 1.0 + self.jitter * draw.random()


def _apart(edge: Edge) -> bool:
    """Whether it joins two blocks: the source has no latency, nor has what a block says to its own intake."""
    return edge.source.startswith("block") and edge.source[5:] != edge.target.removeprefix("intake")
