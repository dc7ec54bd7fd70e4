"""Tensors that stay on devices: a transfer begins when both ends stand ready for it. In the order of the headers:

    source                                                  target
    the tensors are computed: header  --- MESSAGE --->      allocates on its device
    ("ready to send")                 <--- RELEASE ---      ("clear to send"), and begins to receive
    sends                             ==== group ====>      received: the message has arrived

Nothing is received on speculation: shapes change, memory would be pinned down for what may never come, and a transfer
that waits for its other end occupies a GPU. What is in CPU memory goes behind the header.

    actor's thread    send: marks what its stream has queued, waits for a credit, queues
    sending thread    waits for the mark -> header -> waits for the clearance -> transfer
    listening thread  credits, clearances, the goodbye of the target
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from decoupled.errors import ProtocolError
from decoupled.transport.bulk import Bulk, Complete, nothing
from decoupled.transport.codec import Encoded
from decoupled.transport.collective import Group
from decoupled.transport.contract import Closed, Lost, Received
from decoupled.transport.ends import SHORTLY, LinkInlet
from decoupled.transport.link import Link
from decoupled.transport.queued import LINGER, QueuedOutlet

_GRACE = 2.0  # seconds a transfer may take to end here after the source has left


class Meeting(Bulk):
    """One end of the way from device to device, through `group`."""

    inline = 1 << 62

    def __init__(self, group: Group) -> None:
        self._group, self.device = group, group.device
        self._cleared: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # bytes; None: aborted

    def send(self, pieces: Sequence[Tensor], announce: Callable[[int], None], wait: Callable[[], None]) -> Complete:
        """Wait until the target is ready for `pieces`, then send them."""
        size, cleared = sum(piece.nbytes for piece in pieces), self._cleared.get()
        if cleared is None:
            self._cleared.put(None)  # for whoever comes next
            raise ConnectionAbortedError("aborted")
        if cleared != size:
            raise ProtocolError(f"the target cleared {cleared} bytes where {size} are to be sent")
        self._group.send(pieces)()
        return nothing

    def released(self, size: int) -> None:
        """The target stands ready to receive `size` bytes."""
        self._cleared.put(size)

    def receive(
        self, pieces: Sequence[Tensor], next_part: Callable[[], int], release: Callable[[int], None]
    ) -> Complete:
        """Stand ready for `pieces`."""
        release(sum(piece.nbytes for piece in pieces))
        return self._group.receive(pieces)

    def abort(self) -> None:
        self._cleared.put(None)
        self._group.abort()


class MeetingOutlet(QueuedOutlet):
    """The sending end of an edge between devices."""

    def __init__(self, link: Link, capacity: int, bulk: Bulk) -> None:
        self._news = threading.Condition()
        self._heard = self._heeded = 0  # frames from the target, and those that the sending thread knows of
        self._broken = False  # no more will come
        super().__init__(link, capacity, bulk)
        self._listener = threading.Thread(target=self._listen, name=f"listen {link.edge}", daemon=True)
        self._listener.start()

    def ready(self, timeout: float | None = None) -> bool:
        with self._news:
            if not self._news.wait_for(lambda: self._over or self._credits, timeout):
                return False
            if self._over:
                raise self._over.with_traceback(None)
            return True

    def _spend(self) -> None:
        with self._news:
            self._credits -= 1

    def _put(self, encoded: Encoded, sent: float) -> None:
        if any(isinstance(piece, Tensor) for piece in encoded.pieces):
            self._hand_over(encoded, sent)
        else:
            super()._put(encoded, sent)

    def _deliver(self, encoded: Encoded, sent: float, wait: bool = True) -> Complete:
        try:
            encoded.computed()
        except RuntimeError as error:  # from the device; the actor's thread will meet it, too
            raise Lost(f"edge {self._link.edge}: what should be sent could not be computed: {error}") from error
        return super()._deliver(encoded, sent, wait)

    def _listen(self) -> None:
        try:
            while True:
                frame = self._link.read()
                with self._news:
                    self._act(frame)
                    self._heard += 1
                    self._news.notify_all()
        except (Closed, Lost, ProtocolError) as error:
            with self._news:
                self._over, self._broken = self._over or error, True
                self._news.notify_all()
            self._bulk.abort()  # a transfer under way would not end

    def _wait(self) -> None:
        with self._news:
            self._news.wait_for(lambda: self._broken or self._heard > self._heeded)
            self._heeded = self._heard
            if self._broken:
                assert self._over is not None
                raise self._over.with_traceback(None)

    def _reason(self) -> Exception:
        with self._news:
            self._news.wait_for(lambda: self._over, SHORTLY)
            self._over = self._over or Lost(f"edge {self._link.edge}: the connection to {self._link.peer} broke")
            self._news.notify_all()
            return self._over

    def _finish(self) -> None:
        with self._news:
            self._news.notify_all()
        super()._finish()

    def _see_off(self) -> None:
        self._listener.join(LINGER)  # until the target has closed


class MeetingInlet(LinkInlet):
    """The receiving end of an edge between devices; a thread sees to it that no transfer outlives its source."""

    def __init__(self, link: Link, capacity: int, bulk: Bulk) -> None:
        super().__init__(link, capacity, bulk)
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name=f"watch {link.edge}", daemon=True).start()

    def receive(self) -> Received:
        try:
            return super().receive()
        except BaseException:
            self._ended.set()
            raise

    def close(self) -> None:
        self._ended.set()
        super().close()

    def _watch(self) -> None:
        self._link.wait_end()
        if not self._ended.wait(_GRACE):
            self._bulk.abort()
