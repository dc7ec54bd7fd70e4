"""Processes: the actors of a graph spread over processes, on one host or several.

    rank 0       the caller's process: actors marked `in_caller`, the first group of the others, and the hub
    rank r       the r-th group; started by rank 0 (runtime="processes"), or by torchrun on any host
    an edge      within a process: a mailbox; between two: a channel of `decoupled.transport`, chosen by where they are

Every rank builds the same graph and runs its own actors (`decoupled.runtime.local`). A run is: open the edges that are
new, agree that all are ready, mark the beginning on every edge, run, agree on the outcome. What fails anywhere fails
everywhere (`decoupled.runtime.control`); then all channels are closed, and the next run opens new ones.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import cloudpickle

from decoupled.errors import PeerLost, ProtocolError, UserError, first_line
from decoupled.runtime import memory
from decoupled.runtime.channels import Channels
from decoupled.runtime.contract import Graph, Observer, Runtime, Timings, intra_op_threads
from decoupled.runtime.control import Beats, Control, Member, pack, unpack
from decoupled.runtime.events import Events
from decoupled.runtime.hub import Hub
from decoupled.runtime.launch import Group
from decoupled.runtime.local import LocalRun, Pools
from decoupled.runtime.places import Places
from decoupled.transport.contract import Closed
from decoupled.transport.endpoint import Endpoint


class Processes(Runtime):
    """Runs graphs on several processes.

    Args:
        group: which process this is, and how the others come to be; default: found out.
        processes: how many, the caller's included. Under torchrun it is the world size, and must not be given.
        intra_op: torch intra-op threads per worker; default: leave as it is.
        heartbeat: seconds of silence after which a process is given up.
        patience: seconds in which nothing moves anywhere until the run counts as stalled.
        startup: seconds the processes and the edges have to come up.

    Attributes:
        startup_seconds: from starting the processes until all had met, once they have; see `Runtime`.

    Raises:
        UserError: a number of processes that cannot be.
    """

    def __init__(
        self,
        group: Group | None = None,
        *,
        processes: int | None = None,
        intra_op: int | None = None,
        heartbeat: float = 10.0,
        patience: float = 20.0,
        startup: float = 120.0,
    ) -> None:
        for name, seconds in (("heartbeat", heartbeat), ("patience", patience), ("startup", startup)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
                raise UserError(f"runtime processes: {name} must be a positive number of seconds, got {seconds!r}")
        self._group = group or Group.find(processes)
        self.rank, self.world = self._group.rank, self._group.world
        self._intra_op, self._beats, self._startup = intra_op, Beats(heartbeat, patience), startup
        self._control: Control | None = None
        self._pid = os.getpid()
        self._pools = Pools(intra_op)
        self._run: LocalRun | None = None
        self._number = 0
        self.places = self._places = Places(self.world)
        self._things: dict[int, Any] = {}
        self._things_made = self._calls = 0
        self._group.options = {
            "intra_op": intra_op, "heartbeat": heartbeat, "patience": patience, "startup": startup,
        }  # fmt: skip

    # --- one run -------------------------------------------------------------------------------------------------

    def run(self, graph: Graph, observers: Sequence[Observer] = ()) -> Timings:
        control = self.start()
        try:
            return self._whole_run(control, graph, observers)
        except BaseException as error:
            self._channels.close()
            if self._run is not None:  # interrupted on the way to an outcome
                control.abort(self._number, error)
                self._run = None
            raise

    def _whole_run(self, control: Control, graph: Graph, observers: Sequence[Observer]) -> Timings:
        memory.keep()
        began = time.perf_counter()
        self._places.add([actor.name for actor in graph.actors if not actor.in_caller and actor.beside is None])
        self._places.update({actor.name: self._places[actor.beside] for actor in graph.actors if actor.beside})
        self._places.update({actor.name: 0 for actor in graph.actors if actor.in_caller})
        self._places.edges = graph.edges
        watched = control.exchange("run", (tuple(map(str, graph.edges)), bool(observers), self._number + 1))
        if len({edges for edges, *_ in watched}) > 1:
            raise ProtocolError("the processes run different graphs; every rank must build the same model and method")
        self._number = number = watched[0][2]
        events = Events(control.offset) if self.rank and watched[0][1] else None
        problem = self._channels.open(graph.edges, number, {a.name: a.device for a in graph.actors})
        mine = [actor.name for actor in graph.actors if self.owns(actor.name)]
        run = LocalRun(
            graph, [events] if events else observers, None, mine,
            self._channels.outlets(graph.edges), number,
            lambda error: threading.Thread(target=control.abort, args=(number, error), daemon=True).start(),
        )  # fmt: skip
        self._run = self._channels.run = run
        self._settle(control.exchange("open", problem and pack(problem)))
        start = time.perf_counter()
        failure: BaseException | None = None
        try:
            if control.lost is not None:
                raise control.lost
            self._channels.begin(graph.edges, run.number)
            with intra_op_threads(self._intra_op):
                run.run(self._pools)
        except Closed as error:
            failure = run.failure or error  # that is why it was closed
        except BaseException as error:
            failure = error
        seconds = time.perf_counter() - start
        run.end()
        if failure is not None:
            self._channels.close()
        if failure is not None and control.lost is not None:
            raise control.lost
        outcome = (failure and pack(failure), run.busy, run.wait, seconds, events and events.taken_calls())
        outcomes = control.exchange("done", outcome)
        self._run = None  # nothing moves between runs, and that is no stall
        self._settle([packed for packed, *_ in outcomes], failure)
        busy, wait = ({k: v for one in outcomes for k, v in one[i].items()} for i in (1, 2))
        for _, _, _, _, recorded in outcomes:
            Events.replay(recorded or (), observers)
        elapsed = max(seconds for *_, seconds, _ in outcomes)
        return Timings(busy, wait, elapsed, start - began)

    def _settle(self, failures: Sequence[Any], mine: BaseException | None = None) -> None:
        """Raise the first failure of any rank; all ranks raise the same."""
        first = next((rank for rank, packed in enumerate(failures) if packed is not None), None)
        if first is None:
            return
        self._channels.close()
        raise mine if mine is not None else unpack(failures[first], first)

    def place(self, actors: Sequence[str]) -> None:
        self._places.add(actors)

    def owns(self, actor: str) -> bool:
        return self._places[actor] == self.rank

    def _obituary(self, rank: int, reason: str) -> str:
        last = self._run.last if self._run is not None else None
        heard = self._control.heard_of(rank) if isinstance(self._control, Hub) else None
        return self._places.obituary(rank, reason, heard, last)

    # --- the processes -------------------------------------------------------------------------------------------

    def start(self) -> Control:
        """Bring the processes up, once; see `startup_seconds`.

        Raises:
            PeerLost: a process did not come, or there is none any more.
        """
        if not self.mine:
            raise PeerLost("this process is a fork of the one that the others belong to; make a trainer of its own")
        if self._control is not None:
            if self._control.lost is not None:
                raise self._control.lost
            return self._control
        began = time.perf_counter()
        control = endpoint = None
        try:
            control, token = self._group.connect(self._beats, self._startup, self._obituary, self._serve)
            control.on_abort, control.on_lost, control.status = self._aborted, self._lost, self._status
            endpoint = Endpoint(token, self._group.host)
            all_ranks = control.exchange("start", (endpoint.address, control.offset, self._group.me()), self._startup)
        except BaseException:
            for opened in filter(None, (endpoint, control)):
                opened.close()
            self._group.end(0.0)
            raise
        addresses, offsets, self._places.who = (list(column) for column in zip(*all_ranks, strict=True))
        self._channels = Channels(self.rank, self._places, endpoint, addresses, offsets, self._startup)
        self._channels.lost = control.wait_lost
        self._control = control
        atexit.register(self.close)
        self.startup_seconds = time.perf_counter() - began if self.world > 1 else None
        return control

    def _aborted(self, number: int, error: BaseException) -> None:
        run = self._run
        if run is not None and run.number == number:
            run.fail(error)

    def _lost(self, error: BaseException) -> None:
        run = self._run
        if run is not None:
            run.fail(error)

    def _status(self) -> Any:
        run = self._run
        return run.status() if run is not None else None

    # --- things that every rank holds ----------------------------------------------------------------------------

    def host(self, thing: Any, make: Callable[[Runtime], Any]) -> None:
        if self._group.follows:
            return
        payload = b""
        if self._group.starts and self.world > 1:
            try:
                payload = cloudpickle.dumps(make)
            except Exception as error:
                raise UserError(
                    f"the model, loss, optimizer or method cannot be sent to another process ({error}); leave out "
                    "what cannot be pickled, such as open files, locks and generators"
                ) from error
            self.start()
        self._things_made += 1
        self._things[self._things_made] = thing
        if payload:
            self._tell("host", self._things_made, payload)

    @contextmanager
    def call(self, thing: Any, method: str, *args: Any) -> Iterator[None]:
        if self.world == 1:
            yield
            return
        control = self.start()
        if not self._group.follows:  # those that follow have got the number with the order
            self._calls += 1
        control.begin(self._calls, method)
        try:
            if self.rank == 0 and self._group.starts:
                self._tell("call", self._name(thing), self._calls, method, args)
            yield
        except BaseException as error:
            control.leave(error)
            self._channels.close()
            raise

    def ask(self, thing: Any, method: str, *args: Any) -> list[Any]:
        if self.rank:
            raise UserError("only rank 0 has the whole model, its state and statistics; ask there")
        others: list[Any] = []
        if self.world > 1:
            if self._control is not None and self._control.lost is not None:
                raise PeerLost("the other processes have ended") from self._control.lost
            control = self.start()
            assert isinstance(control, Hub)
            others = [control.ask(rank, "ask", self._name(thing), method, args) for rank in range(1, self.world)]
        return [getattr(thing, method)(*args), *others]

    def agree(self, value: Any, of: str | None = None) -> Any:
        if self.world == 1:
            return value
        owner = 0 if of is None else self._places[of]
        return self.start().exchange("agree", value if self.rank == owner else None)[owner]

    def give_up(self, thing: Any, error: BaseException) -> None:
        alone = self._group.follows or self._group.starts or self._control is None or self._control.lost is not None
        if not alone and self.mine:
            with suppress(BaseException), self.call(thing, "give_up"):
                raise error

    def release(self, thing: Any) -> None:
        if self._group.follows or self._control is None or all(known is not thing for known in self._things.values()):
            return
        name = self._name(thing)
        if self._control.lost is None and self._group.starts and self.world > 1:
            self._tell("drop", name)
        elif self._control.lost is None:  # the leader may still ask until it comes here itself
            with suppress(Exception), self.call(thing, "release"):  # what others leave by is no failure of this rank
                self.agree(None)
        self._drop(name)

    def _drop(self, name: int) -> None:
        self._things.pop(name, None)
        self._channels.close()
        if not self._things:
            self._places.clear()

    def serve(self) -> None:
        """Follow the leader until it says goodbye: the life of a process that rank 0 has started."""
        control = self.start()
        assert isinstance(control, Member)
        while (order := control.orders.get()) is not None:
            kind, name, *rest = order
            if kind == "host":
                try:
                    self._things[name] = _received(rest[0])(self)
                except Exception as error:
                    self._things[name] = error  # to be raised when it is called
            elif kind == "drop":
                self._drop(name)
            else:
                self._calls, method, args = rest
                self._follow(control, self._things[name], method, args)

    def _follow(self, control: Member, thing: Any, method: str, args: Sequence[Any]) -> None:
        control.begin(self._calls, method)
        if isinstance(thing, Exception):
            control.leave(thing)
            return
        with suppress(BaseException):  # the leader has been told, by `call`, and its own interrupt is no end of ours
            getattr(thing, method)(*args)

    @property
    def mine(self) -> bool:
        return os.getpid() == self._pid

    def close(self) -> None:
        control, self._control = self._control, None
        if control is None or not self.mine:
            return
        atexit.unregister(self.close)
        control.close()
        self._channels.close()
        self._channels.endpoint.close()
        self._pools.close()
        self._group.end(5.0 if control.lost is None else 0.5)
        memory.release()

    def _serve(self, what: str, name: int, method: str, args: Sequence[Any]) -> Any:
        assert what == "ask"
        return getattr(self._things[name], method)(*args)

    def _tell(self, *words: Any) -> None:
        assert isinstance(self._control, Hub)
        self._control.tell(*words)

    def _name(self, thing: Any) -> int:
        return next(name for name, known in self._things.items() if known is thing)


def _received(payload: bytes) -> Callable[[Runtime], Any]:
    """What `host` has sent.

    Raises:
        UserError: it cannot be unpickled here.
    """
    try:
        return cloudpickle.loads(payload)
    except Exception as error:
        raise UserError(
            "the model, loss, optimizer or method was sent to another process and cannot be unpickled there "
            f"({type(error).__name__}: {first_line(error)}); leave out what pickle cannot remake, such as exceptions "
            "whose __init__ takes other arguments than their args"
        ) from error
