"""The sending end where what comes after the credit can be slow: a thread of its own does it.

QueuedOutlet  send, in the caller: encode -> wait for a credit -> queue
              its thread: header, small tensors -> large ones
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque

from decoupled.errors import ProtocolError
from decoupled.transport.bulk import Bulk, Complete
from decoupled.transport.codec import Encoded
from decoupled.transport.contract import Closed, Lost
from decoupled.transport.ends import LinkOutlet
from decoupled.transport.link import Link

LINGER = 5.0  # seconds that the last messages have, after `close`, to get away
_AT_ONCE = 1 << 14  # bytes behind a header that the system takes at once if it takes any


class QueuedOutlet(LinkOutlet):
    """A `LinkOutlet` that never writes in the caller what a slow network could hold up.

    A header and little else is written at once, if nothing is waiting before it: a change of threads costs more.
    """

    def __init__(self, link: Link, capacity: int, bulk: Bulk) -> None:
        super().__init__(link, capacity, bulk)
        self._begun: deque[Complete] = deque()  # taken messages leave it: their transfers need no waiting for
        self._handed = self._delivered = 0  # messages given to the thread, and done by it
        self._queue: queue.SimpleQueue[tuple[Encoded, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"send {link.edge}", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._link.cut()
            self._bulk.abort()
            self._thread.join(timeout)

    def _put(self, encoded: Encoded, sent: float) -> None:
        inline = sum(len(piece) for piece in self._bulk.divide(encoded.pieces)[0])
        if self._handed == self._delivered and inline <= _AT_ONCE and self._link.is_writable():
            self._begun.append(self._deliver(encoded, sent))
            return
        self._handed += 1
        self._queue.put((encoded, sent))

    def _finish(self) -> None:
        self._queue.put(None)

    def _credited(self) -> None:
        with contextlib.suppress(OSError, IndexError):  # the link will tell; closing has just completed all
            while len(self._begun) > self._capacity - self._credits:
                self._begun.popleft()()

    def _run(self) -> None:
        try:
            while item := self._queue.get():
                self._begun.append(self._deliver(*item))
                self._delivered += 1
            self._complete_all()
            self._link.goodbye(LINGER)
            self._see_off()
        except (Closed, Lost, ProtocolError) as error:
            self._over = self._over or (error if isinstance(error, Closed | Lost) else Lost(str(error)))
            self._link.wake()
        finally:
            self._bulk.abort()
            self._link.close()

    def _see_off(self) -> None:
        self._link.drain(LINGER)  # a socket that is closed earlier may lose what is still under way

    def _complete_all(self) -> None:
        try:
            with contextlib.suppress(IndexError):
                while True:
                    self._begun.popleft()()
        except OSError as error:
            raise self._reason() from error
