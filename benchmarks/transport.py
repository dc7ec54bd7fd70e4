"""Transports: an edge between two processes of one host against bare Gloo loops; `python -m` this module.

    ring          an edge through shared memory             send/recv     torch.distributed send, recv, one by one
    Gloo edge     an edge between hosts through Gloo        isend/irecv   the same with four in flight
    stream edge   the same through its own TCP stream       (all over loopback)
    one copy      one thread from memory to memory, for scale: the ring copies twice, one end beside the other

Every round lets every contestant carry the same tensors, one contestant at a time, in turned order; ratios are taken
within a round. A stream counts from the first send until the receiver's word that everything has come. The edges
deliver into fresh memory and carry whole messages; the bare loops use one buffer again and again. Results go to
``benchmarks/results/transport.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from decoupled.benchmarks.page import machine, where, write
from decoupled.benchmarks.speed import RESULTS, Spread
from decoupled.messages import Message, Up
from decoupled.runtime import memory
from decoupled.runtime.contract import Edge
from decoupled.transport import cuda
from decoupled.transport.contract import Inlet, Outlet
from decoupled.transport.endpoint import Endpoint

SIZES = {"4 KiB": 1 << 12, "64 KiB": 1 << 16, "1 MiB": 1 << 20, "16 MiB": 1 << 24}
EDGES = ("ring", "Gloo edge", "stream edge")
CONTESTANTS = ("ring", "send/recv", "Gloo edge", "stream edge", "isend/irecv", "one copy")
TRIPS = (*EDGES, "send/recv")
_IN_FLIGHT = 4  # messages of an edge, and operations of the isend/irecv loop
_WAIT = 60.0  # seconds that anything may take
_GB = 1e9

# contestant -> (rank, bytes, messages) -> seconds of the stream, on rank 0
Carry = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Figure:
    """What is asked: `value` of one round's results must be at least (or at most) `must`."""

    title: str
    value: Callable[[Mapping[str, float]], float]
    must: float
    at_most: bool = False
    form: str = ".2f"

    def reached(self, median: float) -> bool:
        return median <= self.must if self.at_most else median >= self.must


def _ratio(ours: str, theirs: str, size: str) -> Callable[[Mapping[str, float]], float]:
    return lambda found: found[f"{ours} {size}"] / found[f"{theirs} {size}"]


def _found(name: str) -> Callable[[Mapping[str, float]], float]:
    return lambda found: found[name]


FIGURES = [
    *(Figure(f"ring, {size}, GB/s", _found(f"ring {size}"), 3.0) for size in ("1 MiB", "16 MiB")),
    *(Figure(f"ring / send/recv loop, {size}", _ratio("ring", "send/recv", size), 3.0) for size in ("1 MiB", "16 MiB")),
    Figure("ring, round trip of 4 KiB, ms (median)", _found("ring trip"), 0.3, at_most=True, form=".3f"),
    *(
        Figure(f"{edge} / isend/irecv loop, {size}", _ratio(edge, "isend/irecv", size), 0.9)
        for edge in ("Gloo edge", "stream edge")
        for size in ("1 MiB", "16 MiB")
    ),
    *(
        Figure(f"{edge}, bytes sent / bytes of tensors, 64 samples of 1 KiB", _found(f"{edge} wire"), 1.02, True, ".4f")
        for edge in EDGES
    ),
]


class Edges:
    """One pair of edges, there and back, on either rank: `out` sends and `inlet` receives, from and to `device`."""

    def __init__(
        self, rank: int, endpoint: Endpoint, other: Any, bulk: str, device: torch.device | None = None
    ) -> None:
        there, back = (Edge(f"{bulk}{a}", "out", f"{bulk}{1 - a}", "in", _IN_FLIGHT) for a in (0, 1))
        mine, its = (there, back) if rank == 0 else (back, there)
        endpoint.expect(its, device)
        self.out: Outlet = endpoint.connect(mine, other, _WAIT, f"rank {1 - rank}", bulk=bulk, device=device)
        self.inlet: Inlet = endpoint.accept(its, _WAIT, f"rank {1 - rank}", device=device)
        self._device = device
        self._tensors: dict[int, torch.Tensor] = {}

    def carry(self, rank: int, size: int, count: int) -> float:
        """Stream `count` messages of `size` bytes from rank 0 to rank 1."""
        start = time.perf_counter()
        if rank == 0:
            for number in range(count):
                self.out.send(self._message(number, size))
            self._next()
        else:
            for _ in range(count):
                self._next()
            self.out.send(Message(count))
        return time.perf_counter() - start

    def trips(self, rank: int, size: int, count: int) -> list[float]:
        """Send a message there and back `count` times; the seconds of each."""
        seconds = []
        for number in range(count):
            start = time.perf_counter()
            if rank == 0:
                self.out.send(self._message(number, size))
                self._next()
            else:
                self._next()
                self.out.send(self._message(number, size))
            seconds.append(time.perf_counter() - start)
        return seconds

    def overhead(self, rank: int) -> float:
        """Bytes sent per byte of tensors, for messages of 64 samples of 1 KiB with their indices."""
        before = self.out.nbytes, self.out.payload_bytes
        self.carry(rank, 64 << 10, 32)
        if rank:
            return 0.0
        return (self.out.nbytes - before[0]) / (self.out.payload_bytes - before[1])

    def _next(self) -> Message:
        message, _ = self.inlet.receive()
        message, arrive = cuda.hand_over(message, self._device)
        if arrive is not None:
            arrive()
        self.inlet.taken()
        return message

    def _message(self, number: int, size: int) -> Message:
        if size not in self._tensors:
            self._tensors[size] = torch.ones(64, size // 256, device=self._device)
        indices = torch.arange(64)
        return Up(key=number, batch=number, round=0, indices=indices, version=7, payload=(self._tensors[size],))


def _send_recv(rank: int, size: int, count: int) -> float:
    tensor, word = torch.ones(size // 4), torch.ones(1)
    start = time.perf_counter()
    if rank == 0:
        for _ in range(count):
            dist.send(tensor, 1)
        dist.recv(word, 1)
    else:
        for _ in range(count):
            dist.recv(tensor, 0)
        dist.send(word, 0)
    return time.perf_counter() - start


def _isend_irecv(rank: int, size: int, count: int) -> float:
    tensors, word = [torch.ones(size // 4) for _ in range(_IN_FLIGHT)], torch.ones(1)
    works: list[Any] = []
    start = time.perf_counter()
    for number in range(count):
        if number >= _IN_FLIGHT:
            works[number - _IN_FLIGHT].wait()
        tensor = tensors[number % _IN_FLIGHT]
        works.append(dist.isend(tensor, 1) if rank == 0 else dist.irecv(tensor, 0))
    for work in works[-_IN_FLIGHT:]:
        work.wait()
    if rank == 0:
        dist.recv(word, 1)
    else:
        dist.send(word, 0)
    return time.perf_counter() - start


def _copy(rank: int, size: int, count: int) -> float:
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    start = time.perf_counter()
    for _ in range(count if rank == 0 else 0):
        target.copy_(source)
    return time.perf_counter() - start


def _bare_trips(rank: int, size: int, count: int) -> list[float]:
    """Round trips of `Edges.trips` without an edge."""
    tensor, seconds = torch.ones(size // 4), []
    for _ in range(count):
        start = time.perf_counter()
        for step in (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send):
            step(tensor, 1 - rank)
        seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def joined(rank: int, port: int, pipe: Connection) -> Iterator[tuple[Endpoint, Any]]:
    """In one of two processes: an endpoint, the address of the other's, and a group of Gloo for bare loops."""
    limit = datetime.timedelta(seconds=_WAIT)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, limit)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    with Endpoint(b"benchmark", "127.0.0.1") as endpoint:
        pipe.send(endpoint.address)
        yield endpoint, pipe.recv()
    dist.destroy_process_group()


def _rank(rank: int, port: int, pipe: Connection) -> None:
    """A process: opens everything, then does as told, in step with the other one."""
    torch.set_num_threads(1)
    memory.keep()
    memory.settle()
    with joined(rank, port, pipe) as (endpoint, other):
        far = dataclasses.replace(other, host="elsewhere")  # so that headers go over TCP, too
        places = ((other, "shared_memory"), (far, "gloo"), (far, "stream"))
        edges = {name: Edges(rank, endpoint, *where) for name, where in zip(EDGES, places, strict=True)}
        carriers: dict[str, Carry] = {name: edge.carry for name, edge in edges.items()}
        carriers |= {"send/recv": _send_recv, "isend/irecv": _isend_irecv, "one copy": _copy}
        travellers = {f"{name} trip": edge.trips for name, edge in edges.items()} | {"send/recv trip": _bare_trips}
        while (order := pipe.recv()) is not None:
            what, size, count = order
            if what in carriers:
                carriers[what](rank, size, 2)
                pipe.send(carriers[what](rank, size, count))
            elif what in travellers:
                pipe.send(statistics.median(travellers[what](rank, size, count)))
            else:
                pipe.send(edges[what.removesuffix(" wire")].overhead(rank))


class Pair:
    """The two processes."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        pipes = [context.Pipe() for _ in range(2)]
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_rank, args=(rank, port, pipes[rank][1]), daemon=True) for rank in range(2)
        ]
        for process in self._processes:
            process.start()
        addresses = [self._answer(rank) for rank in range(2)]
        for pipe, address in zip(self._pipes, reversed(addresses), strict=True):
            pipe.send(address)

    def ask(self, what: str, size: int = 0, count: int = 0) -> float:
        """What rank 0 measured."""
        for pipe in self._pipes:
            pipe.send((what, size, count))
        seconds, _ = self._answer(0), self._answer(1)
        return seconds

    def close(self) -> None:
        """End them."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(_WAIT)
            process.kill()

    def _answer(self, rank: int) -> Any:
        if not self._pipes[rank].poll(_WAIT):
            raise TimeoutError(f"rank {rank} did not answer within {_WAIT:.0f} s")
        return self._pipes[rank].recv()


def measure(rounds: int, volume: int, say: Callable[[str], None]) -> list[dict[str, float]]:
    """One record per round: GB/s per contestant and size, seconds of round trips in ms, overheads.

    Args:
        volume: bytes that every contestant carries per size and round (at most 2000 messages).
    """
    pair, found = Pair(), []
    try:
        for number in range(rounds):
            record: dict[str, float] = {}
            for title, size in SIZES.items():
                count = max(8, min(2000, volume // size))
                turn = number % len(CONTESTANTS)
                for name in CONTESTANTS[turn:] + CONTESTANTS[:turn]:
                    record[f"{name} {title}"] = count * size / pair.ask(name, size, count) / _GB
            for name in TRIPS:
                record[f"{name} trip"] = pair.ask(f"{name} trip", 1 << 12, 300) * 1e3
            for name in EDGES:
                record[f"{name} wire"] = pair.ask(f"{name} wire")
            found.append(record)
            say(f"round {number + 1} of {rounds}")
    finally:
        pair.close()
    return found


def markdown(found: Sequence[Mapping[str, float]], facts: Mapping[str, Any], seconds: float) -> str:
    """The results as a page."""
    spread = {name: Spread.of([record[name] for record in found]) for name in found[0]}
    figures = []
    for figure in FIGURES:
        values = Spread.of([figure.value(record) for record in found])
        must = f"{'<=' if figure.at_most else '>='} {figure.must:g}"
        verdict = "yes" if figure.reached(values.median) else "**no**"
        figures.append([figure.title, must, values.text(figure.form), verdict])
    speeds = [[size, *(spread[f"{name} {size}"].text() for name in CONTESTANTS)] for size in SIZES]
    trips = [[name, spread[f"{name} trip"].text(".3f")] for name in TRIPS]
    how = (
        f"{where(facts)}; `python -m decoupled.benchmarks.transport`, {seconds:.0f} s. "
        f"Two processes of one thread each on one host, Gloo over loopback; {len(found)} rounds, contestants one at a "
        f"time in turned order, ratios within a round; "
        f"median (lowest .. highest). At most {_IN_FLIGHT} messages are under way. Figures hold for an idle machine."
    )
    return (
        "\n\n".join(
            [
                "# Transports",
                how,
                _table(["figure", "must be", "measured", "reached"], figures),
                "## GB/s, one way",
                _table(["message", *CONTESTANTS], speeds),
                "## Round trip of 4 KiB",
                _table(["edge", "ms (median of 300)"], trips),
            ]
        )
        + "\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.transport", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--mebibytes", type=int, default=256, help="per contestant, size and round (default 256)")
    parser.add_argument("--out", type=Path, default=RESULTS / "transport.md", help="the page to write")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.mebibytes < 1:
        parser.error("--rounds and --mebibytes must be at least 1")
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    found = measure(options.rounds, options.mebibytes << 20, lambda line: print(line, flush=True))
    page = markdown(found, machine(started), time.monotonic() - begun)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write(options.out, page)
    print(f"\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
