"""A ring of shared bytes: large payloads stream through it in chunks, copied in here while copied out there.

    source   copy in, announce(n)  ---PART n--->      target   copy out
             released(n)           <---RELEASE n---            release(n)

              0          tail              head                  size
              | free      | announced       | free                |       both ends count for themselves: the ring
                                                                          holds payload and nothing else

The memory has no name: it is a descriptor passed over the edge's socket, so the system frees it with the last process
that holds it, however that process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from decoupled.errors import ProtocolError
from decoupled.transport.bulk import Bulk, Complete, nothing
from decoupled.transport.dense import Bytes

_PARTS = 8  # a ring holds at least so many chunks, so that both ends can copy at once
_CHUNK = 1 << 19  # bytes: large against the cost of a frame, small against a cache


def allocate(size: int) -> int:
    """A descriptor of `size` bytes of shared memory without a name; the pages are there already."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("decoupled-ring", os.MFD_CLOEXEC)
    else:
        descriptor, path = tempfile.mkstemp(prefix="decoupled-ring")
        os.unlink(path)
    os.ftruncate(descriptor, size)
    with mmap.mmap(descriptor, size) as memory:
        for offset in range(0, size, mmap.PAGESIZE):
            memory[offset] = 0
    return descriptor


class Ring(Bulk):
    """One end's view of the ring: `send` and `released` are for the source, `receive` for the target, one thread each.

    Args:
        descriptor: of the memory; closed by the ring.
        size: bytes.
        edge: for errors.
    """

    announces = True

    def __init__(self, descriptor: int, size: int, edge: str) -> None:
        try:
            if os.fstat(descriptor).st_size != size or size < _PARTS:
                raise ProtocolError(f"edge {edge}: the shared memory does not have the {size} bytes announced")
            self._memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        finally:
            os.close(descriptor)
        self._size, self._edge = size, edge
        self._chunk = min(_CHUNK, size // _PARTS)
        self._position = 0  # where the next byte goes, or comes from
        self._free = size  # at the source
        self._done = 0  # at the target: bytes copied out and not yet released

    def send(self, pieces: Sequence[Bytes], announce: Callable[[int], None], wait: Callable[[], None]) -> Complete:
        """Copy `pieces` in, calling `announce(n)` for every n bytes done, and `wait` to have something released."""
        pending = 0
        for piece in pieces:
            start = 0
            while start < len(piece):
                size = min(len(piece) - start, self._chunk - pending, self._size - self._position)
                while self._free < size:
                    wait()
                self._copy(piece[start : start + size], inwards=True)
                self._free -= size
                start, pending = start + size, pending + size
                if pending == self._chunk:
                    announce(pending)
                    pending = 0
        if pending:
            announce(pending)
        return nothing

    def released(self, size: int) -> None:
        """The target has copied `size` bytes out."""
        if size > self._size - self._free:
            raise ProtocolError(f"edge {self._edge}: {size} bytes of shared memory were released, more than in use")
        self._free += size

    def receive(
        self, pieces: Sequence[Bytes], next_part: Callable[[], int], release: Callable[[int], None]
    ) -> Complete:
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
                self._copy(piece[start : start + size], inwards=False)
                start, left = start + size, left - size
                self._done += size
                if self._done >= self._size // 4:  # the source waits only while it uses more than that
                    release(self._done)
                    self._done = 0
        return nothing

    def _copy(self, piece: Bytes, inwards: bool) -> None:
        here = self._memory[self._position : self._position + len(piece)]
        np.copyto(*((here, piece) if inwards else (piece, here)))  # lets other threads run
        self._position = (self._position + len(piece)) % self._size
