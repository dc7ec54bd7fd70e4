"""Simulation without training: what a method's order costs at a given speed, latency, bandwidth and depth.

The real orders and couplings run on the simulated runtime with messages that have a size and no content; nothing is
computed. Times and sizes are in units of the user's choice, each block has a device of its own, and each direction of a
link between neighbours carries one message after the other. Not modelled: the cost of auxiliary heads (unless measured:
`profile`), messages that wait, and temporary memory within an operation.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from decoupled import registry
from decoupled.build import wiring
from decoupled.errors import UserError
from decoupled.messages import End
from decoupled.method import Method
from decoupled.runtime.contract import Graph, Observer, Timings
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.simulate.path import CriticalPath
from decoupled.simulate.planned import Planned, Sizes, Ticker

Numbers = float | Sequence[float]


@dataclass(frozen=True)
class Load:
    """Bytes per minibatch, one number or one per block, in any unit (bandwidth is in the same).

    Attributes:
        activation: of one tensor that a block sends up, and of the input that the block above keeps of it.
        graph: saved by one forward. weights: of a block. optimizer: copies of them that its optimizer keeps.
        memory: limit of a block's device; None: no limit.
    """

    activation: Numbers = 1.0
    graph: Numbers = 1.0
    weights: Numbers = 1.0
    optimizer: float = 1.0
    memory: Numbers | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.optimizer < float("inf"):
            raise UserError(f"optimizer (copies of the weights) must be 0 or more, and finite, got {self.optimizer}")


@dataclass(frozen=True)
class Simulation:
    """What a simulation measured; lists have one entry per block.

    Attributes:
        method, blocks, batches: what was simulated (minibatches).
        time: virtual time of the whole run, filling and draining included.
        batches_per_time: throughput.
        speedup: against one device that does the same forwards, with their backwards and steps, without waiting.
        utilisation: busy time / time. bubble: the idle share of all devices. closed_form: what the method claims of
            it for equal blocks without latency (`Facts.bubble`), or None.
        staleness: updates between forward and backward -> passes.
        in_flight: most passes held at once. updates: optimizer steps.
        held: most bytes kept for passes. memory: with weights, gradients, optimizer, and the graph of a replay.
        too_small: block -> memory its device would have to have.
        bytes_up, bytes_down: sent per minibatch.
        critical_path: time on it, by block ("blocks"), "messages", and "room" waited for on edges.
    """

    method: str
    blocks: int
    batches: int
    time: float
    batches_per_time: float
    speedup: float
    utilisation: list[float]
    bubble: float
    closed_form: float | None
    staleness: list[dict[int, int]]
    in_flight: list[int]
    updates: list[int]
    held: list[float]
    memory: list[float]
    too_small: dict[int, float]
    bytes_up: list[float]
    bytes_down: list[float]
    critical_path: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def simulate(
    method: str | Mapping[str, Any] | Method,
    blocks: int = 4,
    batches: int = 64,
    timing: Timing | None = None,
    observers: Sequence[Observer] = (),
    load: Load | None = None,
) -> Simulation:
    """Run the order of a method on a virtual clock; what selects samples is not modelled, only its boss.

    Args:
        method: a name, or a mapping with name and options.
        blocks: number of blocks. batches: number of minibatches.
        timing: durations per minibatch and block; a micro-batch takes its share of them.
        observers: look on (timelines).
        load: sizes.

    Raises:
        UserError: unknown method or option, fewer than one block or batch, a list with another length than the blocks.

    Example:
        >>> round(simulate("pipedream", blocks=2, batches=100).speedup, 1)
        2.0
    """
    if blocks < 1 or batches < 1:
        raise UserError(f"blocks and batches must be at least 1, got {blocks} and {batches}")
    point = method if isinstance(method, Method) else registry.make(method)
    timing, load = timing or Timing(), load or Load()
    if outside := [k for k in timing.slow or {} if not 0 <= k < blocks]:
        raise UserError(f"slow names blocks {outside}, but there are {blocks}: 0 to {blocks - 1}")
    for name in ("forward", "backward", "step"):
        per_block(name, getattr(timing, name), blocks)
    given = timing
    again = per_block("recompute", timing.recompute, blocks)
    timing = replace(timing, recompute=[bool(again[k]) or point.replays(k, blocks) for k in range(blocks)])
    actors = [Planned(point, k, blocks) for k in range(blocks)]
    rows = {actor.name: actor.upper.streams for actor in actors}
    for actor, sizes in zip(actors, sizes_of(point, load, list(rows.values())), strict=True):
        actor.weigh(sizes)
    readers, intakes, edges = wiring(actors, replace(point, selection=None))
    ticker = Ticker([reader.name for reader in readers], batches * point.feed.count)
    cost, delay, share = timing.cost(), timing.delay(), point.feed.share
    idle = {actor.name for actor in actors if not actor.learns}

    def price(actor: str, op: str) -> float:
        return 0.0 if actor in idle and op[0] != "F" else cost(actor, op) * (1 if op == "S" else share * rows[actor])

    path = CriticalPath(blocks, [actor.name for actor in actors if actor.k and actor.upper.replies])
    runtime = Simulated(
        cost=price,
        latency=lambda edge, message: 0.0 if isinstance(message, End) else delay(edge, message),
        bandwidth=timing.bandwidth,
    )
    with _uncollected() if not observers else nullcontext():
        times = runtime.run(Graph([ticker, *actors, *intakes], edges), [path, *observers])
    return _record(point, batches, given, load, actors, times, path.result(times.elapsed))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles, in the whole process: it would go over millions of messages for nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _record(
    point: Method, batches: int, timing: Timing, load: Load, actors: Sequence[Planned], times: Timings,
    path: dict[str, Any],
) -> Simulation:  # fmt: skip
    blocks, elapsed = len(actors), times.elapsed
    alone = Timing(timing.forward, timing.backward, timing.step, slow=timing.slow).cost()
    work = sum(
        a.forwards
        / point.feed.count
        * (a.upper.streams * (alone(a.name, "F") + alone(a.name, "B")) + alone(a.name, "S"))
        for a in actors
    )
    busy = [times.busy[actor.name] / elapsed if elapsed else 0.0 for actor in actors]
    limits = None if load.memory is None else per_block("memory", load.memory, blocks)
    memory = [a.sizes.weights * (2 + load.optimizer) + a.held + a.sizes.graph * a.replays for a in actors]
    return Simulation(
        method=point.name,
        blocks=blocks,
        batches=batches,
        time=elapsed,
        batches_per_time=batches / elapsed if elapsed else float("inf"),
        speedup=work / elapsed if elapsed else float("nan"),
        utilisation=busy,
        bubble=1.0 - sum(busy) / blocks,
        closed_form=_claimed_bubble(point, timing, blocks),
        staleness=[dict(sorted(actor.staleness.items())) for actor in actors],
        in_flight=[actor.most for actor in actors],
        updates=[actor.version for actor in actors],
        held=[actor.held for actor in actors],
        memory=memory,
        too_small={k: need for k, need in enumerate(memory) if limits and need > limits[k]},
        bytes_up=[actor.bytes_up / batches for actor in actors],
        bytes_down=[actor.bytes_down / batches for actor in actors],
        critical_path=path,
    )


def _claimed_bubble(point: Method, timing: Timing, blocks: int) -> float | None:
    """What the method says of equal blocks without latency or steps, if these are such blocks."""
    claim, times = point.facts.bubble, [per_block(n, getattr(timing, n), blocks) for n in ("forward", "backward")]
    uneven = any(len({*one}) > 1 for one in times) or any(per_block("step", timing.step, blocks))
    replays = {point.replays(k, blocks) for k in range(blocks)}
    uneven = uneven or len(replays) > 1
    if claim is None or uneven or timing.slow or timing.jitter or timing.latency or timing.bandwidth:
        return None
    found = claim(blocks, times[0][0], times[1][0] + times[0][0] * (True in replays))
    return found if found == found else None  # not claimed here


def per_block(name: str, numbers: Numbers, blocks: int) -> list[float]:
    """One number per block.

    Raises:
        UserError: another number of them, or one below 0 or not finite.
    """
    found = [float(numbers)] * blocks if isinstance(numbers, int | float) else [float(x) for x in numbers]
    if len(found) != blocks:
        raise UserError(f"{name} has {len(found)} numbers for {blocks} blocks; give one for all, or one per block")
    if wrong := [x for x in found if not 0 <= x < float("inf")]:  # which nan is not
        raise UserError(f"{name} must be 0 or more, and finite, got {wrong[0]:g}")
    return found


def sizes_of(method: Method, load: Load, rows: Sequence[int]) -> list[Sizes]:
    """Bytes of one pass at every block. Down go as many tensors as the coupling says, of the size of what came up.

    Where the coupling says that they have another shape (`down_like_up`), they are taken for the network's output.

    Args:
        rows: of each block's input, per sample (`Upper.streams`).
    """
    blocks = len(rows)
    lists = [per_block(name, getattr(load, name), blocks) for name in ("activation", "graph", "weights")]
    activation, graph, weights = lists
    share, up, down = method.feed.share, tensors_up(method, rows), len(method.coupling.down)
    below = [activation[0], *activation[:-1]]
    return [
        Sizes(
            up=up[k] * activation[k] * share,
            down=down * (below[k] if method.coupling.down_like_up else activation[-1]) * share,
            input=rows[k] * below[k] * share,
            graph=rows[k] * graph[k] * share,
            weights=weights[k],
        )
        for k in range(blocks)
    ]


def tensors_up(method: Method, rows: Sequence[int]) -> list[int]:
    """Tensors in a message of every block: those of the coupling, of streams no more than the block above takes."""
    named, streams = len(method.coupling.up), max(rows) > 1
    return [min(named, above) if streams else named for above in (*rows[1:], 0)]
