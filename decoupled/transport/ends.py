"""The two ends of an edge over a link: messages with credits. Who waits where:

    LinkOutlet    send, in the caller: encode -> wait for a credit -> header, small tensors -> large ones
    LinkInlet     receive, in the caller: header -> check -> fresh memory -> small tensors -> large ones

One credit is one message that may be sent; there are as many as the edge's capacity, and `taken` returns one. On edges
of a large capacity several are returned together, so that those that nobody has read yet never fill the socket; but all
at once where the source could be waiting for one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque

from decoupled.errors import ProtocolError
from decoupled.messages import Message
from decoupled.transport.bulk import Bulk, Complete, nothing
from decoupled.transport.codec import Draft, Encoded, encode
from decoupled.transport.contract import Closed, Inlet, Lost, Outlet, Received
from decoupled.transport.frame import Frame, Kind
from decoupled.transport.link import Link

_UNREAD = 64  # frames of credits, about, that the source may leave unread
SHORTLY = 1.0  # seconds that a goodbye, or the reason of a failed write, may take


class LinkOutlet(Outlet):
    """The sending end over `link`; `ready` and `send` are for one thread at a time.

    What the target says is read when the credits are used up: one call of the system for several messages. Who is
    `attentive` looks before every message: nothing is sent after a goodbye that has come.
    """

    _attentive = False

    def __init__(self, link: Link, capacity: int, bulk: Bulk) -> None:
        self._link, self._capacity, self._bulk = link, capacity, bulk
        self._credits = capacity
        self._large_bytes = 0
        self._turn = threading.Lock()  # held while frames from the target are handled
        self._over: Exception | None = None  # why nothing can be sent any more
        self._closing = threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether it has been closed and nothing of it is left."""
        return self._link.is_closed

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self._link.sent_bytes + self._large_bytes

    def ready(self, timeout: float | None = None) -> bool:
        if self._credits and self._over is None and not self._attentive:
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._turn:
            while True:
                if self._over:
                    raise self._over.with_traceback(None)
                patience = 0.0 if self._credits else None if deadline is None else deadline - time.monotonic()
                if self._link.wait(patience):
                    self._handle()
                elif self._over:
                    continue
                elif self._credits:
                    return True
                elif patience is not None:
                    return False

    def send(self, message: Message) -> None:
        encoded = encode(message, self._link.edge, self._bulk.device)
        self.ready()
        self._spend()
        self._put(encoded, time.perf_counter())

    def close(self) -> None:
        if self._closing.acquire(blocking=False):
            self._over = self._over or Closed(f"edge {self._link.edge} was closed")
            self._link.wake()
            self._finish()

    def join(self, timeout: float) -> None:
        """Wait until a closed outlet has ended; after `timeout` seconds what has not been sent is dropped."""

    def _finish(self) -> None:
        self._link.goodbye(SHORTLY)
        self._link.cut()
        self._bulk.abort()
        self._link.close()

    def _spend(self) -> None:
        self._credits -= 1

    def _put(self, encoded: Encoded, sent: float) -> None:
        self._deliver(encoded, sent)()

    def _deliver(self, encoded: Encoded, sent: float, wait: bool = True) -> Complete:
        """Write the message, begin with its large tensors; unless it may `wait`, the link may hold some of it then."""
        small, large = self._bulk.divide(encoded.pieces)
        size = sum([piece.nbytes for piece in encoded.pieces])
        self.payload_bytes += size
        self._large_bytes += sum([piece.nbytes for piece in large])
        try:
            header = Frame(Kind.MESSAGE, size, sent, encoded.meta, len(encoded.pieces))
            self._link.write(header, small, hold=bool(large) and self._bulk.announces, wait=wait)
            complete = self._bulk.send(large, self._announce, self._wait) if large else nothing
        except (Lost, Closed, OSError) as error:
            raise self._reason() from error
        return complete

    def _credited(self) -> None:
        """Messages were taken."""

    def _announce(self, size: int) -> None:
        self._link.write(Frame(Kind.PART, size))

    def _wait(self) -> None:
        with self._turn:
            if self._link.wait(None):
                self._handle()
            if self._over:
                raise self._over.with_traceback(None)

    def _handle(self) -> None:
        """Read and act on one frame from the target; called with `_turn` held."""
        try:
            frame = self._link.read()
        except (Closed, Lost) as error:
            self._over = self._over or error
            raise self._over from error
        self._act(frame)

    def _act(self, frame: Frame) -> None:
        if frame.kind is Kind.CREDIT:
            self._credits += frame.amount
            if self._credits > self._capacity:
                raise ProtocolError(f"edge {self._link.edge}: more messages were taken than had been sent")
            self._credited()
        elif frame.kind is Kind.RELEASE:
            self._bulk.released(frame.amount)
        elif frame.kind is Kind.GOODBYE:
            self._over = self._over or Closed(f"edge {self._link.edge} was closed by {self._link.peer}")
            raise self._over
        else:
            raise ProtocolError(f"edge {self._link.edge}: the target sent a {frame.kind.name}")

    def _reason(self) -> Exception:
        """Why a write failed: what the target said before it left."""
        if self._turn.acquire(timeout=SHORTLY):
            try:
                while self._over is None and self._link.wait(SHORTLY):
                    self._handle()
            except (Closed, Lost, ProtocolError) as error:
                return error
            finally:
                self._turn.release()
        self._over = self._over or Lost(f"edge {self._link.edge}: the connection to {self._link.peer} broke")
        self._link.wake()
        return self._over


class LinkInlet(Inlet):
    """The receiving end over `link`."""

    def __init__(self, link: Link, capacity: int, bulk: Bulk) -> None:
        self._link, self.capacity, self._bulk = link, capacity, bulk
        self._held = 0  # messages begun and not taken
        self._owed, self._enough = 0, max(1, capacity // _UNREAD)  # credits to return, and how many of them together
        self._begun: deque[tuple[Draft, float, Complete]] = deque()
        self.pin = False  # whether tensors should arrive in pinned memory
        self._said_goodbye = False
        self._counting = threading.Lock()

    def receive(self) -> Received:
        try:
            return self._receive()
        except BaseException:  # also that it was closed: this was the only thread that receives
            self._bulk.free()
            raise

    def _receive(self) -> Received:
        while not self._begun or (len(self._begun) < self._bulk.ahead and self._link.wait(0)):
            if self._said_goodbye:
                break
            self._begin()
        if not self._begun:
            self._bulk.abort()
            self._bulk.free()
            self._link.close()  # nothing follows; the source waits for this
            raise Closed(f"edge {self._link.edge} was closed by {self._link.peer}")
        draft, sent, complete = self._begun.popleft()
        try:
            complete()
        except OSError as error:
            raise self._link.gone() from error
        return Received(draft.message(), sent)

    def taken(self) -> None:
        with self._counting:
            if not self._held:
                raise ProtocolError(f"edge {self._link.edge}: more messages were taken than had arrived")
            self._held -= 1
            self._owed += 1
        self._repay()

    def close(self) -> None:
        self._link.goodbye(SHORTLY)
        self._link.cut()
        self._bulk.abort()
        self._link.close()

    @property
    def ended(self) -> bool:
        """As of an outlet."""
        return self._link.is_closed

    def introduce(self, name: str) -> None:
        """Call the other process `name` in errors."""
        self._link.peer = name

    def _begin(self) -> None:
        """Read the header of a message and what comes behind it, and begin with its large tensors."""
        self._link.watch()
        header = self._link.read()
        if header.kind is Kind.GOODBYE:
            self._said_goodbye = True
            return
        if header.kind is not Kind.MESSAGE:
            raise ProtocolError(f"edge {self._link.edge}: a {header.kind.name} arrived where a MESSAGE is due")
        with self._counting:
            self._held += 1
            if self._held > self.capacity:
                raise ProtocolError(f"edge {self._link.edge}: a message arrived beyond the capacity {self.capacity}")
        self._repay()
        draft = Draft(header.meta, header.tensors, header.amount, self._link.edge, self._bulk.device, self.pin)
        small, large = self._bulk.divide(draft.pieces)
        self._link.read_into(small)
        complete = nothing
        if large:
            try:
                complete = self._bulk.receive(large, self._part, self._release)
            except OSError as error:
                raise self._link.gone() from error
        self._begun.append((draft, header.sent, complete))

    def _repay(self) -> None:
        """Return the credits that are owed, if they are enough, or all that the source is short of."""
        with self._counting:
            if self._owed < self._enough and self._held + self._owed < self.capacity:
                return
            owed, self._owed = self._owed, 0
        if owed:
            self._tell(Frame(Kind.CREDIT, owed))

    def _part(self) -> int:
        frame = self._link.read()
        if frame.kind is Kind.GOODBYE:
            raise Closed(f"edge {self._link.edge} was closed by {self._link.peer} in the middle of a message")
        if frame.kind is not Kind.PART:
            raise ProtocolError(f"edge {self._link.edge}: a {frame.kind.name} arrived where a PART is due")
        return frame.amount

    def _release(self, size: int) -> None:
        self._tell(Frame(Kind.RELEASE, size))

    def _tell(self, frame: Frame) -> None:
        with contextlib.suppress(Closed, Lost):  # reading finds out how the source left
            self._link.write(frame)
