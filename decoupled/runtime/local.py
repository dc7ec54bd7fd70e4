"""The part of a run that one process carries out: a thread per actor, a blocking mailbox each; no polling, no barrier.

    actor's thread    take -> handle -> put, until the actor has finished
    put               into the box of an actor of this process, or into the outlet of an edge that leads elsewhere
    arrive            what came in through an inlet goes into the box; `taken` gives the sender its room back

A sender waits while the target port is full; see `decoupled.runtime.box` for who wakes whom. The first failure wakes
everybody. With `patience`, an actor that waits longer checks whether *everybody* waits: then the wiring is wrong and a
StallError says who wants what (a run of several processes is watched by its hub instead).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from decoupled.errors import StallError, Stopped
from decoupled.messages import Message
from decoupled.runtime.box import Box, Found, Sleeper
from decoupled.runtime.contract import Actor, Edge, Graph, Observer, Want
from decoupled.transport import cuda
from decoupled.transport.contract import Closed, Inlet, Outlet


class Pools:
    """One lasting thread per actor name; `intra_op`: torch's threads within it."""

    def __init__(self, intra_op: int | None) -> None:
        self._intra_op = intra_op
        self._pools: dict[str, ThreadPoolExecutor] = {}

    def submit(self, name: str, work: Callable[[Actor], None], actor: Actor) -> Future[None]:
        """Run `work(actor)` in the thread `name`."""
        if name not in self._pools:
            self._pools[name] = ThreadPoolExecutor(1, name)
            if self._intra_op:
                self._pools[name].submit(torch.set_num_threads, self._intra_op).result()
        return self._pools[name].submit(work, actor)

    def close(self) -> None:
        """End the threads; idempotent."""
        for pool in self._pools.values():
            pool.shutdown(wait=True)
        self._pools.clear()


class Status(NamedTuple):
    """One process's part of a run.

    Attributes:
        run: its number. all_wait: whether every actor waits (or has finished).
        waiting: actor -> for what. operations: actor -> its latest operation.
        moves: messages taken and put so far. sent, arrived: messages to and from other processes.
    """

    run: int
    all_wait: bool
    waiting: dict[str, str]
    operations: dict[str, str]
    moves: int
    sent: int
    arrived: int


class LocalRun:
    """One run: the mailboxes, the first failure, and who waits for what.

    Args:
        graph: the whole graph.
        observers: are told of everything that happens in this process.
        patience: seconds a mailbox waits before it looks whether everybody waits; None: never.
        mine: names of the actors of this process; default: all.
        outlets: for every edge from here to another process.
        number: of the run. on_failure: called once, with the first failure of this process.
    """

    def __init__(
        self,
        graph: Graph,
        observers: Sequence[Observer] = (),
        patience: float | None = None,
        mine: Sequence[str] | None = None,
        outlets: Mapping[Edge, Outlet] | None = None,
        number: int = 0,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._actors = [actor for actor in graph.actors if mine is None or actor.name in mine]
        self._sleepers = {actor.name: Sleeper(actor.name) for actor in self._actors}
        self._boxes = {name: Box(s, graph.ports(name), graph.dropping(name)) for name, s in self._sleepers.items()}
        self._routes = {actor.name: graph.routes(actor.name) for actor in self._actors}
        self._devices = {actor.name: actor.device for actor in self._actors}
        self._observers, self._patience, self._outlets = observers, patience, outlets or {}
        self.number, self._on_failure = number, on_failure
        self._over = False
        # Of a waiting message by its target and id (one message can go to several): to call on taking it.
        self._on_take: dict[tuple[str, int], tuple[Callable[[], None], ...]] = {}
        self._lock = threading.Lock()
        self.failure: BaseException | None = None
        self.operations: dict[str, str] = {}  # latest operation of each actor
        self.last: dict[Edge, object] = {}  # key of the latest message of each edge to or from another process
        self._sent = self._arrived = 0
        self.busy = dict.fromkeys(self._boxes, 0.0)
        self.wait = dict.fromkeys(self._boxes, 0.0)

    def run(self, pools: Pools) -> None:
        """Run all actors to their end; the first failure is raised once every thread has left."""
        futures: list[Future[None]] = []
        try:
            futures += [pools.submit(a.name, self._work, a) for a in self._actors if not a.in_caller]
            for actor in self._actors:
                if actor.in_caller:
                    self._work(actor)
            for future in futures:
                future.result()
        except BaseException as interrupt:
            self.fail(interrupt)
            raise
        finally:
            _wait_for(futures)  # every worker has left the run before anyone touches its state
        if self.failure is not None:
            raise self.failure

    def fail(self, error: BaseException) -> None:
        """Record the first failure and wake everybody."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = error
        for box in self._boxes.values():
            with box.lock:
                box.wake_all()
        self._on_failure(error)
        for outlet in self._outlets.values():  # wakes who waits there
            outlet.close()

    def end(self) -> None:
        """The run is over here: what is left in the mailboxes, and what still comes, is thrown away.

        After a failure that makes no room: until they have heard of it the others would go on.
        """
        for box in self._boxes.values():
            with box.lock:
                self._over = True
        for message in list(self._on_take):
            calls = self._on_take.pop(message)
            for call in calls if self.failure is None else ():
                call()

    def arrive(self, edge: Edge, message: Message, sent: float, inlet: Inlet) -> None:
        """`message` came in from another process (which has kept to the edge's capacity)."""
        self.last[edge] = message.key
        box = self._boxes[edge.target]
        message, on_take = cuda.hand_over(message, self._devices[edge.target])
        with box.lock:
            with self._lock:
                self._arrived += 1
            if self._over:
                if self.failure is None:
                    inlet.taken()
                return
            self._on_take[edge.target, id(message)] = tuple(call for call in (on_take, inlet.taken) if call)
            box.put(edge.port, message)
        for observer in self._observers:
            observer.delivery(edge, message, sent, time.perf_counter())

    def status(self) -> Status:
        """What happens here at this moment."""
        waiting, moves = self._waiting(), sum(sleeper.moves for sleeper in self._sleepers.values())
        all_wait = len(waiting) == len(self._sleepers)
        return Status(self.number, all_wait, waiting, dict(self.operations), moves, self._sent, self._arrived)

    def _work(self, actor: Actor) -> None:
        """The loop of one actor."""
        name, clock = actor.name, time.perf_counter
        try:
            with cuda.lane(actor.device):
                while wants := actor.wants():
                    start = clock()
                    want, messages = self._take(name, wants)
                    began = clock()
                    outcome = actor.handle(want, messages)
                    ended = clock()
                    if outcome.operation is not None:
                        self.operations[name] = outcome.operation
                    for out, message in outcome.sends:
                        for edge in self._routes[name].get(out, ()):
                            self._put(edge, message)
                    left = clock()
                    self.busy[name] += ended - began
                    self.wait[name] += (began - start) + (left - ended)
                    for observer in self._observers:
                        self._report(observer, name, want, messages, outcome.operation, (start, began, ended, left))
            self._sleepers[name].what = lambda: "nothing: it has finished"
        except Stopped:
            pass
        except BaseException as error:
            self.fail(error)
            if actor.in_caller:
                raise

    def _report(
        self, observer: Observer, name: str, want: Want, messages: tuple[Message, ...], operation: str | None,
        times: tuple[float, float, float, float],
    ) -> None:  # fmt: skip
        start, began, ended, left = times
        observer.wait(name, "messages", start, began)
        for port, message in zip(want.ports, messages, strict=True):
            observer.taken(name, port, message, began)
        if operation is not None:
            observer.operation(name, operation, began, ended)
        observer.wait(name, "room", ended, left)

    def _take(self, name: str, wants: Sequence[Want]) -> Found:
        box, sleeper = self._boxes[name], self._sleepers[name]
        with box.lock:
            if self.failure is not None:
                raise Stopped
            found = box.take(wants)
        if found is None:
            self._sleep(sleeper)
            found, box.found = box.found, None
            assert found is not None
        sleeper.moves += 1
        if self._on_take:
            for message in found[1]:
                for call in self._on_take.pop((name, id(message)), ()):
                    call()
        return found

    def _put(self, edge: Edge, message: Message) -> None:
        if (outlet := self._outlets.get(edge)) is not None:
            return self._send(outlet, edge, message)
        message, on_take = cuda.hand_over(message, self._devices[edge.target])
        if on_take is not None:
            self._on_take[edge.target, id(message)] = (on_take,)
        box, sleeper, sent = self._boxes[edge.target], self._sleepers[edge.source], time.perf_counter()
        with box.lock:
            if self.failure is not None:
                raise Stopped
            room = box.room(edge.port)
            if room:
                dropped = box.put(edge.port, message)
                self._on_take.pop((edge.target, id(dropped)), None)  # nobody will take it
            else:
                box.leave(edge.port, message, sleeper, lambda: f"room on {edge}")
        if not room:
            self._sleep(sleeper)
        sleeper.moves += 1
        for observer in self._observers:
            observer.delivery(edge, message, sent, time.perf_counter())

    def _send(self, outlet: Outlet, edge: Edge, message: Message) -> None:
        """Send to another process; the receiver tells observers."""
        sleeper = self._sleepers[edge.source]
        try:
            if not outlet.ready(0):
                sleeper.what = lambda: f"room on {edge}"
                while not outlet.ready():  # woken by `fail` too
                    if self.failure is not None:
                        raise Stopped
                sleeper.what = None
            outlet.send(message)
        except Closed:
            raise Stopped from None
        with self._lock:
            self._sent += 1
        sleeper.moves += 1
        self.last[edge] = message.key

    def _sleep(self, sleeper: Sleeper) -> None:
        while not sleeper.sleep(self._patience):
            waiting = self._waiting()
            if len(waiting) == len(self._sleepers):
                waits = "; ".join(f"{who} waits for {it}" for who, it in sorted(waiting.items()))
                raise StallError(f"every actor waits and nothing moves: {waits}")
        if self.failure is not None:
            raise Stopped

    def _waiting(self) -> dict[str, str]:
        """Who waits (or has finished), and for what."""
        whats = {name: sleeper.what for name, sleeper in self._sleepers.items()}
        return {name: what() for name, what in whats.items() if what is not None}


def _wait_for(futures: Sequence[Future[None]]) -> None:
    """Wait for all, however often Ctrl-C is pressed: a worker stops after its present operation."""
    while True:
        try:
            wait(futures)
            return
        except KeyboardInterrupt:
            continue
