"""A ring in memory that two processes of one host share.

The memory has no name: it is a descriptor passed over the edge's socket, so the system frees it with the last process
that holds it, however that process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

from decoupled.errors import ProtocolError
from decoupled.transport.dense import Bytes
from decoupled.transport.ring import Ring

_PARTS = 4  # a ring holds at least so many chunks, so that both ends can copy at once
_CHUNK = 1 << 21  # bytes: large against the cost of a frame and of being woken, small against a cache


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


def mapped(descriptor: int, size: int, edge: str) -> Bytes:
    """The memory as bytes; closes the descriptor, with or without success.

    Raises:
        ProtocolError: it does not have that size.
    """
    try:
        if os.fstat(descriptor).st_size != size or size < _PARTS:
            raise ProtocolError(f"edge {edge}: the shared memory does not have the {size} bytes announced")
        return np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
    finally:
        os.close(descriptor)


class HostRing(Ring):
    """One end's view.

    Args:
        descriptor: of the memory; closed by the ring.
        size: bytes.
        edge: for errors.
    """

    def __init__(self, descriptor: int, size: int, edge: str) -> None:
        super().__init__(size, min(_CHUNK, size // _PARTS), edge)
        self._memory = mapped(descriptor, size, edge)

    def _copy(self, piece: Bytes, position: int, inwards: bool) -> None:
        here = self._memory[position : position + len(piece)]
        np.copyto(*((here, piece) if inwards else (piece, here)))  # lets other threads run
