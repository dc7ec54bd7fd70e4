"""Threads: one thread per actor, one blocking mailbox each; no polling, no barrier, no global lock.

    caller        runs the actors marked `in_caller` (the source: it iterates the user's data) and re-raises failures
    thread k      take -> handle -> put, until its actor has finished

Threads start at the first run, live until `close`, and keep their intra-op thread count (cores / blocks). A sender
waits while the target port is full. The first failure closes all mailboxes, which wakes everybody. A mailbox that waits
longer than `patience` checks whether *everybody* waits: then the wiring is wrong and a StallError says who wants what.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from decoupled.errors import StallError, Stopped
from decoupled.messages import Message
from decoupled.runtime import memory
from decoupled.runtime.contract import Actor, Edge, Graph, Mailbox, Observer, Runtime, Timings, Want, intra_op_threads


class Threads(Runtime):
    """Runs each actor in its own thread.

    Args:
        intra_op: torch intra-op threads per worker; default: leave as it is.
        patience: seconds a mailbox waits before it looks whether the whole run has stalled.
        keep_memory: let the process keep the memory it frees (until `close`), see `decoupled.runtime.memory`.
    """

    def __init__(self, intra_op: int | None = None, patience: float = 20.0, keep_memory: bool = True) -> None:
        self._intra_op, self._patience, self._keep_memory = intra_op, patience, keep_memory
        self._pools: dict[str, ThreadPoolExecutor] = {}

    def run(self, graph: Graph, observers: Sequence[Observer] = ()) -> Timings:
        if self._keep_memory:
            memory.keep()
        run = _Run(graph, observers, self._patience)
        with intra_op_threads(self._intra_op):
            return self._run(run, graph)

    def _run(self, run: _Run, graph: Graph) -> Timings:
        futures: list[Future[None]] = []
        start = time.perf_counter()
        try:
            for actor in graph.actors:
                if not actor.in_caller:
                    futures.append(self._pool(actor.name).submit(run.work, actor))
            for actor in graph.actors:
                if actor.in_caller:
                    run.work(actor)
            for future in futures:
                future.result()
        except BaseException as interrupt:
            run.fail(interrupt)
            raise
        finally:
            _wait_for(futures)  # every worker has left the run before anyone touches its state
        if run.failure is not None:
            raise run.failure
        return Timings(run.busy, run.wait, time.perf_counter() - start)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=True)
        self._pools.clear()
        if self._keep_memory:
            memory.release()

    def _pool(self, name: str) -> ThreadPoolExecutor:
        if name not in self._pools:
            self._pools[name] = ThreadPoolExecutor(1, name)
            if self._intra_op:
                self._pools[name].submit(torch.set_num_threads, self._intra_op).result()
        return self._pools[name]


def _wait_for(futures: Sequence[Future[None]]) -> None:
    """Wait for all, however often Ctrl-C is pressed: a worker stops after its present operation."""
    while True:
        try:
            wait(futures)
            return
        except KeyboardInterrupt:
            continue


class _Box:
    """A mailbox with its lock."""

    def __init__(self, ports: dict[str, int]) -> None:
        self.mail, self.changed = Mailbox(ports), threading.Condition(threading.Lock())


class _Run:
    """One run: the mailboxes, the first failure, and who waits for what."""

    def __init__(self, graph: Graph, observers: Sequence[Observer], patience: float) -> None:
        self._boxes = {actor.name: _Box(graph.ports(actor.name)) for actor in graph.actors}
        self._routes = {actor.name: graph.routes(actor.name) for actor in graph.actors}
        self._observers, self._patience = observers, patience
        self._waiting: dict[str, str] = {}
        self._moves = dict.fromkeys(self._boxes, 0)  # messages taken and put so far, by actor
        self._lock = threading.Lock()
        self.failure: BaseException | None = None
        self.busy = dict.fromkeys(self._boxes, 0.0)
        self.wait = dict.fromkeys(self._boxes, 0.0)

    def work(self, actor: Actor) -> None:
        """The loop of one actor."""
        name, clock = actor.name, time.perf_counter
        try:
            while wants := actor.wants():
                start = clock()
                want, messages = self._take(name, wants)
                began = clock()
                outcome = actor.handle(want, messages)
                ended = clock()
                for out, message in outcome.sends:
                    for edge in self._routes[name].get(out, ()):
                        self._put(edge, message)
                left = clock()
                self.busy[name] += ended - began
                self.wait[name] += (began - start) + (left - ended)
                for observer in self._observers:
                    self._report(observer, name, want, messages, outcome.operation, (start, began, ended, left))
            self._waiting[name] = "nothing: it has finished"
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

    def fail(self, error: BaseException) -> None:
        """Record the first failure and wake everybody."""
        with self._lock:
            if self.failure is None:
                self.failure = error
        for box in self._boxes.values():
            with box.changed:
                box.changed.notify_all()

    def _take(self, name: str, wants: Sequence[Want]) -> tuple[Want, tuple[Message, ...]]:
        box = self._boxes[name]
        with box.changed:
            while True:
                if self.failure is not None:
                    raise Stopped
                found = box.mail.take(wants)
                if found is not None:
                    if found[1]:
                        box.changed.notify_all()
                    self._waiting.pop(name, None)
                    self._moves[name] += 1
                    return found
                self._wait(box, name, f"{[(w.ports, w.key) for w in wants]}; waiting there: {box.mail.waiting()}")

    def _put(self, edge: Edge, message: Message) -> None:
        box, sent = self._boxes[edge.target], time.perf_counter()
        with box.changed:
            while box.mail.room(edge.port) < 1:
                if self.failure is not None:
                    raise Stopped
                self._wait(box, edge.source, f"room on {edge}")
            self._waiting.pop(edge.source, None)
            self._moves[edge.source] += 1
            box.mail.put(edge.port, message)
            box.changed.notify_all()
        for observer in self._observers:
            observer.delivery(edge, message, sent, time.perf_counter())

    def _wait(self, box: _Box, name: str, what: str) -> None:
        self._waiting[name] = what
        for _ in range(2):  # twice: after the whole process was paused, the first wait may end before anyone could move
            before = list(self._moves.values())
            moved = box.changed.wait(self._patience) or before != list(self._moves.values())
            if moved or len(self._waiting) < len(self._boxes):
                return
        waits = "; ".join(f"{who} waits for {it}" for who, it in sorted(self._waiting.items()))
        raise StallError(f"every actor waits and nothing moves: {waits}")
