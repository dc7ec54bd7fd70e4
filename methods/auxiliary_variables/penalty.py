"""The layer-parallel penalty and augmented Lagrangian methods: see method.py for the table, stage.py for the equations.

stored per sample   E runs ahead of F: lambda of the next passes waits above before this one is answered
per minibatch       lambda starts at the forward value, for some rounds on the same minibatch
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

from decoupled.coupling import Coupling, Lower, Place, Top, Upper
from decoupled.method import Facts, Method, own
from decoupled.methods.auxiliary_variables.filters import Filter
from decoupled.methods.auxiliary_variables.rule import ALL_PARALLEL, Phases, Rule
from decoupled.methods.auxiliary_variables.stage import Above, Below
from decoupled.order import Order
from decoupled.order import rounds as rounds_order
from decoupled.plan import Op, S
from decoupled.registry import register
from decoupled.retention import KeepNothing
from decoupled.source import Repeat

LEAD = 2  # passes whose lambda is sent ahead


@dataclass(frozen=True)
class LayerParallel(Coupling):
    """lambda up, the gradient for it down; `depth` blocks hear the top in a minibatch (None: all)."""

    rule: Rule
    phases: Phases = ALL_PARALLEL
    stored: bool = True
    downsample: int | None = None
    depth: int | None = None
    up = ("auxiliary variable",)
    down = ("gradient",)
    substitutes = True

    def lower(self, place: Place) -> Lower:
        if place.k == 0 and self.depth is not None and self.depth < place.K:
            warnings.warn(
                f"{self.depth} rounds reach the upper {self.depth} of {place.K} blocks, those below learn nothing; "
                f"use rounds={place.K} or more, or sweep=true",
                stacklevel=2,
            )
        return Top(place) if place.top else Below(place, self.rule, self.phases, self.stored, self._filter(place, 0))

    def upper(self, place: Place) -> Upper:
        return Above(self.phases, self._filter(place, -1))

    def _filter(self, place: Place, offset: int) -> Filter:
        k = place.k + offset
        return Filter(self.downsample, place.shapes[k], f"edge block{k} -> block{k + 1}")


def ahead(sweep: bool = False) -> Order:
    """E0 .. E[LEAD-1], then E[n+LEAD] F[n] B[n] S A[n] for every n: Jacobi with the variables sent ahead.

    In a right-to-left `sweep` A[n] comes before B[n]. Its answer is there by then: the block above has had lambda.
    """

    def operations(k: int, K: int) -> Iterator[Op]:
        yield from (Op("E", n) for n in range(LEAD))
        for n in itertools.count():
            turn = (Op("A", n), Op("B", n), S) if sweep else (Op("B", n), S, Op("A", n))
            yield from (Op("E", n + LEAD), Op("F", n), *turn)

    return Order(f"rounds({'sweep=True, ' if sweep else ''}ahead={LEAD})", operations)


def layer_parallel(rule: Rule, stored: bool, rounds: int, sweep: bool, downsample: int | None) -> Method:
    """A method whose edges follow `rule` in every epoch."""
    coupling = LayerParallel(rule, ALL_PARALLEL, stored, downsample, None if stored or sweep else rounds)
    locks = ("update",) if sweep else ("backward", "update")
    locks += ("forward",) if stored else ()
    facts = Facts(exact=False, reach=own, reads_indices=stored, locks=locks)
    order = ahead(sweep) if stored and rounds == 1 else rounds_order(sweep)
    method = Method(coupling, order, facts, KeepNothing, feed=Repeat(rounds))
    return replace(method, draws=ALL_PARALLEL.draw) if stored else method


@register("penalty")
def penalty(
    beta: float = 0.1,
    eta: float = 5.0,
    stored: bool = True,
    rounds: int = 1,
    sweep: bool = False,
    step: str = "gradient",
    downsample: int | None = None,
) -> Method:
    """Layer-parallel penalty method: variables stored per sample, or forward-initialised per minibatch."""
    return layer_parallel(Rule(beta, eta, None, step), stored, rounds, sweep, downsample)


@register("augmented_lagrangian")
def augmented_lagrangian(
    beta: float = 0.1,
    eta: float = 5.0,
    sigma: float = 0.5,
    stored: bool = True,
    rounds: int = 1,
    sweep: bool = False,
    step: str = "gradient",
    downsample: int | None = None,
) -> Method:
    """Layer-parallel augmented Lagrangian method: a multiplier per sample beside the variable."""
    return layer_parallel(Rule(beta, eta, sigma, step), stored, rounds, sweep, downsample)
