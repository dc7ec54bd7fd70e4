"""Couplings and orders that bound how far a gradient travels; which block hears which objective is in method.py.

Chunked       gradient down inside a chunk, nothing between chunks
Overlap       one gradient down per objective that still has reach left
Interlocked   the messages of Overlap, but a block follows only the last gradient that it hears
Frozen        gradient down among the last blocks, nothing below them: those keep their first weights
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from decoupled.coupling import Coupling, Gradient, LocalHead, Lower, Place, Top, Upper
from decoupled.order import Order, objectives
from decoupled.plan import Op, S


def interlocked(n: int) -> Order:
    """Like `truncated(n)`, but every gradient is passed on by itself except the last one, which the weights follow."""

    def rule(k: int, K: int) -> Iterator[Op]:
        heard = objectives(k, K, n)
        goes_on = k > 0 and heard[-1] <= k + n - 2
        for batch in itertools.count():
            yield Op("F", batch)
            yield from (Op("I", batch) for _ in heard[:-1])
            yield from (Op("B" if goes_on else "W", batch), S)

    return Order(f"interlocked({n})", rule)


def chunk_end(k: int, K: int, chunks: int) -> int:
    """The last block of the chunk of block k, when K blocks form min(chunks, K) chunks of nearly equal length."""
    chunks = min(chunks, K)
    chunk = next(c for c in range(chunks) if k < (c + 1) * K // chunks)
    return (chunk + 1) * K // chunks - 1


@dataclass(frozen=True)
class Chunked(Coupling):
    """Gradient on edges inside a chunk, nothing down on edges between chunks."""

    chunks: int
    head: str = "auto"
    down: tuple[str, ...] = field(default=("gradient",), init=False)
    linear: bool = field(default=True, init=False)

    def lower(self, place: Place) -> Lower:
        ends = place.k == chunk_end(place.k, place.K, self.chunks)
        return LocalHead(place, self.head) if ends else Gradient().lower(place)

    def upper(self, place: Place) -> Upper:
        starts = place.k - 1 == chunk_end(place.k - 1, place.K, self.chunks)
        return Upper() if starts else Gradient().upper(place)


@dataclass(frozen=True)
class Overlap(Coupling):
    """One gradient down per objective that still has reach left."""

    reach: int
    head: str = "auto"
    down: tuple[str, ...] = field(default=("gradient",), init=False)
    linear: bool = field(default=True, init=False)

    def lower(self, place: Place) -> Lower:
        heard = objectives(place.k, place.K, self.reach)
        return LocalHead(place, self.head, own=place.k in heard, replies=len([j for j in heard if j > place.k]))

    def upper(self, place: Place) -> Upper:
        upper = Upper()
        upper.replies = min(self.reach, place.K) > 1
        return upper


@dataclass(frozen=True)
class Interlocked(Overlap):
    """The same messages as `Overlap`, but a block follows only the last gradient it hears."""

    def lower(self, place: Place) -> Lower:
        lower = super().lower(place)
        lower.relays = True
        return lower


@dataclass(frozen=True)
class Frozen(Coupling):
    """Gradient among the last `trained` blocks; the blocks below send activations up and learn nothing."""

    trained: int
    down: tuple[str, ...] = field(default=("gradient",), init=False)
    linear: bool = field(default=True, init=False)

    def lower(self, place: Place) -> Lower:
        if place.top:
            return Top(place)
        return Gradient().lower(place) if place.k >= place.K - self.trained else Lower()

    def upper(self, place: Place) -> Upper:
        return Gradient().upper(place) if place.k > place.K - self.trained else Upper()


def frozen(trained: int) -> Order:
    """Like `sync` for the last `trained` blocks; the others forget a pass after its forward: W, of no gradient."""

    def rule(k: int, K: int) -> Iterator[Op]:
        for n in itertools.count():
            yield from (Op("F", n), Op("B" if k >= K - trained else "W", n), S)

    return Order(f"frozen({trained})", rule)
