"""A ring of bytes that two processes share: large payloads stream through it in chunks, copied in and out at once.

    source   copy in, announce(n)  ---PART n--->      target   copy out
             released(n)           <---RELEASE n---            release(n)

              0          tail              head                  size
              | free      | announced       | free                |       both ends count for themselves: the ring
                                                                          holds payload and nothing else

Where the bytes are is the business of who inherits: shared_memory.py, shared_device.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from decoupled.errors import ProtocolError
from decoupled.transport.bulk import Bulk, Complete, nothing


class Ring(Bulk):
    """One end's view of the ring: `send` and `released` are for the source, `receive` for the target, one thread each.

    Args:
        size: bytes.
        chunk: bytes that are announced together, at most.
        edge: for errors.
    """

    announces = True

    def __init__(self, size: int, chunk: int, edge: str) -> None:
        self._size, self._chunk, self._edge = size, chunk, edge
        self._position = 0  # where the next byte goes, or comes from
        self._sent = self._returned = 0  # at the source: bytes copied in, and bytes of them that are free again
        self._done = 0  # at the target: bytes copied out and not yet released

    def send(self, pieces: Sequence[Any], announce: Callable[[int], None], wait: Callable[[], None]) -> Complete:
        """Copy `pieces` in, calling `announce(n)` for every n bytes done, and `wait` to have something released."""
        pending = 0
        for piece in pieces:
            start = 0
            while start < len(piece):
                size = min(len(piece) - start, self._chunk - pending, self._size - self._position)
                while self._sent - self._returned + size > self._size:
                    wait()
                self._move(piece[start : start + size], inwards=True)
                self._sent += size
                start, pending = start + size, pending + size
                if pending == self._chunk:
                    announce(pending)
                    pending = 0
        if pending:
            announce(pending)
        return nothing

    def released(self, size: int) -> None:
        """The target has copied `size` bytes out."""
        if size > self._sent - self._returned:
            raise ProtocolError(f"edge {self._edge}: {size} bytes of shared memory were released, more than in use")
        self._returned += size

    def receive(self, pieces: Sequence[Any], next_part: Callable[[], int], release: Callable[[int], None]) -> Complete:
        """Fill `pieces`: `next_part()` waits for more bytes and counts them, `release(n)` gives n bytes back."""
        left = 0
        total = sum(len(piece) for piece in pieces)
        for piece in pieces:
            start = 0
            while start < len(piece):
                if not left:
                    left = next_part()
                    if not 0 < left <= min(total, self._size):
                        raise ProtocolError(f"edge {self._edge}: a part of {left} bytes, where {total} are missing")
                    total -= left
                size = min(len(piece) - start, left, self._size - self._position)
                self._move(piece[start : start + size], inwards=False)
                start, left = start + size, left - size
                self._done += size
                if self._done >= self._size // 4:  # the source waits only while it uses more than that
                    release(self._done)
                    self._done = 0
        return nothing

    def _move(self, piece: Any, inwards: bool) -> None:
        self._copy(piece, self._position, inwards)
        self._position = (self._position + len(piece)) % self._size

    @abstractmethod
    def _copy(self, piece: Any, position: int, inwards: bool) -> None:
        """Copy `piece` into the ring at `position` (it ends there at the latest), or from there; done on return."""
