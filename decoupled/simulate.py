"""Simulation without training: what a method's order costs at a given speed, latency and depth.

The real orders and couplings run on the simulated runtime with empty messages; nothing is computed. Durations are in
units of the user's choice. Not modelled: bandwidth (bytes take no time), contention, and the cost of auxiliary heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from decoupled import registry
from decoupled.build import halves, wiring
from decoupled.coupling import Place
from decoupled.errors import UserError
from decoupled.messages import End, Message
from decoupled.method import Method
from decoupled.plan import ANY, Op
from decoupled.runtime.contract import Actor, Graph, Observer, Outcome, Want
from decoupled.runtime.simulated import Simulated, Timing
from decoupled.worker import down_port, needed


@dataclass(frozen=True)
class Simulation:
    """What a simulation measured; lists have one entry per block.

    Attributes:
        method, blocks, batches: what was simulated (minibatches).
        time: virtual time of the whole run, filling and draining included.
        batches_per_time: throughput.
        speedup: against one device that does the same forwards, with their backwards and steps, without waiting.
        utilisation: busy time / time. staleness: updates between forward and backward -> passes.
        in_flight: most passes held at once. updates: optimizer steps.
    """

    method: str
    blocks: int
    batches: int
    time: float
    batches_per_time: float
    speedup: float
    utilisation: list[float]
    staleness: list[dict[int, int]]
    in_flight: list[int]
    updates: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def simulate(
    method: str | Mapping[str, Any] | Method,
    blocks: int = 4,
    batches: int = 64,
    timing: Timing | None = None,
    observers: Sequence[Observer] = (),
) -> Simulation:
    """Run the order of a method on a virtual clock.

    Args:
        method: a name, or a mapping with name and options.
        blocks: number of blocks. batches: number of minibatches.
        timing: durations per minibatch and block; a micro-batch takes its share of them.
        observers: look on (timelines).

    Raises:
        UserError: unknown method or option, fewer than one block or batch.

    Example:
        >>> round(simulate("pipedream", blocks=2, batches=100).speedup, 1)
        2.0
    """
    if blocks < 1 or batches < 1:
        raise UserError(f"blocks and batches must be at least 1, got {blocks} and {batches}")
    point = method if isinstance(method, Method) else registry.make(method)
    timing = timing or Timing()
    if outside := [k for k in timing.slow or {} if not 0 <= k < blocks]:
        raise UserError(f"slow names blocks {outside}, but there are {blocks}: 0 to {blocks - 1}")
    if point.retention.recomputes:
        timing = replace(timing, recompute=True)
    shapes = ((1,),) * blocks
    places = [Place(k, blocks, lambda y, t: y.sum(), shapes, (1,)) for k in range(blocks)]
    actors = [_Planned(place, point) for place in places]
    readers, intakes, edges = wiring(actors, point)
    ticker = _Ticker([reader.name for reader in readers], batches * point.feed.count)
    cost = timing.cost()
    share, idle = point.feed.share, {actor.name for actor in actors if not actor.learns}

    def price(actor: str, op: str) -> float:
        return 0.0 if actor in idle and op[0] != "F" else cost(actor, op) * (1 if op == "S" else share)

    runtime = Simulated(cost=price, latency=timing.delay())
    times = runtime.run(Graph([ticker, *actors, *intakes], edges), observers)
    alone = Timing(timing.forward, timing.backward, timing.step, slow=timing.slow).cost()
    serial = sum(
        a.forwards / point.feed.count * (alone(a.name, "F") + alone(a.name, "B") + alone(a.name, "S")) for a in actors
    )
    return Simulation(
        method=point.name,
        blocks=blocks,
        batches=batches,
        time=times.elapsed,
        batches_per_time=batches / times.elapsed if times.elapsed else float("inf"),
        speedup=serial / times.elapsed if times.elapsed else float("nan"),
        utilisation=[times.busy[actor.name] / times.elapsed if times.elapsed else 0.0 for actor in actors],
        staleness=[dict(sorted(actor.staleness.items())) for actor in actors],
        in_flight=[actor.most for actor in actors],
        updates=[actor.version for actor in actors],
    )


class _Ticker(Actor):
    """Tells every block that reads data that pass n may begin."""

    name = "source"

    def __init__(self, readers: Sequence[str], passes: int) -> None:
        self._readers, self._passes, self._next = readers, passes, 0

    def wants(self) -> Sequence[Want]:
        return (Want(),) if self._next <= self._passes else ()

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        n, self._next = self._next, self._next + 1
        message = Message(n) if n < self._passes else End(n)
        return Outcome(None, [(reader, message) for reader in self._readers])


class _Planned(Actor):
    """A worker without tensors: the same order and the same waits."""

    def __init__(self, place: Place, method: Method) -> None:
        self.k, self.K, self.name = place.k, place.K, f"block{place.k}"
        self.lower, self.upper = halves(method, place)
        self.needs_data = self.lower.needs_data or self.upper.needs_data
        self._order, self._plan = method.order, method.order.plan(place.k, place.K)
        self.learns = bool(method.facts.reach(place.k, place.K))
        self._forward: dict[int, list[int]] = {}  # pass -> version at F, Down messages to come, Down messages sent
        self._data: set[int] = set()
        self._own: set[int] = set()
        self._early: set[int] = set()
        self.version = self.most = self.forwards = 0
        self.staleness: Counter[int] = Counter()

    def wants(self) -> Sequence[Want]:
        return [self._want(op) for op in self._plan.options()]

    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        op: Op = want.tag
        if any(isinstance(message, End) for message in messages):
            end = messages[0].key
            assert isinstance(end, int)
            self._plan.end(end)
            return Outcome(None, [("up", End(end))])
        key = want.key if not messages else messages[0].key
        self._plan.done(op)
        if not isinstance(key, int):
            self.version += self.learns
            return Outcome("S" if self.learns else None)
        return Outcome(f"{op.kind}{key}", self._operate(op.kind, key, messages))

    def _want(self, op: Op) -> Want:
        if op.kind == "S":
            return Want((), None, op)
        key = None if op.batch == ANY else op.batch
        replies = self._forward[key][1] if key in self._forward else self.lower.replies
        ports = needed(op.kind, self.lower, self.upper, replies, key in self._own, key in self._data)
        if key is None and not ports:
            key = next(iter(self._forward))
        return Want(ports, key, op)

    def _operate(self, kind: str, n: int, messages: tuple[Message, ...]) -> list[tuple[str, Message]]:
        if kind == "E":
            self._data.add(n)
            self._early.add(n)
            return [("up", Message(n))]
        if kind == "F":
            sees = self._order.sees
            version = self.version if sees is None else sees(self.k, self.K, n)
            self._forward[n] = [version, self.lower.replies, 0]
            self.forwards += 1
            self.most = max(self.most, len(self._forward))
            return [] if n in self._early else [("up", Message(n))]
        if kind == "A":
            return []
        state = self._forward[n]
        state[1] -= len(messages)
        answers = kind in "BI" and self.upper.replies
        state[2] += answers
        self._own.add(n)
        if kind in "BW":
            self.staleness[self.version - state[0]] += 1
            del self._forward[n]
            for seen in (self._own, self._data, self._early):
                seen.discard(n)
        return [(down_port(state[2] - 1), Message(n))] if answers else []
