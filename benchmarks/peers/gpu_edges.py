"""Edges between two processes whose tensors are on one GPU: this library's ways, and a bare loop over Gloo."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from decoupled.benchmarks.peers.host import HostError
from decoupled.benchmarks.transport import Edges, joined
from decoupled.transport.shared_device import DeviceRing

SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "16 MiB": 1 << 24, "64 MiB": 1 << 26}
EDGES = {"GPU ring": "auto", "pinned, ring": "shared_memory"}
CONTESTANTS = (*EDGES, "Gloo")
_WAIT = 60.0  # seconds that anything may take


def measure(device: torch.device, rounds: int, small: bool, say: Callable[[str], None]) -> list[dict[str, float]]:
    """One record per round: "contestant size" -> GB/s, "edge trip" -> ms."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(rank, port, device, small, rounds, pipes[rank][1]), daemon=True)
        for rank in range(2)
    ]
    try:
        for process in ranks:
            process.start()
        (first, _), (second, _) = pipes
        addresses = _hear(first), _hear(second)
        first.send(addresses[1])
        second.send(addresses[0])
        found = []
        for number in range(rounds):
            found.append(_hear(first))
            say(f"edges, round {number + 1} of {rounds}")
        return found
    finally:
        for process in ranks:
            process.join(5.0)
            process.kill()


def _hear(pipe: Connection) -> Any:
    if not pipe.poll(_WAIT):
        raise HostError(f"a process did not answer within {_WAIT:.0f} s")
    found = pipe.recv()
    if isinstance(found, HostError):
        raise found
    return found


def _rank(rank: int, port: int, device: torch.device, small: bool, rounds: int, pipe: Connection) -> None:
    """One of the two processes."""
    try:
        _carry(rank, port, device, small, rounds, pipe)
    except Exception as error:
        pipe.send(HostError(f"rank {rank}: {error}"))


def _carry(rank: int, port: int, device: torch.device, small: bool, rounds: int, pipe: Connection) -> None:
    """Both go through the same steps, rank 0 tells what it measured."""
    with joined(rank, port, pipe) as (endpoint, other):
        edges = {name: Edges(rank, endpoint, other, bulk, device) for name, bulk in EDGES.items()}
        if device.type == "cuda" and not isinstance(getattr(edges["GPU ring"].out, "_bulk", None), DeviceRing):
            raise HostError("these processes cannot share memory of the GPU (CUDA IPC): no GPU ring to measure")
        carriers = {name: edge.carry for name, edge in edges.items()}
        carriers["Gloo"] = lambda rank, size, count: _gloo(rank, size, count, device)
        for _ in range(rounds):
            record = {}
            for title, size in SIZES.items():
                size, count = (size >> 8, 8) if small else (size, max(8, min(200, (1 << 28) // size)))
                for name, carry in carriers.items():
                    carry(rank, size, 2)
                    record[f"{name} {title}"] = count * size / carry(rank, size, count) / 1e9
            for name, edge in edges.items():
                record[f"{name} trip"] = statistics.median(edge.trips(rank, 1 << 12, 100)) * 1e3
            if rank == 0:
                pipe.send(record)
        dist.barrier()


def _gloo(rank: int, size: int, count: int, device: torch.device) -> float:
    """Copy to the host, send, receive, copy to the GPU: one after the other, in the same pinned buffer."""
    on_gpu = torch.ones(size // 4, device=device)
    pinned = torch.empty(size // 4, pin_memory=device.type == "cuda")
    word = torch.ones(1)
    start = time.perf_counter()
    for _ in range(count):
        if rank == 0:
            pinned.copy_(on_gpu)
            dist.send(pinned, 1)
        else:
            dist.recv(pinned, 0)
            on_gpu.copy_(pinned)
    if rank == 0:
        dist.recv(word, 1)
    else:
        dist.send(word, 0)
    return time.perf_counter() - start
