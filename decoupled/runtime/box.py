"""A box: the mailbox of one actor, shared between threads; nobody is woken for nothing.

    owner    take(wants)        takes what it wants, or leaves its wants here and sleeps
    sender   put(port, message) if that meets the wants left here, hands it over and wakes the owner, who else sleeps on
             leave(...)         where the port is full: leaves the message and sleeps; who makes room puts it in

To wake a thread takes longer than a small operation, so every wake-up is one that lets its thread go on: what it sleeps
for is done by whoever wakes it. All methods are called with the box's `lock` held; sleeping is done without it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence

from decoupled.messages import Message
from decoupled.runtime.contract import Mailbox, Want

Found = tuple[Want, tuple[Message, ...]]


class Sleeper:
    """An actor's thread, as others see it.

    Attributes:
        name: of the actor. moves: messages it has taken and put so far.
        what: tells what it sleeps for; None: it is awake (however late it gets a processor).
    """

    __slots__ = ("_bell", "moves", "name", "what")

    def __init__(self, name: str) -> None:
        self.name, self.moves = name, 0
        self.what: Callable[[], str] | None = None
        self._bell = threading.Lock()  # held, but between `wake` and the end of `sleep`
        self._bell.acquire()

    def sleep(self, seconds: float | None) -> bool:
        """Sleep until `wake`, `seconds` at most; whether it was woken."""
        return self._bell.acquire(timeout=-1 if seconds is None else seconds)

    def wake(self) -> None:
        """Called once per sleep, by whoever has done what it sleeps for."""
        self.what = None
        self._bell.release()


class Box:
    """The mailbox of `owner`.

    Attributes:
        found: what was handed over to the owner in its sleep.
    """

    def __init__(self, owner: Sleeper, ports: dict[str, int], dropping: Collection[str] = ()) -> None:
        self.owner, self.lock = owner, threading.Lock()
        self.found: Found | None = None
        self._mail = Mailbox(ports, dropping)
        self._wants: Sequence[Want] | None = None  # what the owner sleeps for
        self._senders: dict[str, deque[tuple[Message, Sleeper]]] = {port: deque() for port in ports}

    def take(self, wants: Sequence[Want]) -> Found | None:
        """The first of `wants` that can be met, with its messages; None: the owner is to sleep, then has `found`."""
        found = self._take(wants)
        if found is None:
            self._wants, self.owner.what = wants, self._waiting
        return found

    def room(self, port: str) -> bool:
        """Whether `port` takes one more message."""
        return self._mail.room(port) > 0

    def put(self, port: str, message: Message) -> Message | None:
        """Put a message, which wakes the owner if it can go on with it; returns one that had to make room for it."""
        dropped = self._mail.put(port, message)
        if self._wants is not None and (found := self._take(self._wants)) is not None:
            self._wants, self.found = None, found
            self.owner.wake()
        return dropped

    def leave(self, port: str, message: Message, sender: Sleeper, what: Callable[[], str]) -> None:
        """Leave a message for which there is no room yet; `sender` is to sleep."""
        sender.what = what
        self._senders[port].append((message, sender))

    def wake_all(self) -> None:
        """Everybody who sleeps here wakes, with nothing done."""
        if self._wants is not None:
            self._wants = None
            self.owner.wake()
        for senders in self._senders.values():
            while senders:
                senders.popleft()[1].wake()

    def _take(self, wants: Sequence[Want]) -> Found | None:
        found = self._mail.take(wants)
        for port in found[0].ports if found else ():
            if senders := self._senders[port]:
                message, sender = senders.popleft()
                self._mail.put(port, message)
                sender.wake()
        return found

    def _waiting(self) -> str:
        with self.lock:
            return f"{[(w.ports, w.key) for w in self._wants or ()]}; waiting there: {self._mail.waiting()}"
