"""Simulated: one thread, a virtual clock, and any speeds and delays one wants to study.

Each operation is really carried out, at the virtual time its messages arrive, and takes the virtual time that `cost`
says; a message arrives `latency` later, never overtaking an earlier one on its edge unless `fifo=False`. Events at
equal times are handled in the order they were made, so a run is a pure function of the graph, the costs and the seed.

    start of an operation -> (cost) -> its end: messages leave -> (latency) -> arrival -> the target starts if it wants
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from decoupled.errors import StallError
from decoupled.messages import Message
from decoupled.runtime.contract import (
    Actor,
    Cost,
    Edge,
    Graph,
    Latency,
    Mailbox,
    Observer,
    Runtime,
    Timings,
    intra_op_threads,
)


@dataclass(frozen=True)
class Timing:
    """Virtual durations of a chain of blocks.

    Attributes:
        forward, backward: seconds per operation F and B, one number or one per block.
        step: seconds per S.
        recompute: whether B also pays for a forward.
        latency: seconds per message between blocks, one way.
        jitter: relative spread; every duration is multiplied by 1 + jitter * u, u uniform in [0, 1) from `seed`.
        seed: seed of the jitter.
        slow: block number -> factor on all its operations.
    """

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 2.0
    step: float = 0.0
    recompute: bool = False
    latency: float = 0.0
    jitter: float = 0.0
    seed: int = 0
    slow: dict[int, float] | None = None

    def cost(self) -> Cost:
        """The duration of an operation: F, B (or its halves I and W), S; the source and bookkeeping cost nothing."""
        spread, slow = self._spread("cost"), self.slow or {}

        def cost(actor: str, operation: str) -> float:
            if not actor.startswith("block"):
                return 0.0
            k = int(actor[5:])
            return self._base(k, operation[0]) * slow.get(k, 1.0) * spread()

        return cost

    def delay(self) -> Latency:
        """The time a message between blocks is under way (from the source: none)."""
        spread = self._spread("latency")
        return lambda edge, message: self.latency * spread() if edge.source.startswith("block") else 0.0

    def _base(self, k: int, kind: str) -> float:
        forward = self.forward if isinstance(self.forward, int | float) else self.forward[k]
        backward = self.backward if isinstance(self.backward, int | float) else self.backward[k]
        backward += forward if self.recompute else 0.0
        return {"F": forward, "B": backward, "I": backward / 2, "W": backward / 2, "S": self.step}.get(kind, 0.0)

    def _spread(self, what: str) -> Callable[[], float]:
        if not self.jitter:
            return lambda: 1.0
        draw = random.Random(f"{self.seed}/{what}")
        return lambda: 1.0 + self.jitter * draw.random()


class _State:
    """One actor in the simulation."""

    __slots__ = ("actor", "busy", "done", "mail", "outbox", "reserved", "routes", "senders")

    def __init__(self, actor: Actor, graph: Graph) -> None:
        ports = graph.ports(actor.name)
        self.actor, self.mail, self.routes = actor, Mailbox(ports), graph.routes(actor.name)
        self.reserved = dict.fromkeys(ports, 0)  # under way to a port: counted against its capacity
        self.senders: deque[str] = deque()  # actors that wait for room here
        self.outbox: deque[tuple[Edge, Message]] = deque()
        self.busy = self.done = False


class Simulated(Runtime):
    """Runs a graph on a virtual clock.

    Args:
        timing: durations of a chain of blocks (default: forward 1, backward 2, no latency).
        cost, latency: functions to use instead (other wirings).
        fifo: messages of one edge arrive in the order they were sent.
        intra_op: torch intra-op threads during a run; default: leave as it is.
    """

    def __init__(
        self,
        timing: Timing | None = None,
        cost: Cost | None = None,
        latency: Latency | None = None,
        fifo: bool = True,
        intra_op: int | None = None,
    ) -> None:
        self._timing, self._fifo, self._intra_op = timing or Timing(), fifo, intra_op
        self._cost, self._latency = cost, latency

    def run(self, graph: Graph, observers: Sequence[Observer] = ()) -> Timings:
        cost, latency = self._cost or self._timing.cost(), self._latency or self._timing.delay()
        with intra_op_threads(self._intra_op):
            return _Simulation(graph, observers, cost, latency, self._fifo).run()


class _Simulation:
    def __init__(self, graph: Graph, observers: Sequence[Observer], cost: Cost, latency: Latency, fifo: bool) -> None:
        self._states = {actor.name: _State(actor, graph) for actor in graph.actors}
        self._observers, self._cost, self._latency, self._fifo = observers, cost, latency, fifo
        self._events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self._number = 0
        self._now = 0.0
        self._last_arrival: dict[Edge, float] = {}
        self.busy = dict.fromkeys(self._states, 0.0)

    def run(self) -> Timings:
        for name in self._states:
            self._start(name)
        while self._events:
            self._now, _, event, args = heapq.heappop(self._events)
            event(*args)
        unfinished = [s for s in self._states.values() if not s.done]
        if unfinished:
            waits = "; ".join(
                f"{s.actor.name} waits for "
                + (f"room on {s.outbox[0][0]}" if s.outbox else f"{[(w.ports, w.key) for w in s.actor.wants()]}")
                + f" (holds {s.mail.waiting()})"
                for s in unfinished
            )
            raise StallError(f"every actor waits and nothing moves: {waits}")
        wait = {name: self._now - busy for name, busy in self.busy.items()}
        return Timings(self.busy, wait, self._now)

    def _at(self, time: float, event: Callable[..., None], *args: object) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, event, args))

    def _start(self, name: str) -> None:
        """Begin operations of an idle actor until one takes time or nothing is there to begin with."""
        state = self._states[name]
        while not state.busy and not state.outbox and not state.done:
            wants = state.actor.wants()
            if not wants:
                state.done = True
                return
            found = state.mail.take(wants)
            if found is None:
                return
            want, messages = found
            if messages and state.senders:
                self._wake(state)
            outcome = state.actor.handle(want, messages)
            cost = self._cost(name, outcome.operation) if outcome.operation is not None else 0.0
            if outcome.operation is not None and self._observers:
                for observer in self._observers:
                    observer.operation(name, outcome.operation, self._now, self._now + cost)
            self.busy[name] += cost
            routes = state.routes
            state.outbox.extend((edge, message) for out, message in outcome.sends for edge in routes.get(out, ()))
            if cost > 0:
                state.busy = True
                self._at(self._now + cost, self._finish, name)
            else:
                self._send(state)

    def _finish(self, name: str) -> None:
        self._states[name].busy = False
        self._send(self._states[name])
        self._start(name)

    def _send(self, state: _State) -> None:
        """Send what waits in the outbox, as far as there is room."""
        while state.outbox:
            edge, message = state.outbox[0]
            target = self._states[edge.target]
            if target.mail.room(edge.port) - target.reserved[edge.port] < 1:
                target.senders.append(state.actor.name)
                return
            state.outbox.popleft()
            arrival = self._now + self._latency(edge, message)
            if self._fifo:
                arrival = self._last_arrival[edge] = max(arrival, self._last_arrival.get(edge, 0.0))
            target.reserved[edge.port] += 1
            self._at(arrival, self._arrive, edge, message, self._now)

    def _arrive(self, edge: Edge, message: Message, sent: float) -> None:
        state = self._states[edge.target]
        state.reserved[edge.port] -= 1
        state.mail.put(edge.port, message)
        for observer in self._observers:
            observer.delivery(edge, message, sent, self._now)
        self._start(edge.target)

    def _wake(self, state: _State) -> None:
        while state.senders:
            self._at(self._now, self._resume, state.senders.popleft())

    def _resume(self, name: str) -> None:
        state = self._states[name]
        if state.outbox and not state.busy:
            self._send(state)
            self._start(name)
