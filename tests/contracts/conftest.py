"""The runtimes that the contract tests run against, and the fakes they are run with.

A new runtime joins the contract with one line in `RUNTIMES`.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from decoupled.messages import Message
from decoupled.runtime.contract import Actor, Edge, Graph, Outcome, Runtime, Want
from decoupled.runtime.launch import Group
from decoupled.runtime.processes import Processes
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.threads import Threads


def _uneven():
    """A simulator on which operations and messages take ever changing times."""
    seconds = itertools.cycle([3.0, 0.0, 1.0, 7.0, 0.5])
    return Simulated(cost=lambda actor, operation: next(seconds), latency=lambda edge, message: next(seconds))


class _Rank(Group):
    """A rank that is a thread of this process."""

    def __init__(self, rank, world, store):
        super().__init__(rank, world, starts=False, follows=False)
        self.store = store

    def _meet(self, wait):
        pass


class Ranks(Runtime):
    """The runtime of several processes with every part of it - hub, lines, channels - but its ranks are threads.

    So the fakes need not be sent anywhere, and what an actor raises is the very object.
    """

    def __init__(self, world, **options):
        store = HashStore()
        self._ranks = [Processes(group=_Rank(rank, world, store), **options) for rank in range(world)]

    def run(self, graph, observers=()):
        errors = {}

        def part(rank) -> Any:
            try:
                return self._ranks[rank].run(graph, observers if rank == 0 else ())
            except BaseException as error:
                errors[rank] = error

        with ThreadPoolExecutor(len(self._ranks)) as pool:
            parts = [pool.submit(part, rank) for rank in range(1, len(self._ranks))]
            timings = part(0)
            for one in parts:
                one.result()
        if errors:
            assert sorted(errors) == list(range(len(self._ranks))), "a failure did not reach every rank"
            raise min(errors.values(), key=lambda error: len(getattr(error, "__notes__", ())))
        return timings

    def close(self):
        threads = [threading.Thread(target=rank.close) for rank in self._ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


RUNTIMES = {
    "simulated": Simulated,
    "simulated, uneven": _uneven,
    "threads": lambda: Threads(patience=0.1),
    "threads, intra_op": lambda: Threads(intra_op=1, patience=0.1),
    "processes, 2 ranks": lambda: Ranks(2, patience=0.4),
    "processes, 3 ranks": lambda: Ranks(3, patience=0.4),
}


@pytest.fixture(params=RUNTIMES.values(), ids=list(RUNTIMES))
def runtime(request):
    made = request.param()
    yield made
    made.close()


class Fake(Actor):
    """An actor that does what a generator says.

    The generator yields a Want (or a list of them, best first) and is sent the messages that met it; then it yields
    ``(out, key)`` for everything it sends in this operation, until its next Want; it returns when it has finished.
    What it appends to the list it is called with is `seen`.
    """

    def __init__(self, name, script, in_caller=False, beside=None):
        self.name, self.in_caller, self.beside, self.seen = name, in_caller, beside, []
        self._script = script(self.seen)
        self._next = next(self._script, None)

    def wants(self):
        if self._next is None:
            return ()
        return self._next if isinstance(self._next, list) else [self._next]

    def handle(self, want, messages):
        sends = []
        self._next = next_step = self._resume(messages)
        while next_step is not None and not isinstance(next_step, Want | list):
            sends.append((next_step[0], Message(next_step[1])))
            self._next = next_step = next(self._script, None)
        return Outcome("X", sends)

    def _resume(self, messages):
        try:
            return self._script.send(messages)
        except StopIteration:
            return None


class Fakes:
    """What the tests are written in."""

    now = Want()  # met at once
    actor = Fake

    @staticmethod
    def want(*ports, key=None):
        return Want(ports, key)

    @staticmethod
    def graph(actors, *edges):
        """Edges are (source, out, target, port, capacity) and whether they drop."""
        return Graph(actors, [Edge(*edge) for edge in edges])

    @staticmethod
    def sender(name, keys, out="out", **options):
        """Sends one key per operation; has `seen` those sent."""

        def script(seen):
            for key in keys:
                yield Want()
                seen.append(key)
                yield out, key

        return Fake(name, script, **options)

    @staticmethod
    def receiver(name, count, port="in", **options):
        """Takes `count` messages; has `seen` their keys."""

        def script(seen):
            for _ in range(count):
                (message,) = yield Want((port,))
                seen.append(message.key)

        return Fake(name, script, **options)


@pytest.fixture
def fakes():
    return Fakes
