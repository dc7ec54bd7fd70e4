"""How the bytes of large tensors travel: the part of an edge that differs from place to place.

    Stream  behind the header, on the edge's own socket
    Ring    through shared memory (shared_memory.py), between processes of one host
    Pair    through Gloo (collective.py), between hosts

Small tensors go behind the header everywhere; both ends divide them in the same way, by size alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from decoupled.errors import ProtocolError
from decoupled.transport.codec import Bytes

Complete = Callable[[], None]


def nothing() -> None:
    """The `Complete` of what is complete already."""


class Bulk(ABC):
    """One end of the way of large tensors.

    Attributes:
        inline: bytes of tensors of a message that go behind the header.
        ahead: messages that the target may begin to receive before the first of them is complete.
    """

    inline: int = 5 << 14
    ahead: int = 1

    def divide(self, pieces: Sequence[Bytes]) -> tuple[list[Bytes], list[Bytes]]:
        """Those that go behind the header, and the large ones."""
        small: list[Bytes] = []
        large: list[Bytes] = []
        room = self.inline
        for piece in pieces:
            if len(piece) <= room:
                room -= len(piece)
                small.append(piece)
            else:
                large.append(piece)
        return small, large

    @abstractmethod
    def send(self, pieces: Sequence[Bytes], announce: Callable[[int], None], wait: Callable[[], None]) -> Complete:
        """Begin to send large pieces; they must not change until the returned function has been called.

        Args:
            announce: `announce(n)` tells the target of n more bytes.
            wait: waits for something released.

        Raises:
            OSError: the connection is gone, or `abort` was called; so may the returned function.
        """

    @abstractmethod
    def receive(
        self, pieces: Sequence[Bytes], next_part: Callable[[], int], release: Callable[[int], None]
    ) -> Complete:
        """Begin to fill the pieces; they are full when the returned function has been called.

        Args:
            next_part: waits for what was announced, and counts it.
            release: `release(n)` tells the source that n bytes are done.

        Raises:
            OSError: as `send`.
        """

    def released(self, size: int) -> None:
        """The target has said that `size` bytes are done."""
        raise ProtocolError(f"{size} bytes of shared memory were released, but there is none")

    def abort(self) -> None:  # noqa: B027 - not every way has something that can block
        """Wake whoever waits in `send` or `receive` elsewhere than in their arguments; idempotent."""


class Stream(Bulk):
    """Everything goes behind the header."""

    inline = 1 << 62

    def send(self, pieces: Sequence[Bytes], announce: Callable[[int], None], wait: Callable[[], None]) -> Complete:
        raise AssertionError("no piece is large")

    def receive(
        self, pieces: Sequence[Bytes], next_part: Callable[[], int], release: Callable[[int], None]
    ) -> Complete:
        raise AssertionError("no piece is large")
