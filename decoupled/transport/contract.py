"""What a transport does: it carries the messages of one directed edge from one process to another.

    Outlet  in the process of the edge's source     ready -> send, send, ... -> close
    Inlet   in the process of the edge's target     receive, receive, ... ; taken (gives room back); close

The edge's capacity is kept exactly: at most `capacity` messages have been sent and not yet been `taken` from the
target's mailbox. Messages of one edge arrive in the order in which they were sent. A received tensor is owned by the
receiver. A transport never polls, and every wait ends when either side closes or dies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from decoupled.messages import Message


class Lost(RuntimeError):
    """The other process of an edge has gone without saying goodbye."""


class NeverOpened(RuntimeError):
    """The other process of an edge did not open it in time."""


class Closed(Exception):
    """This end was closed (by `close`, possibly from another thread), or the other end said goodbye."""


class Received(NamedTuple):
    """A message, and when it was sent, on the sender's `time.perf_counter`."""

    message: Message
    sent: float


class Outlet(ABC):
    """The sending end. `nbytes` and `payload_bytes`: bytes handed to the wire so far, and those of tensors alone."""

    nbytes: int = 0
    payload_bytes: int = 0

    @abstractmethod
    def ready(self, timeout: float | None = None) -> bool:
        """Wait until there is room for a message; False after `timeout` seconds (0: only look).

        Raises:
            Closed, Lost.
        """

    @abstractmethod
    def send(self, message: Message) -> None:
        """Send; waits for room first. Tensors are not changed afterwards by anyone, so they may be sent later.

        Raises:
            Closed, Lost. ProtocolError: something in the message cannot be sent.
        """

    @abstractmethod
    def close(self) -> None:
        """Say goodbye after what has been sent, and end; idempotent, wakes whoever waits here."""


class Inlet(ABC):
    """The receiving end."""

    @abstractmethod
    def receive(self) -> Received:
        """The next message; waits for it.

        Raises:
            Closed, Lost. ProtocolError: what arrived is not a message of this edge.
        """

    @abstractmethod
    def taken(self) -> None:
        """One received message has left the mailbox: the sender may send one more. Callable from any thread."""

    @abstractmethod
    def close(self) -> None:
        """End; idempotent, wakes whoever waits here, and the sender gets `Closed`."""
