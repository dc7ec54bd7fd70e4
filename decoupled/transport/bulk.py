"""How the bytes of large tensors travel: the part of an edge that differs from place to place.

    Stream  behind the header, on the edge's own socket: between hosts
    Ring    through shared memory (shared_memory.py), between processes of one host
            through memory of a GPU (shared_device.py), between processes that share it
    Pair    through Gloo (collective.py), between hosts if asked for
    Meeting from device to device (rendezvous.py), between GPUs

Small tensors go behind the header everywhere; both ends divide them in the same way, by size and kind alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from decoupled.errors import ProtocolError
from decoupled.transport.dense import Bytes, Piece

Complete = Callable[[], None]


def nothing() -> None:
    """The `Complete` of what is complete already."""


class Bulk(ABC):
    """One end of the way of large tensors.

    Attributes:
        inline: bytes of tensors of a message that go behind the header.
        ahead: messages that the target may begin to receive before the first of them is complete.
        announces: whether large pieces are announced at once, so that the header can wait for the first announcement.
        device: of this end, whose tensors stay on it; None: all go through CPU memory.
    """

    inline: int = 5 << 14
    ahead: int = 1
    announces: bool = False
    device: torch.device | None = None

    def divide(self, pieces: Sequence[Piece]) -> tuple[list[Bytes], list[Any]]:
        """Those that go behind the header, and the large ones (what is on a device counts as large)."""
        small: list[Bytes] = []
        large: list[Piece] = []
        room = self.inline
        for piece in pieces:
            if not isinstance(piece, torch.Tensor) and len(piece) <= room:
                room -= len(piece)
                small.append(piece)
            else:
                large.append(piece)
        return small, large

    @abstractmethod
    def send(self, pieces: Sequence[Any], announce: Callable[[int], None], wait: Callable[[], None]) -> Complete:
        """Begin to send large pieces; they must not change until the returned function has been called.

        Args:
            announce: `announce(n)` tells the target of n more bytes.
            wait: waits for something more released.

        Raises:
            OSError: the connection is gone, or `abort` was called; so may the returned function.
        """

    @abstractmethod
    def receive(self, pieces: Sequence[Any], next_part: Callable[[], int], release: Callable[[int], None]) -> Complete:
        """Begin to fill the pieces; they are full when the returned function has been called.

        Args:
            next_part: waits for what was announced, and counts it.
            release: `release(n)` tells the source that there is memory for n more bytes.

        Raises:
            OSError: as `send`.
        """

    def released(self, size: int) -> None:
        """The target has said that it has memory for `size` more bytes."""
        raise ProtocolError(f"{size} bytes of shared memory were released, but there is none")

    def free(self) -> None:  # noqa: B027 - not every way has memory of its own
        """Give memory back; nobody sends or receives any more. The target does it before the source."""

    def abort(self) -> None:  # noqa: B027 - not every way has something that can block
        """Wake whoever waits in `send` or `receive` elsewhere than in their arguments; idempotent."""


class Stream(Bulk):
    """Everything goes behind the header."""

    inline = 1 << 62

    def send(self, pieces: Sequence[Any], announce: Callable[[int], None], wait: Callable[[], None]) -> Complete:
        raise AssertionError("no piece is large")

    def receive(self, pieces: Sequence[Any], next_part: Callable[[], int], release: Callable[[int], None]) -> Complete:
        raise AssertionError("no piece is large")
