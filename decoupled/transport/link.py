"""A link: one stream socket per edge between processes. Frames go both ways; the end of the stream is death.

    source   MESSAGE meta bytes, PART, ... GOODBYE  --->   target
             <---   CREDIT, RELEASE, ... GOODBYE

Reading is for one thread at a time, writing for any. `cut` ends every wait of this end and is seen by the other end as
the end of the stream: without a goodbye before it, that end is lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Sequence

import numpy as np

from decoupled.transport import frame
from decoupled.transport.contract import Closed, Lost
from decoupled.transport.dense import Bytes
from decoupled.transport.frame import Frame, Kind

_BUFFER = 1 << 17
_VECTORS = 256  # buffers in one sendmsg; the system's limit is 1024
_MOMENT = 3e-4  # seconds


class Link:
    """One end.

    Args:
        sock: connected and blocking; owned by the link from now on.
        edge, run: the edge's name and the number of the run, the same on both ends.
        peer: what errors call the other process.

    Attributes:
        sent_bytes: bytes handed to the system so far.
        is_closed: its descriptors have been given back.
    """

    def __init__(self, sock: socket.socket, edge: str, run: int, peer: str) -> None:
        self.edge, self.peer = edge, peer
        self._number = frame.number(edge, run)
        self._socket = sock
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._written = self._read = 0  # frames
        self._held: list[memoryview] = []  # what leaves with the next frame
        self.sent_bytes = 0
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0  # what has been read from the socket, but not been asked for
        self._wake_reader, self._waker = os.pipe()
        self._poll = select.poll()
        for descriptor in (sock.fileno(), self._wake_reader):
            self._poll.register(descriptor, select.POLLIN)
        self._usual = 1.0  # seconds that `watch` takes, of late and on average
        self._waking = threading.Lock()
        self._is_cut = self.is_closed = False

    def write(self, header: Frame, pieces: Sequence[Bytes] = (), hold: bool = False, wait: bool = True) -> bool:
        """Write a frame, and `pieces` behind it; what is held leaves with the next frame, or by `flush`.

        Args:
            hold: all of it.
            wait: while the socket is full; otherwise what it does not take at once is held.

        Returns:
            Whether nothing is held.

        Raises:
            Closed: this end was cut. Lost: the other end is closed or gone.
        """
        with self._writing:
            first = frame.pack(header, self._number, self._written)
            self._written += 1
            buffers = [memoryview(first + header.meta), *[piece.data for piece in pieces]]
            self.sent_bytes += sum(map(len, buffers))  # before anybody can have received them
            self._held += buffers
            return not hold and self._write(wait)

    @property
    def holds(self) -> bool:
        """Whether something waits for `flush`."""
        return bool(self._held)

    def flush(self) -> None:
        """Write what is held; waits and fails as `write`."""
        with self._writing:
            self._write(wait=True)

    def goodbye(self, patience: float) -> None:
        """Tell the other end that nothing follows, if that is possible within `patience` seconds; never raises."""
        if not self._writing.acquire(timeout=patience):
            return  # a writer is stuck in the middle of a frame
        try:
            if not self._write(wait=False):
                return  # so it would be here
            goodbye = frame.pack(Frame(Kind.GOODBYE), self._number, self._written)
            try:
                self._socket.send(goodbye, socket.MSG_DONTWAIT)
            except BlockingIOError:
                room = select.poll()
                room.register(self._socket, select.POLLOUT)
                room.poll(patience * 1000)
                self._socket.send(goodbye, socket.MSG_DONTWAIT)
            self._written += 1
            self._socket.shutdown(socket.SHUT_WR)
        except (OSError, ValueError, Closed, Lost):
            pass  # gone already
        finally:
            self._writing.release()

    def wait(self, timeout: float | None) -> bool:
        """Wait until something can be read; False after `timeout` seconds, or when woken by `wake`."""
        with self._reading:
            if self._end > self._start or self._is_cut:
                return True
            found = self._poll.poll(None if timeout is None else max(timeout, 0) * 1000)
            return self._is_cut or bool(found and all(descriptor != self._wake_reader for descriptor, _ in found))

    def watch(self) -> None:
        """Wait until something can be read: awake for a moment, if it usually comes in a moment, as answers do.

        To sleep and be woken takes as long as a small message. Whoever needs the core meanwhile gets it.
        """
        with self._reading:
            start = time.perf_counter()
            until = start + _MOMENT if self._usual < _MOMENT else start
            ready = self._end > self._start or self._is_cut or self._poll.poll(0)
            while not ready and time.perf_counter() < until:
                os.sched_yield()
                ready = self._poll.poll(0)
            if not ready:
                self._poll.poll()
            self._usual += 0.2 * (time.perf_counter() - start - self._usual)

    def wake(self) -> None:
        """End the present and all future calls of `wait`."""
        with self._waking:
            if not self.is_closed:
                os.write(self._waker, b"x")

    def read(self) -> Frame:
        """The next frame; waits for it. What belongs to a MESSAGE beyond its meta is to be read with `read_into`.

        Raises:
            Closed: this end was cut. Lost: the stream ended. ProtocolError.
        """
        with self._reading:
            header = frame.unpack(self._take(frame.SIZE), self._number, self._read, self.edge)
            self._read += 1
            if not header.meta_bytes:
                return header.frame(b"", self.edge)
            if header.meta_bytes <= _BUFFER:
                return header.frame(bytes(self._take(header.meta_bytes)), self.edge)
            meta = np.empty(header.meta_bytes, np.uint8)
            self._fill(meta.data)
            return header.frame(meta.tobytes(), self.edge)

    def read_into(self, pieces: Sequence[Bytes]) -> None:
        """Fill `pieces` with the next bytes; errors as `read`."""
        with self._reading:
            for piece in pieces:
                self._fill(piece.data)

    def drain(self, patience: float) -> None:
        """Read and forget until the other end has closed, for at most `patience` seconds."""
        deadline = time.monotonic() + patience
        with self._reading:
            self._start = self._end = 0
            reader = select.poll()
            reader.register(self._socket, select.POLLIN)
            try:
                while reader.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    if not self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT):
                        return
            except (OSError, ValueError):
                return

    def wait_end(self) -> None:
        """Wait until the other end has said its last (which may not have been read yet), or this one is cut."""
        ended = select.poll()
        with contextlib.suppress(OSError, ValueError):  # closed
            ended.register(self._socket, getattr(select, "POLLRDHUP", select.POLLHUP))
            ended.register(self._wake_reader, select.POLLIN)
            ended.poll()

    def cut(self) -> None:
        """End the stream now and wake everybody; idempotent."""
        self._is_cut = True
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self.wake()

    def close(self) -> None:
        """Cut, and give the descriptors back."""
        self.cut()
        with self._reading, self._writing, self._waking:  # nobody is inside a call any more
            if not self.is_closed:
                self.is_closed = True
                self._socket.close()
                os.close(self._wake_reader)
                os.close(self._waker)

    def gone(self) -> Exception:
        """The error for a stream that has ended."""
        if self._is_cut:
            return Closed(f"edge {self.edge} was closed")
        return Lost(f"edge {self.edge}: {self.peer} has gone without saying goodbye")

    def _take(self, size: int) -> memoryview:
        """`size` bytes (at most the buffer's) that are valid until the next call."""
        while self._end - self._start < size:
            if self._start + size > _BUFFER:
                self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
                self._start, self._end = 0, self._end - self._start
            self._end += self._receive(self._buffer[self._end :])
        taken = self._buffer[self._start : self._start + size]
        self._start += size
        if self._start == self._end:
            self._start = self._end = 0
        return taken

    def _fill(self, view: memoryview) -> None:
        ready = min(len(view), self._end - self._start)
        if ready:
            view[:ready] = self._take(ready)
        while ready < len(view):
            ready += self._receive(view[ready:], socket.MSG_WAITALL)

    def _receive(self, view: memoryview, flags: int = 0) -> int:
        try:
            size = self._socket.recv_into(view, 0, flags)
        except OSError as error:
            raise self.gone() from error
        if not size:
            raise self.gone()
        return size

    def _write(self, wait: bool) -> bool:
        """Write what is held; called with `_writing` held."""
        buffers = self._held
        while buffers:
            try:
                sent = self._socket.sendmsg(buffers[:_VECTORS], (), 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                raise self.gone() from error
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if sent:
                buffers[0] = buffers[0][sent:]
        return True
