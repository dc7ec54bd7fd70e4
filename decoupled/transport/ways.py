"""Which way the large tensors of an edge take, by where its two ends are; and both ends of it.

    source        target        way
    CPU           CPU           shared memory on one host, the edge's own TCP stream between hosts
    GPU           another GPU   rendezvous over NCCL
    GPU           the same GPU  a ring in its memory that both map (CUDA IPC); NCCL refuses two ranks on one GPU
    GPU           CPU           as from CPU to CPU, through pinned memory; so do CPU to GPU, and GPUs that cannot meet

Gloo is there by name: over loopback it was slower than the stream, and no faster at 16 MiB (benchmarks/transport.py).
A source on a GPU says which one it is (its UUID), and the target answers how they meet. "rendezvous" and
"shared_device" by name are for tests: what GPUs do, from CPU to CPU, over Gloo and shared memory. NCCL has not yet been
run on two GPUs; its way is tested with Gloo in its place.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch

from decoupled.errors import ProtocolError, UserError, unknown
from decoupled.transport import cuda, shared_device, shared_memory
from decoupled.transport.bulk import Bulk, Stream
from decoupled.transport.collective import Gloo, Pair
from decoupled.transport.ends import LinkInlet, LinkOutlet
from decoupled.transport.exchange import GLOO, Exchange
from decoupled.transport.handshake import BULKS, Conversation, Wish
from decoupled.transport.link import Link
from decoupled.transport.queued import QueuedOutlet
from decoupled.transport.rendezvous import Meeting, MeetingInlet, MeetingOutlet
from decoupled.transport.shared_device import DeviceRing

_CPU = torch.device("cpu")
_WHERE = ("none", "same", "other")  # the target's GPU, seen from the source


def choose(bulk: str, same_host: bool, edge: str) -> str:
    """The way through CPU memory that `bulk` stands for.

    Raises:
        UserError: there is none.
    """
    if bulk == "auto":
        return "shared_memory" if same_host else "stream"
    if bulk not in BULKS:
        raise unknown("way of large tensors", bulk, ("auto", *BULKS))
    if bulk in ("shared_memory", "shared_device") and not same_host:
        raise UserError(f"edge {edge} joins two hosts, which share no memory; use bulk='auto'")
    return bulk


def source_way(talk: Conversation, wish: Wish, device: torch.device | None, hostname: str) -> Bulk:
    """The source's end of what was wished."""
    if wish.gpu:
        assert device is not None
        where = talk.hear().get("gpu")
        if where not in _WHERE:
            raise ProtocolError("no GPU was named while an edge was being opened")
        if where == "other":
            return Meeting(Exchange(talk, 0, hostname, device))
        if where == "same" and (ring := shared_device.offer(talk, wish, device)):
            return ring
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
    return _ring(wish, memory)


def target_way(talk: Conversation, wish: Wish, device: Callable[[], torch.device | None], hostname: str) -> Bulk:
    """The target's end; `device` waits until it is known, and is asked only if it matters."""
    if wish.gpu:
        here = device()
        gpu = cuda.identity(here)
        where = "none" if here is None or not gpu else "same" if gpu == wish.gpu else "other"
        talk.say(gpu=where)
        if where == "other":
            assert here is not None
            return Meeting(Exchange(talk, 1, hostname, here))
        if where == "same" and here is not None and (ring := shared_device.take(talk, wish, here)):
            return ring
    if wish.bulk == "rendezvous":
        return Meeting(Exchange(talk, 1, hostname, _CPU, GLOO))
    if wish.bulk == "gloo":
        return Pair(Gloo(talk, 1, hostname))
    if wish.bulk == "stream":
        return Stream()
    _, descriptors, _, _ = socket.recv_fds(talk.socket, 1, 1)
    if len(descriptors) != 1:
        raise ConnectionResetError("no shared memory came")
    return _ring(wish, descriptors[0])


def outlet(link: Link, capacity: int, way: Bulk, same_host: bool) -> LinkOutlet:
    """The sending end over `link` that goes with the way."""
    if way.device is not None:
        return MeetingOutlet(link, capacity, way)
    kind = LinkOutlet if same_host and not isinstance(way, Pair) else QueuedOutlet
    return kind(link, capacity, way)


def inlet(link: Link, capacity: int, way: Bulk) -> LinkInlet:
    """The receiving end."""
    kind = MeetingInlet if isinstance(way, Meeting) else LinkInlet
    return kind(link, capacity, way)


def _ring(wish: Wish, memory: int) -> Bulk:
    """A ring in this shared memory."""
    if wish.bulk == "shared_device":
        shared = shared_memory.mapped(memory, wish.ring, wish.edge)
        return DeviceRing(torch.from_numpy(shared), wish.edge)
    return shared_memory.HostRing(memory, wish.ring, wish.edge)
