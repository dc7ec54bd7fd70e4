"""Which way the large tensors of an edge take, by where its two ends are; and both ends of it.

    source        target        way
    CPU           CPU           shared memory on one host, the edge's own TCP stream between hosts
    GPU           another GPU   rendezvous over NCCL
    GPU           the same GPU  as from CPU to CPU, through pinned memory: NCCL refuses two ranks on one GPU
    GPU           CPU           as from CPU to CPU, through pinned memory; so does CPU to GPU

Gloo is there by name: over loopback it was slower than the stream at every size (benchmarks/transport.py).
A source on a GPU says which one it is (its UUID), and the target answers whether they meet. "rendezvous" by name is for
tests: over Gloo, from CPU to CPU. GPU transports are written to the documentation and tested on CPU with Gloo in NCCL's
place; not yet run on GPUs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch

from decoupled.errors import ProtocolError, UserError, unknown
from decoupled.transport import cuda, shared_memory
from decoupled.transport.bulk import Bulk, Stream
from decoupled.transport.collective import Gloo, Pair
from decoupled.transport.ends import LinkInlet, LinkOutlet
from decoupled.transport.exchange import GLOO, Exchange
from decoupled.transport.handshake import BULKS, Conversation, Wish
from decoupled.transport.link import Link
from decoupled.transport.queued import QueuedOutlet
from decoupled.transport.rendezvous import Meeting, MeetingInlet, MeetingOutlet

_CPU = torch.device("cpu")


def choose(bulk: str, same_host: bool, edge: str) -> str:
    """The way through CPU memory that `bulk` stands for.

    Raises:
        UserError: there is none.
    """
    if bulk == "auto":
        return "shared_memory" if same_host else "stream"
    if bulk not in BULKS:
        raise unknown("way of large tensors", bulk, ("auto", *BULKS))
    if bulk == "shared_memory" and not same_host:
        raise UserError(f"edge {edge} joins two hosts, which share no memory; use bulk='auto'")
    return bulk


def source_way(talk: Conversation, wish: Wish, device: torch.device | None, hostname: str) -> Bulk:
    """The source's end of what was wished."""
    if wish.gpu and _is_true(talk.hear(), "meet"):
        assert device is not None
        return Meeting(Exchange(talk, 0, hostname, device))
    if wish.bulk == "rendezvous":
        return Meeting(Exchange(talk, 0, hostname, _CPU, GLOO))
    if wish.bulk == "gloo":
        return Pair(Gloo(talk, 0, hostname))
    if wish.bulk == "stream":
        return Stream()
    memory = shared_memory.allocate(wish.ring)
    try:
        socket.send_fds(talk.socket, [b"R"], [memory])
    except OSError:
        os.close(memory)
        raise
    return shared_memory.Ring(memory, wish.ring, wish.edge)


def target_way(talk: Conversation, wish: Wish, device: Callable[[], torch.device | None], hostname: str) -> Bulk:
    """The target's end; `device` waits until it is known, and is asked only if it matters."""
    if wish.gpu:
        here = device()
        gpu = cuda.identity(here)
        meet = gpu not in ("", wish.gpu)
        talk.say(meet=meet)
        if meet:
            assert here is not None
            return Meeting(Exchange(talk, 1, hostname, here))
    if wish.bulk == "rendezvous":
        return Meeting(Exchange(talk, 1, hostname, _CPU, GLOO))
    if wish.bulk == "gloo":
        return Pair(Gloo(talk, 1, hostname))
    if wish.bulk == "stream":
        return Stream()
    _, descriptors, _, _ = socket.recv_fds(talk.socket, 1, 1)
    if len(descriptors) != 1:
        raise ConnectionResetError("no shared memory came")
    return shared_memory.Ring(descriptors[0], wish.ring, wish.edge)


def outlet(link: Link, capacity: int, way: Bulk, same_host: bool) -> LinkOutlet:
    """The sending end over `link` that goes with the way."""
    if isinstance(way, Meeting):
        return MeetingOutlet(link, capacity, way)
    kind = LinkOutlet if same_host and not isinstance(way, Pair) else QueuedOutlet
    return kind(link, capacity, way)


def inlet(link: Link, capacity: int, way: Bulk) -> LinkInlet:
    """The receiving end."""
    kind = MeetingInlet if isinstance(way, Meeting) else LinkInlet
    return kind(link, capacity, way)


def _is_true(words: dict[str, object], key: str) -> bool:
    if type(words.get(key)) is not bool:
        raise ProtocolError(f"no {key} arrived while an edge was being opened")
    return words[key] is True
