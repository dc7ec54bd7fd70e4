"""An endpoint: the one place of a process where edges to and from other processes are opened.

    source process                                      target process
    endpoint.connect(edge, address) -> Outlet   ---->   endpoint.accept(edge) -> Inlet

    same host    a Unix socket for headers and small tensors
    other host   TCP for headers and small tensors; messages leave from a thread
    large ones   see ways.py: shared memory, the same TCP stream, NCCL between GPUs

The thread of the listeners hands every caller to a thread of its own that hears it out (handshake.py); the end it opens
for those that prove the token waits for `accept`. So `connect` never waits for the other process to call `accept`, and
the order in which processes open their edges does not matter - except that a source on a GPU has to know where the
target is: it waits for `expect` (or `accept`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import torch

from decoupled.errors import ProtocolError, UserError
from decoupled.runtime.contract import Edge
from decoupled.transport import cuda, place, ways
from decoupled.transport.contract import Closed, Inlet, NeverOpened, Outlet
from decoupled.transport.ends import LinkInlet, LinkOutlet
from decoupled.transport.handshake import Conversation, Wish, ask, hear_out
from decoupled.transport.link import Link
from decoupled.transport.place import Address
from decoupled.transport.queued import LINGER

_RING = 1 << 23
_HEARING = 5.0  # seconds a caller has to prove the token
_CALLERS = 256  # that may be heard at once
_End = TypeVar("_End", LinkOutlet, LinkInlet)


class Endpoint:
    """Opens edges; one per process is enough.

    Args:
        token: a secret that all processes of a run share.
        hostname, interface: the name, address or network interface under which other hosts reach this one.
        ring_bytes: shared memory per edge; larger messages stream through it.

    Raises:
        UserError: no token, or an interface or name that this host does not have.
    """

    def __init__(
        self,
        token: bytes,
        hostname: str | None = None,
        interface: str | None = None,
        ring_bytes: int = _RING,
    ) -> None:
        if not token:
            raise UserError("an endpoint needs a token that is not empty; secrets.token_bytes(32) makes one")
        self._token, self._ring_bytes = token, ring_bytes
        hostname = place.reachable(hostname, interface)
        self._unix, local = place.listen_locally()
        self._tcp = socket.create_server((hostname, 0))
        self.address = Address(place.host(), local, hostname, self._tcp.getsockname()[1])
        self._changed = threading.Condition()
        self._opened: dict[tuple[str, int], LinkInlet] = {}  # that nobody has accepted yet
        self._devices: dict[tuple[str, int], torch.device | None] = {}  # of the targets of edges that will come
        self._talks: set[Conversation] = set()
        self._ends: list[LinkOutlet | LinkInlet] = []
        self._is_closed = False
        self._wake_reader, self._waker = socket.socketpair()
        self._callers: set[threading.Thread] = set()
        self._listener = threading.Thread(target=self._listen, name="listen", daemon=True)
        self._listener.start()

    def connect(
        self, edge: Edge, address: Address, timeout: float, name: str = "the target", run: int = 0,
        bulk: str = "auto", device: torch.device | None = None,
    ) -> Outlet:  # fmt: skip
        """Open `edge` to the process at `address`; returns when that process's endpoint has answered.

        Args:
            timeout: seconds.
            name: what errors call the other process.
            run: number of the run: an edge may be opened once in every run.
            bulk: how large tensors travel: "shared_memory", "gloo", "stream", "rendezvous"; "auto": as is best.
            device: where the source's tensors are; None: in CPU memory.

        Raises:
            NeverOpened: not within `timeout` seconds. ProtocolError: the other process refuses. Closed.
        """
        same_host = address.host == self.address.host
        gpu = cuda.identity(device) if bulk == "auto" else ""
        bulk = ways.choose(bulk, same_host, str(edge))
        wish = Wish(str(edge), run, edge.capacity, bulk, self._ring_bytes, timeout, gpu)
        with self._named(edge, timeout, name):
            deadline = time.monotonic() + timeout
            with self._tracked(Conversation(place.dial(address, same_host, timeout), deadline)) as talk:
                ask(talk, self._token, wish)
                way = ways.source_way(talk, wish, device, self.address.hostname)
                if talk.hear() != {"open": True}:
                    raise ProtocolError("the target did not say that the edge is open")
                return self._keep(ways.outlet(_link(talk, str(edge), run, name), edge.capacity, way, same_host))

    def expect(self, edge: Edge, device: torch.device | None, run: int = 0) -> None:
        """Say where the target of an edge is that will be accepted in this run; sources on GPUs wait for it."""
        with self._changed:
            self._devices[str(edge), run] = device
            self._changed.notify_all()

    def accept(
        self, edge: Edge, timeout: float, name: str = "the source", run: int = 0, device: torch.device | None = None
    ) -> Inlet:
        """Open `edge` from the process that connects to it; arguments and errors as in `connect`.

        `device` is where the target computes: what comes through CPU memory is pinned if that is a GPU.
        """
        deadline = time.monotonic() + timeout
        self.expect(edge, device, run)
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or (str(edge), run) in self._opened, deadline - time.monotonic()
            )
            inlet = self._opened.pop((str(edge), run), None)
            older = [key for key in self._opened if key[0] == str(edge) and key[1] < run]
            forgotten = [self._opened.pop(key) for key in older]
            self._devices = {k: d for k, d in self._devices.items() if k[0] != str(edge) or k[1] > run}
        for one in forgotten:
            one.close()
        if self._is_closed:
            raise Closed("the endpoint was closed")
        if inlet is None:
            raise NeverOpened(f"{name} never opened edge {edge} within {timeout:g} s")
        if inlet.capacity != edge.capacity:
            inlet.close()
            raise ProtocolError(f"edge {edge}: its capacity is {edge.capacity} here and {inlet.capacity} at {name}")
        inlet.introduce(name)
        inlet.pin = device is not None and device.type == "cuda"
        return inlet

    def close(self) -> None:
        """Close all edges, end all threads, and free the address; idempotent. Last messages have 5 s to get away."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
            talks = list(self._talks)
        self._waker.send(b"x")
        for end in sorted(self._ends, key=lambda end: isinstance(end, LinkOutlet)):  # outlets wait for inlets elsewhere
            end.close()
        for talk in talks:
            talk.close()
        deadline = time.monotonic() + LINGER
        for end in self._ends:
            if isinstance(end, LinkOutlet):
                end.join(max(0.1, deadline - time.monotonic()))
        for thread in [self._listener, *self._callers]:
            thread.join(LINGER)
        for sock in (self._unix, self._tcp, self._waker, self._wake_reader):
            sock.close()
        if not self.address.local.startswith("@"):
            with contextlib.suppress(OSError):
                os.unlink(self.address.local)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _expected(self, wish: Wish, deadline: float) -> torch.device | None:
        """Where the target is; waits until this is known."""
        key = (wish.edge, wish.run)
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or key in self._devices, deadline - time.monotonic())
            if key not in self._devices:
                raise TimeoutError(f"nobody accepts edge {wish.edge}")
            return self._devices[key]

    def _keep(self, end: _End) -> _End:
        with self._changed:
            self._ends = [kept for kept in self._ends if not kept.ended]
            if not self._is_closed:
                self._ends.append(end)
                return end
        end.close()
        raise Closed("the endpoint was closed")

    @contextlib.contextmanager
    def _tracked(self, talk: Conversation) -> Iterator[Conversation]:
        """`close` ends the conversation while it is tracked; so does an exception."""
        with self._changed:
            self._talks.add(talk)
        try:
            if self._is_closed:
                raise Closed("the endpoint was closed")
            yield talk
        except BaseException:
            talk.close()
            raise
        finally:
            with self._changed:
                self._talks.discard(talk)

    @contextlib.contextmanager
    def _named(self, edge: Edge, timeout: float, name: str) -> Iterator[None]:
        """Failures name the edge and the other process."""
        try:
            yield
        except OSError as error:
            if self._is_closed:
                raise Closed("the endpoint was closed") from error
            raise NeverOpened(f"{name} never opened edge {edge} within {timeout:g} s ({error})") from error
        except ProtocolError as error:
            raise ProtocolError(f"edge {edge} with {name}: {error}") from error

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for sock in (self._unix, self._tcp, self._wake_reader):
                selector.register(sock, selectors.EVENT_READ)
            while not self._is_closed:
                for key, _ in selector.select():
                    if key.fileobj is not self._wake_reader:
                        self._answer(key.fileobj)  # type: ignore[arg-type]

    def _answer(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return  # gone again
        with self._changed:
            self._callers = {thread for thread in self._callers if thread.is_alive()}
            if self._is_closed or len(self._callers) >= _CALLERS:
                sock.close()
                return
            thread = threading.Thread(target=self._hear_out, args=(sock,), name="hear out", daemon=True)
            self._callers.add(thread)
        thread.start()

    def _hear_out(self, sock: socket.socket) -> None:
        """Open the target's end for whoever proves the token; `accept` will ask for it."""
        try:
            with self._tracked(Conversation(sock, time.monotonic() + _HEARING)) as talk:
                wish = hear_out(talk, self._token)
                device = functools.partial(self._expected, wish, talk.deadline)
                way = ways.target_way(talk, wish, device, self.address.hostname)
                talk.say(open=True)
                inlet = self._keep(ways.inlet(_link(talk, wish.edge, wish.run, "the source"), wish.capacity, way))
        except (OSError, ProtocolError, Closed):
            return  # the caller has been told; what matters is whether the right one comes in time
        with self._changed:
            older = self._opened.pop((wish.edge, wish.run), None)
            self._opened[wish.edge, wish.run] = inlet
            self._changed.notify_all()
        if older:
            older.close()  # its source has given up and asked again


def _link(talk: Conversation, edge: str, run: int, name: str) -> Link:
    """The link that a conversation becomes."""
    talk.socket.settimeout(None)
    if talk.socket.family != socket.AF_UNIX:
        talk.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Link(talk.socket, edge, run, name)
