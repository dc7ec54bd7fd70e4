"""A line between two processes for control messages: framed, authenticated, and alive while a large message is on it.

    send(...)    a message, in pieces, so that others get in between; waits while the other end does not read
    hint(...)    a message of one piece, only if it can be sent at once: beats never wait
    receive()    the next message; `heard` moves with every piece

Both ends show that they know the token before anything that was sent is unpickled.
"""

from __future__ import annotations

import contextlib
import hmac
import pickle
import secrets
import select
import socket
import struct
import threading
import time
from typing import Any

PIECE = 1 << 20  # bytes
HEARING = 5.0  # seconds that a caller has to show the token
_ALONE, _MORE, _LAST = range(3)
_HEADER = struct.Struct("!BI")
_NONCE = 32


class Line:
    """One end of a connected socket. `heard`: when something last came, on `time.monotonic`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an answer must not wait for more to say
        self._socket = connection
        self._whole, self._piece = threading.Lock(), threading.Lock()
        self._parts: list[bytes] = []
        self.heard = time.monotonic()

    @classmethod
    def call(cls, address: tuple[str, int], token: bytes, timeout: float) -> Line:
        """Connect to a process that waits in `hear_out`.

        Raises:
            OSError: it is not there, or does not know the token.
        """
        connection = socket.create_connection(address, timeout)
        try:
            nonce, mine = _exactly(connection, _NONCE), secrets.token_bytes(_NONCE)
            connection.sendall(hmac.digest(token, nonce, "sha256") + mine)
            if not hmac.compare_digest(_exactly(connection, _NONCE), hmac.digest(token, mine, "sha256")):
                raise OSError("the other process does not know the token")
        except BaseException:
            connection.close()  # who was left from before a restart is called again and again
            raise
        connection.settimeout(None)
        return cls(connection)

    @classmethod
    def hear_out(cls, connection: socket.socket, token: bytes) -> Line:
        """The line to a caller, once it has shown the token.

        Raises:
            OSError: it has not, within `HEARING` seconds.
        """
        connection.settimeout(HEARING)
        nonce = secrets.token_bytes(_NONCE)
        connection.sendall(nonce)
        if not hmac.compare_digest(_exactly(connection, _NONCE), hmac.digest(token, nonce, "sha256")):
            connection.close()
            raise OSError("the caller does not know the token")
        connection.sendall(hmac.digest(token, _exactly(connection, _NONCE), "sha256"))
        connection.settimeout(None)
        return cls(connection)

    def send(self, *words: Any) -> None:
        """Send; that the line is broken is for its reader to notice."""
        data = memoryview(pickle.dumps(words))
        with contextlib.suppress(OSError), self._whole:
            for start in range(0, len(data), PIECE):
                flag = _LAST if start + PIECE >= len(data) else _MORE
                with self._piece:
                    self._send(flag, data[start : start + PIECE])

    def hint(self, *words: Any) -> None:
        """Send a small message if that needs no waiting; else nothing."""
        if self._piece.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError, ValueError):
                    if select.select([], [self._socket], [], 0)[1]:
                        self._send(_ALONE, memoryview(pickle.dumps(words)))
            finally:
                self._piece.release()

    def receive(self) -> tuple[Any, ...] | None:
        """The next message; None at the end of the line."""
        while True:
            try:
                flag, size = _HEADER.unpack(self._take(_HEADER.size))
                piece = self._take(size)
            except OSError:
                return None
            if flag == _ALONE:
                return pickle.loads(piece)
            self._parts.append(piece)
            if flag == _LAST:
                data = b"".join(self._parts)
                self._parts.clear()
                return pickle.loads(data)

    def close(self) -> None:
        """End the line: whoever reads or writes on it wakes up; idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def free(self) -> None:
        """Give the socket back; for its reader, at the end."""
        self._socket.close()

    def _send(self, flag: int, piece: memoryview) -> None:
        self._socket.sendall(b"".join((_HEADER.pack(flag, len(piece)), piece)))

    def _take(self, size: int) -> bytes:
        data = _exactly(self._socket, size)
        self.heard = time.monotonic()
        return data


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = connection.recv_into(view[at:])
        if not count:
            raise ConnectionResetError("the other end has closed the line")
        at += count
    return bytes(data)
