"""Gloo: the large tensors of one edge between hosts, in a group of two ranks of its own.

    source (rank 0)   send(pieces)   --Gloo-->   target (rank 1)   receive(pieces)

What Gloo is like (tests/contracts/test_gloo.py has the probes): a message longer than its buffer aborts the process, so
sizes are agreed before; nothing completes unless somebody waits; a wait that times out closes all connections of the
group, the one way to wake a thread that waits - `abort` does just that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from decoupled.transport.bulk import Bulk, Complete
from decoupled.transport.dense import Bytes
from decoupled.transport.handshake import Conversation

_Gloo: Any = dist.ProcessGroupGloo  # the stubs know little of it
FOREVER = timedelta(days=365)
_NEVER_USED = 1  # tag of the receive that `abort` lets time out; payloads have tag 0


class _Rendezvous(dist.Store):  # pyright: ignore[reportPrivateImportUsage]
    """Where the two ranks find each other's addresses: each tells the other over the link."""

    def __init__(self, talk: Conversation) -> None:
        super().__init__()
        self._talk = talk
        self._values: dict[str, bytes] = {}
        self._other_is_done = False

    def set(self, key: str, value: str | bytes) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = value
        self._talk.say(key=key, value=value.hex())

    def get(self, key: str) -> bytes:
        while key not in self._values:
            self._hear()
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def finish(self) -> None:
        """Both ranks are connected."""
        self._talk.say(done=True)
        while not self._other_is_done:
            self._hear()

    def _hear(self) -> None:
        words = self._talk.hear()
        if "key" in words:
            self._values[words["key"]] = bytes.fromhex(words["value"])
        else:
            self._other_is_done = True


def make_gloo(store: Any, rank: int, hostname: str, timeout: timedelta) -> Any:
    """Gloo's process group of two ranks, with this timeout for all that names none."""
    options = _Gloo._Options()
    options._devices = [_Gloo.create_device(hostname=hostname)]
    options._timeout = timeout
    options._threads = 1
    return _Gloo(store, rank, 2, options)


def abort_gloo(group: Any, other: int) -> None:
    """Close the connections of a process group of Gloo's."""
    with suppress(RuntimeError):
        group.recv([torch.empty(1)], other, _NEVER_USED).wait(timedelta(milliseconds=1))


class Group(ABC):
    """Two ranks, of which the first sends tensors to the second, in order.

    Attributes:
        device: where the tensors are.
    """

    device: torch.device

    @abstractmethod
    def send(self, tensors: Sequence[torch.Tensor]) -> Complete:
        """Begin to send; the tensors must not change until the returned function has been called.

        Raises:
            OSError: the connection is gone, or `abort` was called; so may the returned function.
        """

    @abstractmethod
    def receive(self, tensors: Sequence[torch.Tensor]) -> Complete:
        """Begin to fill; the tensors are full when the returned function has been called. Errors as `send`."""

    @abstractmethod
    def abort(self) -> None:
        """Close the connection and wake whoever waits on it here; idempotent."""


class Gloo(Group):
    """The group of tensors in CPU memory.

    Args:
        talk: the opened link's conversation; carries the rendezvous.
        rank: 0 for the source, 1 for the target.
        hostname: the address of this host that the other one can reach.

    Raises:
        OSError: the other rank could not be reached before the conversation's deadline.
    """

    device = torch.device("cpu")

    def __init__(self, talk: Conversation, rank: int, hostname: str) -> None:
        self._store = _Rendezvous(talk)
        self._other = 1 - rank
        limit = timedelta(seconds=talk.remaining())  # of connecting; every later wait names its own
        with connection("Gloo"):
            self._group = make_gloo(self._store, rank, hostname, limit)
        self._store.finish()

    def send(self, tensors: Sequence[torch.Tensor]) -> Complete:
        return self._begin(self._group.send, tensors)

    def receive(self, tensors: Sequence[torch.Tensor]) -> Complete:
        return self._begin(self._group.recv, tensors)

    def abort(self) -> None:
        """Close the connection and wake whoever waits on it, on both ends."""
        abort_gloo(self._group, self._other)

    def _begin(
        self, transfer: Callable[[list[torch.Tensor], int, int], Any], tensors: Sequence[torch.Tensor]
    ) -> Complete:
        with connection("Gloo"):
            works = [transfer([tensor], self._other, 0) for tensor in tensors]

        def complete() -> None:
            with connection("Gloo"):
                for work in works:
                    work.wait(FOREVER)

        return complete


class Pair(Bulk):
    """One end of a directed pair that sends from CPU memory to CPU memory through `group`."""

    ahead = 4  # so that the line is not idle while the two ends agree on the next transfer

    def __init__(self, group: Group) -> None:
        self._group = group

    def send(self, pieces: Sequence[Bytes], announce: Callable[[int], None], wait: Callable[[], None]) -> Complete:
        """Begin to send `pieces`."""
        return self._group.send([torch.from_numpy(piece) for piece in pieces])

    def receive(
        self, pieces: Sequence[Bytes], next_part: Callable[[], int], release: Callable[[int], None]
    ) -> Complete:
        """Begin to fill `pieces`, which have exactly the sizes that are being sent."""
        return self._group.receive([torch.from_numpy(piece) for piece in pieces])

    def abort(self) -> None:
        self._group.abort()


@contextmanager
def connection(library: str) -> Iterator[None]:
    """Gloo and NCCL say RuntimeError to everything; here it is the connection, for nothing else is left to go wrong."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionResetError(f"{library}: {error}") from error
