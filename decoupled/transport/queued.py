"""The sending end where what comes after the credit can be slow: a thread of its own does what would have to wait.

QueuedOutlet  send, in the caller: encode -> wait for a credit -> header, tensors, as much as the system takes at once
              its thread: the rest
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable

from decoupled.errors import ProtocolError
from decoupled.transport.bulk import Bulk, Complete
from decoupled.transport.codec import Encoded
from decoupled.transport.contract import Closed, Lost
from decoupled.transport.ends import LinkOutlet
from decoupled.transport.link import Link

LINGER = 5.0  # seconds that the last messages have, after `close`, to get away


class QueuedOutlet(LinkOutlet):
    """A `LinkOutlet` that never writes in the caller what a slow network could hold up.

    What the system takes at once is written there, if nothing is waiting before it: a change of threads costs more.
    Attentive: credits also say which transfers are over, whose tensors need not be kept.
    """

    _attentive = True

    def __init__(self, link: Link, capacity: int, bulk: Bulk) -> None:
        super().__init__(link, capacity, bulk)
        self._begun: deque[Complete] = deque()  # taken messages leave it: their transfers need no waiting for
        self._handed = self._done = 0  # jobs given to the thread, and done by it
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"send {link.edge}", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._link.cut()
            self._bulk.abort()
            self._thread.join(timeout)

    def _put(self, encoded: Encoded, sent: float) -> None:
        if self._handed > self._done:
            self._hand_over(encoded, sent)
            return
        self._begun.append(self._deliver(encoded, sent, wait=False))
        if self._link.holds:
            self._hand(self._flush)

    def _flush(self) -> None:
        try:
            self._link.flush()
        except (Lost, Closed) as error:
            raise self._reason() from error

    def _hand_over(self, encoded: Encoded, sent: float) -> None:
        """Let the thread deliver a message."""
        self._hand(lambda: self._begun.append(self._deliver(encoded, sent)))

    def _hand(self, job: Callable[[], None]) -> None:
        self._handed += 1
        self._jobs.put(job)

    def _finish(self) -> None:
        self._jobs.put(None)

    def _credited(self) -> None:
        with contextlib.suppress(OSError, IndexError):  # the link will tell; closing has just completed all
            while len(self._begun) > self._capacity - self._credits:
                self._begun.popleft()()

    def _run(self) -> None:
        try:
            while job := self._jobs.get():
                job()
                self._done += 1
            self._complete_all()
            self._link.goodbye(LINGER)
            self._see_off()
        except (Closed, Lost, ProtocolError) as error:
            self._over = self._over or (error if isinstance(error, Closed | Lost) else Lost(str(error)))
            self._link.wake()
        finally:
            self._bulk.abort()
            self._link.close()
            self._bulk.free()

    def _see_off(self) -> None:
        self._link.drain(LINGER)  # a socket that is closed earlier may lose what is still under way

    def _complete_all(self) -> None:
        try:
            with contextlib.suppress(IndexError):
                while True:
                    self._begun.popleft()()
        except OSError as error:
            raise self._reason() from error
