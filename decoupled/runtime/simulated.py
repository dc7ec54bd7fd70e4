"""Simulated: one thread, a virtual clock, and any speeds and delays one wants to study.

Each operation is really carried out, at the virtual time its messages arrive, and takes the virtual time that `cost`
says; a message arrives `latency` later, never overtaking an earlier one on its edge unless `fifo=False`. Events at
equal times are handled in the order they were made, so a run is a pure function of the graph, the costs and the seed.

    start of an operation -> (cost) -> its end: messages leave -> (latency) -> arrival -> the target starts if it wants
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Sequence

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
    Want,
    intra_op_threads,
    looking_at,
)
from decoupled.runtime.timing import Timing


class _Link:
    """One edge in the simulation."""

    __slots__ = ("edge", "last", "line", "reserved", "target")

    def __init__(self, edge: Edge, target: _State, reserved: list[int], line: list[float]) -> None:
        self.edge, self.target = edge, target
        self.line = line  # [when it is free]: shared by the edges from one actor to another
        self.last = 0.0  # latest arrival so far
        self.reserved = reserved  # [messages under way to the port]: counted against its capacity, shared by its edges


class _State:
    """One actor in the simulation."""

    __slots__ = ("actor", "busy", "done", "left", "mail", "name", "outbox", "routes", "seconds", "senders", "wants")

    def __init__(self, actor: Actor, ports: dict[str, int], dropping: Collection[str]) -> None:
        self.actor, self.name, self.mail = actor, actor.name, Mailbox(ports, dropping)
        self.routes: dict[str, list[_Link]] = {}
        self.senders: deque[_State] = deque()  # actors that wait for room here
        self.outbox: deque[tuple[_Link, Message]] = deque()
        self.wants: Sequence[Want] | None = None  # what it waits for; nothing but `handle` changes it
        self.seconds = 0.0  # in operations
        self.left = 0.0  # when its latest operation, or the wait for room after it, was over
        self.busy = self.done = False


class Simulated(Runtime):
    """Runs a graph on a virtual clock.

    Args:
        timing: durations of a chain of blocks (default: forward 1, backward 2, no latency).
        cost, latency, bandwidth: to use instead (other wirings).
        fifo: messages of one edge arrive in the order they were sent.
        intra_op: torch intra-op threads during a run; default: leave as it is.
    """

    def __init__(
        self,
        timing: Timing | None = None,
        *,
        cost: Cost | None = None,
        latency: Latency | None = None,
        fifo: bool = True,
        intra_op: int | None = None,
        bandwidth: float = 0.0,
    ) -> None:
        self._bandwidth = bandwidth or (timing or Timing()).bandwidth
        self._timing, self._fifo, self._intra_op = timing or Timing(), fifo, intra_op
        self._cost, self._latency = cost, latency

    def run(self, graph: Graph, observers: Sequence[Observer] = ()) -> Timings:
        cost, latency = self._cost or self._timing.cost(), self._latency or self._timing.delay()
        with intra_op_threads(self._intra_op):
            return _Simulation(graph, observers, cost, latency, self._fifo, self._bandwidth).run()


class _Simulation:
    def __init__(
        self, graph: Graph, observers: Sequence[Observer], cost: Cost, latency: Latency, fifo: bool, bandwidth: float
    ) -> None:
        ports: dict[str, dict[str, int]] = {actor.name: {} for actor in graph.actors}
        dropping: dict[str, set[str]] = {actor.name: set() for actor in graph.actors}
        for edge in graph.edges:
            dropping[edge.target] |= {edge.port} if edge.drops else set()
            ports[edge.target][edge.port] = ports[edge.target].get(edge.port, 0) + edge.capacity
        self._states = {a.name: _State(a, ports[a.name], dropping[a.name]) for a in graph.actors}
        reserved: dict[tuple[str, str], list[int]] = {}
        lines: dict[tuple[str, str], list[float]] = {}
        self._bandwidth = bandwidth
        for edge in graph.edges:
            room, line = reserved.setdefault((edge.target, edge.port), [0]), (edge.source, edge.target)
            link = _Link(edge, self._states[edge.target], room, lines.setdefault(line, [0.0]))
            self._states[edge.source].routes.setdefault(edge.out, []).append(link)
        self._cost, self._latency, self._fifo = cost, latency, fifo
        self._operations, self._deliveries, self._takes, self._waits = (
            looking_at(what, observers) for what in ("operation", "delivery", "taken", "wait")
        )
        self._later: list[tuple[float, int, Callable[..., None], tuple]] = []
        self._soon: deque[tuple[Callable[..., None], tuple]] = deque()  # events at the present time
        self._number = 0
        self._now = 0.0

    def run(self) -> Timings:
        for state in self._states.values():
            self._start(state)
        later, soon = self._later, self._soon
        while later or soon:
            # Events made earlier for the present time come before those made at the present time.
            if soon and not (later and later[0][0] <= self._now):
                event, args = soon.popleft()
            else:
                self._now, _, event, args = heapq.heappop(later)
            event(*args)
        unfinished = [s for s in self._states.values() if not s.done]
        if unfinished:
            waits = "; ".join(
                f"{s.name} waits for "
                + (f"room on {s.outbox[0][0].edge}" if s.outbox else f"{[(w.ports, w.key) for w in s.actor.wants()]}")
                + f" (holds {s.mail.waiting()})"
                for s in unfinished
            )
            raise StallError(f"every actor waits and nothing moves: {waits}")
        busy = {name: state.seconds for name, state in self._states.items()}
        return Timings(busy, {name: self._now - seconds for name, seconds in busy.items()}, self._now)

    def _at(self, time: float, event: Callable[..., None], *args: object) -> None:
        if time <= self._now:
            self._soon.append((event, args))
            return
        self._number += 1
        heapq.heappush(self._later, (time, self._number, event, args))

    def _start(self, state: _State) -> None:
        """Begin operations of an idle actor until one takes time or nothing is there to begin with."""
        while not (state.busy or state.outbox or state.done):
            wants = state.wants
            if wants is None:
                wants = state.wants = state.actor.wants()
            if not wants:
                state.done = True
                return
            found = state.mail.take(wants)
            if found is None:
                return
            want, messages = found
            if messages and state.senders:
                self._wake(state)
            for seen in self._waits:
                seen(state.name, "messages", state.left, self._now)
            for seen in self._takes:
                for port, message in zip(want.ports, messages, strict=True):
                    seen(state.name, port, message, self._now)
            state.wants = None
            operation, sends = state.actor.handle(want, messages)
            cost = 0.0
            if operation is not None:
                cost = self._cost(state.name, operation)
                for seen in self._operations:
                    seen(state.name, operation, self._now, self._now + cost)
            state.left = self._now + cost
            for out, message in sends:
                for link in state.routes.get(out, ()):
                    state.outbox.append((link, message))
            if cost > 0:
                state.seconds += cost
                state.busy = True
                self._at(self._now + cost, self._finish, state)
            elif state.outbox:
                self._send(state)

    def _finish(self, state: _State) -> None:
        state.busy = False
        if state.outbox:
            self._send(state)
        self._start(state)

    def _send(self, state: _State) -> None:
        """Send what waits in the outbox, as far as there is room."""
        while state.outbox:
            link, message = state.outbox[0]
            if link.target.mail.room(link.edge.port) - link.reserved[0] < 1:
                link.target.senders.append(state)
                return
            state.outbox.popleft()
            arrival = self._sent(link, message) + self._latency(link.edge, message)
            if self._fifo:
                arrival = link.last = max(arrival, link.last)
            link.reserved[0] += not link.edge.drops
            self._at(arrival, self._arrive, link, message, self._now)
        for seen in self._waits:
            seen(state.name, "room", state.left, self._now)
        state.left = self._now

    def _sent(self, link: _Link, message: Message) -> float:
        if not (self._bandwidth and link.edge.source.startswith("block")):
            return self._now
        link.line[0] = max(self._now, link.line[0]) + getattr(message, "nbytes", 0) / self._bandwidth
        return link.line[0]

    def _arrive(self, link: _Link, message: Message, sent: float) -> None:
        link.reserved[0] -= not link.edge.drops
        link.target.mail.put(link.edge.port, message)
        for seen in self._deliveries:
            seen(link.edge, message, sent, self._now)
        self._start(link.target)

    def _wake(self, state: _State) -> None:
        while state.senders:
            self._at(self._now, self._resume, state.senders.popleft())

    def _resume(self, state: _State) -> None:
        if state.outbox and not state.busy:
            self._send(state)
            self._start(state)
