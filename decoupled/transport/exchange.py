"""A process group of torch for the tensors of one edge between devices: NCCL, or Gloo in its place on CPUs.

    open     source hosts a store, both ranks make the group and exchange one byte, all within the opening's deadline
    send     queue on the edge's stream -> wait on the host until it is done        (same for receive)
    abort    ends the transfer under way

What NCCL is like: operations are matched by order alone; connections are made by the first exchange, which can hang
where no time limit of torch's looks (hence a thread that is given up); it refuses two ranks on one GPU; a transfer
whose other end has died never ends by itself. So each directed edge has a group of its own, a transfer is begun only
when both ends stand ready (rendezvous.py), and the host waits for it: no kernel that computes ever waits behind it.

Written to the documentation and tested on CPU with Gloo in NCCL's place; NCCL has not yet been run on two GPUs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from decoupled.errors import ProtocolError
from decoupled.transport import cuda
from decoupled.transport.bulk import Complete
from decoupled.transport.collective import FOREVER, Group, abort_gloo, connection, make_gloo
from decoupled.transport.handshake import Conversation


@dataclass(frozen=True)
class Library:
    """A kind of process group.

    Attributes:
        name: for errors.
        make: store, rank of 2, this host's name -> the process group; every wait in it is endless.
        abort: process group, the other rank -> ends its transfers.
    """

    name: str
    make: Callable[[Any, int, str], Any]
    abort: Callable[[Any, int], None]


def _make_nccl(store: Any, rank: int, hostname: str) -> Any:
    # Torch's watchdog would end the process when a peer dies; here the link and the control line tell of it.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    kind: Any = dist.ProcessGroupNCCL  # pyright: ignore[reportPrivateImportUsage]
    options = kind.Options()
    options._timeout = FOREVER
    return kind(store, rank, 2, options)


NCCL = Library("NCCL", _make_nccl, lambda group, other: group.abort())
GLOO = Library("Gloo", lambda store, rank, hostname: make_gloo(store, rank, hostname, FOREVER), abort_gloo)


class Exchange(Group):
    """One end of a directed edge between two devices.

    Args:
        talk: the opened link's conversation.
        rank: 0 for the source, 1 for the target.
        hostname: the address of this host that the other one can reach.
        device: where this end's tensors are.
        library: whose process group carries them.

    Raises:
        OSError: the group was not there before the conversation's deadline.
    """

    def __init__(
        self, talk: Conversation, rank: int, hostname: str, device: torch.device, library: Library = NCCL
    ) -> None:
        self.device, self._library, self._other = device, library, 1 - rank
        self._side = cuda.Side(device)
        self._is_aborted = False
        self._group: Any = None
        with connection(library.name):
            store = _store(talk, rank, hostname)
        self._come_up(lambda: library.make(store, rank, hostname), rank, talk)
        talk.say(up=True)
        if talk.hear() != {"up": True}:
            raise ProtocolError("the other rank did not say that its group is up")

    def send(self, tensors: Sequence[torch.Tensor]) -> Complete:
        return self._begin(self._group.send, tensors)

    def receive(self, tensors: Sequence[torch.Tensor]) -> Complete:
        return self._begin(self._group.recv, tensors)

    def abort(self) -> None:
        if not self._is_aborted:
            self._is_aborted = True
            with contextlib.suppress(RuntimeError):
                self._library.abort(self._group, self._other)

    def _come_up(self, make: Callable[[], Any], rank: int, talk: Conversation) -> None:
        """Make the group and exchange a byte, in a thread: what hangs there is given up at the deadline."""
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with connection(self._library.name):
                    self._group = make()
                byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
                (self.receive if rank else self.send)([byte])()
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, name=f"open {self._library.name}", daemon=True)
        thread.start()
        thread.join(talk.remaining())
        if thread.is_alive():
            if self._group is not None:
                self.abort()
            raise TimeoutError(f"{self._library.name} did not connect")
        if failure:
            raise failure[0]

    def _begin(
        self, transfer: Callable[[list[torch.Tensor], int, int], Any], tensors: Sequence[torch.Tensor]
    ) -> Complete:
        with connection(self._library.name), self._side.behind():
            works = [transfer([tensor], self._other, 0) for tensor in tensors]

        def complete() -> None:
            with connection(self._library.name):
                with self._side.behind():
                    for work in works:
                        work.wait()  # NCCL: the stream does, not the host
                self._side.finish()
            if self._is_aborted:
                raise ConnectionAbortedError(f"{self._library.name}: aborted")

        return complete


_TCPStore: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]


def _store(talk: Conversation, rank: int, hostname: str) -> Any:
    """Where the ranks find each other. Torch's own: its threads look into it as long as the group lives."""
    limit = timedelta(seconds=talk.remaining())
    if rank == 0:
        store = _TCPStore(hostname, 0, 2, True, timeout=limit, wait_for_workers=False)
        talk.say(host=hostname, port=store.port)
        return store
    words = talk.hear()
    host, port = words.get("host"), words.get("port")
    if type(host) is not str or type(port) is not int:
        raise ProtocolError("the source did not say where its store is")
    return _TCPStore(host, port, 2, False, timeout=limit, wait_for_workers=False)
