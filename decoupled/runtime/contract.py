"""What a runtime runs: a graph of actors that tell which message they want next.

    actor.wants()                 -> Want, Want, ...      best first; () means "I have finished this run"
    actor.handle(want, messages)  -> Outcome              one operation: its label, and what to send

A `Want` names ports and a key: it is met when each of its ports holds a message with that key (key None: any key, but
the same on all its ports). A want without ports is met at once. Chains of blocks, graphs with loops and
producer/consumer pairs are all wirings of this contract. Every port has a capacity; a sender waits while it is full,
unless the edge drops: then the oldest message that waits there makes room.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from decoupled.errors import ProtocolError
from decoupled.messages import Message


class Want(NamedTuple):
    """Messages an actor could use next; `tag` is the actor's own note on what for."""

    ports: tuple[str, ...] = ()
    key: Hashable | None = None
    tag: Any = None


class Outcome(NamedTuple):
    """What `handle` did: the label of the operation (None: bookkeeping, takes no time) and (out, message) pairs."""

    operation: str | None = None
    sends: Sequence[tuple[str, Message]] = ()


class Actor(ABC):
    """Anything that turns messages into messages.

    Attributes:
        name: unique in its graph.
        in_caller: must run in the thread that called `run`.
        device: where it computes, so that messages can be brought there; None: takes them as they are.
        beside: name of an actor that it must share a process with; None: it may live anywhere.
    """

    name: str
    in_caller: bool = False
    beside: str | None = None
    device: torch.device | None = None

    @abstractmethod
    def wants(self) -> Sequence[Want]:
        """The messages it would take next, best first; empty when it has finished. Pure."""

    @abstractmethod
    def handle(self, want: Want, messages: tuple[Message, ...]) -> Outcome:
        """Carry out one operation on the messages that met `want` (one per port)."""


@dataclass(frozen=True)
class Edge:
    """A directed channel: what `source` sends on `out` waits at `target` on `port`, `capacity` messages at most.

    `drops`: the sender never waits, as the oldest message leaves a full port. Both ends must share a process
    (`Actor.beside`), so that what is dropped is dropped where it was sent.
    """

    source: str
    out: str
    target: str
    port: str
    capacity: int
    drops: bool = False

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ProtocolError(f"edge {self}: capacity must be at least 1")

    def __str__(self) -> str:
        return f"{self.source}.{self.out}->{self.target}.{self.port}"


@dataclass(frozen=True)
class Graph:
    """Actors and edges. Names are unique; every edge joins two actors of the graph."""

    actors: Sequence[Actor]
    edges: Sequence[Edge]

    def __post_init__(self) -> None:
        names = [actor.name for actor in self.actors]
        if len(set(names)) != len(names):
            raise ProtocolError(f"actor names are not unique: {names}")
        drops: dict[tuple[str, str], bool] = {}
        for edge in self.edges:
            if not {edge.source, edge.target} <= set(names):
                raise ProtocolError(f"edge {edge} joins an actor that is not in the graph ({', '.join(names)})")
            if drops.setdefault((edge.target, edge.port), edge.drops) != edge.drops:
                raise ProtocolError(f"edge {edge} shares its port with one that drops messages where it does not")

    def routes(self, name: str) -> dict[str, list[Edge]]:
        """Edges leaving actor `name`, by out port."""
        routes: dict[str, list[Edge]] = {}
        for edge in self.edges:
            if edge.source == name:
                routes.setdefault(edge.out, []).append(edge)
        return routes

    def ports(self, name: str) -> dict[str, int]:
        """Capacity of each port of actor `name` (edges that share a port add up)."""
        ports: dict[str, int] = {}
        for edge in self.edges:
            if edge.target == name:
                ports[edge.port] = ports.get(edge.port, 0) + edge.capacity
        return ports

    def dropping(self, name: str) -> set[str]:
        """The ports of actor `name` that lose their oldest message when they are full."""
        return {edge.port for edge in self.edges if edge.target == name and edge.drops}


class Mailbox:
    """The waiting messages of one actor, by port. Not locked: a runtime that shares it does the locking."""

    def __init__(self, ports: dict[str, int], dropping: Collection[str] = ()) -> None:
        self._capacity, self._dropping = ports, frozenset(dropping)
        self._queues: dict[str, deque[Message]] = {port: deque() for port in ports}

    def room(self, port: str) -> int:
        """How many more messages `port` takes; one that drops takes any number."""
        return self._capacity[port] - (0 if port in self._dropping else len(self._queues[port]))

    def put(self, port: str, message: Message) -> Message | None:
        """Put a message; returns the oldest one where that had to make room for it."""
        queue = self._queues[port]
        queue.append(message)
        return queue.popleft() if port in self._dropping and len(queue) > self._capacity[port] else None

    def take(self, wants: Iterable[Want]) -> tuple[Want, tuple[Message, ...]] | None:
        """Remove and return the messages that meet the first satisfiable want, or None."""
        for want in wants:
            if not want.ports:
                return want, ()
            queue = self._queues[want.ports[0]]
            if not queue:
                continue
            if len(want.ports) == 1 and (want.key is None or queue[0].key == want.key):
                return want, (queue.popleft(),)
            key = self._common_key(want)
            if key is not None:
                return want, tuple(self._remove(port, key) for port in want.ports)
        return None

    def waiting(self) -> dict[str, list[Hashable]]:
        """Keys that wait, by port (for error messages)."""
        return {port: [m.key for m in queue] for port, queue in self._queues.items() if queue}

    def _common_key(self, want: Want) -> Hashable | None:
        first, *others = (self._queues[port] for port in want.ports)
        for message in first:
            if (want.key is None or message.key == want.key) and all(
                any(m.key == message.key for m in queue) for queue in others
            ):
                return message.key
        return None

    def _remove(self, port: str, key: Hashable) -> Message:
        queue = self._queues[port]
        for i, message in enumerate(queue):
            if message.key == key:
                del queue[i]
                return message
        raise AssertionError(f"no message {key!r} on {port}")


class Observer:
    """Looks on: every method does nothing until overridden. Times are seconds of the runtime's own clock."""

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        """`actor` carried out `operation`."""

    def delivery(self, edge: Edge, message: Message, sent: float, arrived: float) -> None:
        """`message` crossed `edge`; it waits at its port from `arrived` on."""

    def taken(self, actor: str, port: str, message: Message, time: float) -> None:
        """`actor` took `message` from its `port`."""

    def wait(self, actor: str, what: str, start: float, end: float) -> None:
        """`actor` waited for `what`: "messages" or "room"."""


def looking_at(what: str, observers: Iterable[Observer]) -> list[Callable[..., None]]:
    """The methods `what` of those observers that override it."""
    return [getattr(o, what) for o in observers if getattr(type(o), what) is not getattr(Observer, what)]


class Timings(NamedTuple):
    """Seconds of one run per actor name: in operations, and waiting for messages or room; and of the whole run.

    `setup`: seconds of the caller's clock spent on getting ready, not in `elapsed`.
    """

    busy: dict[str, float]
    wait: dict[str, float]
    elapsed: float
    setup: float = 0.0


class Runtime(ABC):
    """Runs graphs. A runtime may be used for many runs; `close` ends its workers.

    A runtime of several processes runs each actor in one of them. All of them make the same calls: each holds its own
    `thing` (a trainer), and rank 0, the leader, has the others follow where they do not run the user's program.

    Attributes:
        rank: of this process.
        startup_seconds: from starting the processes until all had met, imports included, without what a first run then
            builds and sends; None: there are none, or not yet.
        places: actor -> rank of its process, once there are several.
    """

    rank: int = 0
    startup_seconds: float | None = None
    places: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def run(self, graph: Graph, observers: Sequence[Observer] = ()) -> Timings:
        """Run until every actor has finished; the first failure stops all and is raised."""

    def host(self, thing: Any, make: Callable[[Runtime], Any]) -> None:  # noqa: B027 - one process has nobody to tell
        """Let every other process hold its own `thing`: what `make(its runtime)` returns."""

    def call(self, thing: Any, method: str, *args: Any) -> AbstractContextManager[None]:
        """Within: this method of `thing`, which every process goes through (with `args` where it follows the leader).

        What one process leaves it by, those that wait for it get, too.
        """
        return nullcontext()

    def ask(self, thing: Any, method: str, *args: Any) -> list[Any]:
        """What this method returns in every process, by rank."""
        return [getattr(thing, method)(*args)]

    def agree(self, value: Any, of: str | None = None) -> Any:
        """The leader's value (or that of the process that owns actor `of`), in every process."""
        return value

    def place(self, actors: Sequence[str]) -> None:  # noqa: B027
        """Decide where the actors with these names live, before `owns` is asked."""

    def owns(self, actor: str) -> bool:
        """Whether this actor lives in this process."""
        return True

    def give_up(self, thing: Any, error: BaseException) -> None:  # noqa: B027
        """This process makes no more calls of `thing`, as its program has failed between two; the others hear of it."""

    def release(self, thing: Any) -> None:  # noqa: B027
        """Nobody will use `thing` any more."""

    @property
    def mine(self) -> bool:
        """Whether its workers belong to this process, not to one that it is a fork of."""
        return True

    def close(self) -> None:  # noqa: B027 - a runtime without workers has nothing to end
        """End all workers; idempotent."""


@contextmanager
def intra_op_threads(count: int | None) -> Iterator[None]:
    """Let torch operations use `count` threads (None: leave it) and put the number back afterwards."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


Latency = Callable[[Edge, Message], float]
Cost = Callable[[str, str], float]
