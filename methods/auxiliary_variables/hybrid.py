"""The serial-parallel hybrid: epochs of exact backpropagation and epochs of parallel stages in turn.

    cycle A  | serial x S, augmented afresh every epoch | parallel x P, on the images of the last serial epoch | ...
    cycle B  | serial x S | parallel x P | serial to the end

The last serial epoch records, at no cost, what the parallel phase starts from: lambda = X and kappa = p (see stage.py).
"""

from __future__ import annotations

from dataclasses import replace

from decoupled.method import ALL_LOCKS, Facts, Method
from decoupled.methods.auxiliary_variables.penalty import LayerParallel, ahead
from decoupled.methods.auxiliary_variables.rule import Phases, Rule
from decoupled.order import Order, sync
from decoupled.registry import register
from decoupled.retention import KeepNothing


@register("hybrid")
def hybrid(
    beta: float = 0.1,
    eta: float = 5.0,
    sigma: float | None = 0.5,
    serial: int = 1,
    parallel: int = 1,
    repeat: bool = True,
    warm: bool = True,
    sweep: bool = False,
    downsample: int | None = None,
) -> Method:
    """Serial-parallel hybrid of backpropagation and the augmented Lagrangian (sigma=null: penalty) method."""
    phases = Phases(serial, parallel, repeat)
    warm = warm and not (sweep and sigma is None)  # a sweep moves lambda itself, in the first visit
    coupling = LayerParallel(Rule(beta, eta, sigma, warm=warm), phases, downsample=downsample)
    where = "in parallel epochs"
    locks = ("forward", "update") if sweep else ALL_LOCKS
    facts = Facts(
        exact=False,
        reach=lambda k, K: sorted({k, K - 1}),
        reads_indices=True,
        locks=tuple(f"{lock}, {where}" for lock in locks),
    )
    return Method(coupling, in_turn(phases, ahead(sweep)), facts, KeepNothing, draws=phases.draw)


def in_turn(phases: Phases, rounds: Order) -> Order:
    """Synchronous in serial epochs, `rounds` in parallel ones."""

    def at(epoch: int) -> Order:
        return sync if phases.serial_at(epoch) else rounds

    name = f"{sync} x {phases.serial}, {rounds} x {phases.parallel}"
    return replace(at(0), name=name, phases=at, epochs=phases.serial + phases.parallel)
