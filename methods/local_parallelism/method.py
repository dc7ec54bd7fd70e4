"""Local parallelism: every block follows losses that are near it; no gradient travels further than `reach` blocks.

    name               coupling                   order             objectives J_j on blocks   reach block k
    greedy_local       LocalObjective             local             all                        j = k
    chunked_local      Gradient inside a chunk,   sync              last block of each chunk   j = end of k's chunk
                       LocalObjective at its end
    overlapping_local  Overlap(reach)             truncated(reach)  reach-1 .. K-1             k <= j < k+reach
    interlocking       Interlocked(n)             interlocked(n)    n-1 .. K-1                 j = min(k+n-1, K-1)
    dgl                LocalObjective             local             all                        j = k
    auglocal           Augmented                  local             all (see auxiliary.py)     j = k
    momentum_auxiliary Momentum                   answered          all (see momentum.py)      j = k
    predsim            PredSim                    local             all (see objectives.py)    j = k
    infopro            InfoPro                    local             all (see objectives.py)    j = k

    x_k = detach(y_{k-1}),  y_k = f_k(x_k),  J_k = loss(head_k(y_k), target),  g_k = dJ_k/dy_k
    greedy       dw_k = vjp(f_k, g_k)
    overlapping  delta_{j->k} = gradient of J_j at y_k, passed through f_{k+1} .. f_j at their own inputs
                 dw_k = vjp(f_k, g_k + sum of delta_{j->k} for k < j < k+reach);  delta_{j->k-1} is sent on only
                 while k-1 > j-reach, each one by itself, so that none travels further than its reach
    interlocking dw_k = vjp(f_k, delta_{j->k}) for j = min(k+n-1, K-1) alone (delta_{k->k} = g_k); the others are only
                 passed on

Sources: Laskin et al. 2020 (arXiv 2012.03837), figure 2; Gomez et al. 2022 (arXiv 2010.04116) for interlocking;
Belilovsky et al. 2020 for dgl, which is greedy with other heads; for the others see auxiliary.py, momentum.py and
objectives.py.
reach = 1 and n = 1 are greedy, reach = K and n = K are backpropagation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from decoupled.coupling import Coupling, Gradient, LocalHead, LocalObjective, Lower, Place, Upper
from decoupled.errors import UserError, unknown
from decoupled.method import Facts, Method, own
from decoupled.methods.local_parallelism.auxiliary import Augmented
from decoupled.methods.local_parallelism.momentum import Momentum, answered
from decoupled.methods.local_parallelism.objectives import InfoPro, PredSim
from decoupled.order import Order, local, objectives, sync, truncated
from decoupled.plan import Op, S
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


@register("interlocking")
def interlocking(n: int = 2, head: str = "auto") -> Method:
    """Every block follows the loss `n`-1 blocks ahead (or the network's) alone; its own loss trains its head."""
    if n < 1:
        raise UserError(f"interlocking needs an n of at least 1, got {n}")
    locks = tuple(f"{lock} beyond n blocks" for lock in ALL_LOCKS)
    facts = Facts(exact=False, reach=lambda k, K: (min(k + n - 1, K - 1),), locks=locks)
    return Method(Interlocked(n, head), interlocked(n), facts, KeepNothing)


@register("dgl")
def dgl(head: str = "mlp_sr") -> Method:
    """Greedy, with the heads of decoupled greedy learning."""
    facts = Facts(exact=False, reach=own, locks=ALL_LOCKS)
    return Method(LocalObjective(head), local, facts, KeepNothing)


@register("auglocal")
def auglocal(depth: int = 2, decline: float = 0.5) -> Method:
    """Greedy, with heads made like the layers to come: `depth` of them at the bottom, fewer towards the top."""
    if depth < 1 or not 0 <= decline <= 1:
        raise UserError(f"auglocal needs a depth of at least 1 and a decline from 0 to 1, got {depth} and {decline}")
    return Method(Augmented(depth, decline), local, Facts(exact=False, reach=own, locks=ALL_LOCKS), KeepNothing)


@register("momentum_auxiliary")
def momentum_auxiliary(momentum: float = 0.995, head: str = "auto") -> Method:
    """Greedy, with a head that begins with a slowly following copy of the next block's first layer."""
    if not 0 <= momentum < 1:
        raise UserError(f"momentum_auxiliary needs a momentum of at least 0 and below 1, got {momentum}")
    facts = Facts(exact=False, reach=own, locks=("backward", "update"))
    return Method(Momentum(momentum, head), answered, facts, KeepNothing)


@register("predsim")
def predsim(mode: str = "both", beta: float = 0.99) -> Method:
    """Every block predicts the class and matches the similarities of classes, with weight `beta` on the latter."""
    betas = {"both": beta, "pred": 0.0, "sim": 1.0}
    if mode not in betas:
        raise unknown("mode", mode, betas)
    if not 0 <= beta <= 1:
        raise UserError(f"predsim needs a beta from 0 to 1, got {beta}")
    return Method(PredSim(betas[mode]), local, Facts(exact=False, reach=own, locks=ALL_LOCKS), KeepNothing)


@register("infopro")
def infopro(lambda1: float = 1.0, lambda2: float = 0.5, contrast: bool = False, head: str = "mlp") -> Method:
    """Every block reconstructs the input, the less the higher it is, and tells classes apart, the more so."""
    if lambda1 < 0 or not 0 <= lambda2 <= 1:
        raise UserError(f"infopro needs lambda1 >= 0 and lambda2 from 0 to 1, got {lambda1} and {lambda2}")
    facts = Facts(exact=False, reach=own, locks=ALL_LOCKS)
    return Method(InfoPro(lambda1, lambda2, contrast, head), local, facts, KeepNothing)


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


@dataclass(frozen=True)
class Interlocked(Overlap):
    """The same messages as `Overlap`, but a block follows only the last gradient it hears."""

    def lower(self, place: Place) -> Lower:
        lower = super().lower(place)
        lower.relays = True
        return lower
