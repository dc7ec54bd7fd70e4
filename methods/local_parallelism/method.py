"""Local parallelism: every block follows losses that are near it; no gradient travels further than `reach` blocks.

    name               coupling                   order             objectives J_j on blocks   reach block k
    greedy_local       LocalObjective             local             all                        j = k
    chunked_local      Gradient inside a chunk,   sync              last block of each chunk   j = end of k's chunk
                       LocalObjective at its end
    overlapping_local  Overlap(reach)             truncated(reach)  reach-1 .. K-1             k <= j < k+reach

    x_k = detach(y_{k-1}),  y_k = f_k(x_k),  J_k = loss(head_k(y_k), target),  g_k = dJ_k/dy_k
    greedy       dw_k = vjp(f_k, g_k)
    overlapping  delta_{j->k} = gradient of J_j at y_k, passed through f_{k+1} .. f_j at their own inputs
                 dw_k = vjp(f_k, g_k + sum of delta_{j->k} for k < j < k+reach);  delta_{j->k-1} is sent on only
                 while k-1 > j-reach, each one by itself, so that none travels further than its reach

Source: Laskin et al. 2020 (arXiv 2012.03837), figure 2; reach = 1 is greedy, reach = K is backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from decoupled.coupling import Coupling, Gradient, LocalHead, LocalObjective, Lower, Place, Upper
from decoupled.errors import UserError
from decoupled.method import Facts, Method, own
from decoupled.order import local, objectives, sync, truncated
from decoupled.registry import register
from decoupled.retention import KeepNothing

ALL_LOCKS = ("forward", "backward", "update")


@register("greedy_local")
def greedy_local(head: str = "auto") -> Method:
    """Every block minimises the loss of its own auxiliary head."""
    facts = Facts(exact=False, reach=own, locks=ALL_LOCKS)
    return Method(LocalObjective(head), local, facts, KeepNothing)


@register("chunked_local")
def chunked_local(chunks: int = 2, head: str = "auto") -> Method:
    """Consecutive blocks form `chunks` chunks; each is trained by backpropagation from a head at its end."""
    if chunks < 1:
        raise UserError(f"chunked_local needs at least 1 chunk, got {chunks}")
    locks = tuple(f"{lock} between chunks" for lock in ALL_LOCKS)
    facts = Facts(exact=False, reach=lambda k, K: (_chunk_end(k, K, chunks),), locks=locks)
    return Method(Chunked(chunks, head), sync, facts, KeepNothing)


@register("overlapping_local")
def overlapping_local(reach: int = 2, head: str = "auto") -> Method:
    """Every loss reaches `reach` blocks down; a block adds up the gradients it hears."""
    if reach < 1:
        raise UserError(f"overlapping_local needs a reach of at least 1, got {reach}")
    locks = tuple(f"{lock} beyond the reach" for lock in ALL_LOCKS)
    facts = Facts(exact=False, reach=lambda k, K: objectives(k, K, reach), locks=locks)
    return Method(Overlap(reach, head), truncated(reach), facts, KeepNothing)


def _chunk_end(k: int, K: int, chunks: int) -> int:
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

    def lower(self, place: Place) -> Lower:
        ends = place.k == _chunk_end(place.k, place.K, self.chunks)
        return LocalHead(place, self.head) if ends else Gradient().lower(place)

    def upper(self, place: Place) -> Upper:
        starts = place.k - 1 == _chunk_end(place.k - 1, place.K, self.chunks)
        return Upper() if starts else Gradient().upper(place)


@dataclass(frozen=True)
class Overlap(Coupling):
    """One gradient down per objective that still has reach left."""

    reach: int
    head: str = "auto"
    down: tuple[str, ...] = field(default=("gradient",), init=False)

    def lower(self, place: Place) -> Lower:
        heard = objectives(place.k, place.K, self.reach)
        return LocalHead(place, self.head, own=place.k in heard, replies=len([j for j in heard if j > place.k]))

    def upper(self, place: Place) -> Upper:
        upper = Upper()
        upper.replies = min(self.reach, place.K) > 1
        return upper
