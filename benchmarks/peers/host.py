"""Processes that hold contestants: started once, told over pipes when to run, so that only one runs at a time.

    parent  --(name, batches)-->  every rank of one host
    parent  <--Sample-----------  every rank of it

Every wait is bounded: the parent's by `limit`, a collective's by the same limit inside the process group; a child whose
parent has gone reads the end of its pipe and leaves. `close` ends children politely, then by force.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from decoupled.benchmarks.peers.network import Network, join
from decoupled.benchmarks.peers.setting import Run, Setting

Build = Callable[..., dict[str, Run]]
_POLITE = 5.0  # seconds a process has to leave by itself


class HostError(RuntimeError):
    """A contestant failed or did not answer in time; the message holds its traceback."""


@dataclass(frozen=True)
class Sample:
    """One run as a rank saw it: wall seconds, processor seconds, and pages the system had to provide."""

    seconds: float
    processor: float
    faults: int


class Host:
    """Contestants that share processes.

    Args:
        build: (setting, rank, **options) -> runs by name; called once in every process. A module-level function.
        setting: what they train.
        ranks: processes; more than one form a gloo process group.
        environment: variables the processes start with.
        limit: seconds that starting, or one run, may take.
        network: two hosts to live on, rank by rank; default: this one.
        options: further arguments of `build`.
    """

    def __init__(
        self,
        build: Build,
        setting: Setting,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        limit: float = 300.0,
        network: Network | None = None,
        **options: Any,
    ) -> None:
        self._limit = limit
        self._folder = tempfile.TemporaryDirectory(prefix="speed-")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        job = (build, setting, options, ranks, os.path.join(self._folder.name, "store"), limit)
        try:
            for rank in range(ranks):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve, args=(there, rank, *job, network and network.namespaces[rank]), daemon=True
                )
                with _environment(environment or {}):
                    process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
        except BaseException:
            self.close()
            raise

    def ready(self) -> None:
        """Wait until the contestants are built.

        Raises:
            HostError: one failed to start, or took too long.
        """
        self._answers("start")

    def run(self, name: str, batches: int) -> Sample:
        """Train `batches` batches with contestant `name`; the slowest rank's seconds, the sum of the rest.

        Raises:
            HostError: it failed, or took longer than the limit.
        """
        for pipe in self._pipes:
            pipe.send((name, batches))
        samples = self._answers(name)
        return Sample(
            max(sample.seconds for sample in samples),
            sum(sample.processor for sample in samples),
            sum(sample.faults for sample in samples),
        )

    def dismiss(self) -> None:
        """Ask the processes to leave; `close` waits for them."""
        for pipe in self._pipes:
            with suppress(OSError):  # it has gone already
                pipe.send(None)

    def kill(self) -> None:
        """End the processes at once."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End the processes: politely, then by force; idempotent."""
        self.dismiss()
        deadline = time.monotonic() + _POLITE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._folder.cleanup()

    def _answers(self, what: str) -> list[Any]:
        deadline = time.monotonic() + self._limit
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            answered = wait(list(waiting), deadline - time.monotonic())
            if not answered:
                raise HostError(f"{what!r}: rank(s) {sorted(waiting.values())} gave no answer in {self._limit:.0f} s")
            for pipe in answered:
                assert isinstance(pipe, Connection)
                try:
                    kind, answers[waiting[pipe]] = pipe.recv()
                except (EOFError, OSError) as error:
                    raise HostError(f"{what!r}: the process of rank {waiting[pipe]} has died") from error
                if kind == "failed":
                    raise HostError(f"{what!r} failed on rank {waiting[pipe]}:\n{answers[waiting[pipe]]}")
        return [answers[rank] for rank in sorted(answers)]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes started inside."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    pipe: Connection, rank: int, build: Build, setting: Setting, options: dict, ranks: int, store: str, limit: float,
    namespace: str | None,
) -> None:  # fmt: skip
    """The life of one child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair; it ends its children
    try:
        if namespace is not None:
            join(namespace)
        torch.set_num_threads(1)
        if ranks > 1:
            if sys.platform.startswith("linux"):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=limit)
            )
        runs = build(setting, rank, **options)
        pipe.send(("ready", None))
        while (command := pipe.recv()) is not None:
            pipe.send(("done", _measure(runs[command[0]], command[1], together=ranks > 1)))
    except (EOFError, ConnectionError):  # the parent has gone
        return
    except Exception:
        with suppress(ConnectionError):
            pipe.send(("failed", traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _measure(run: Run, batches: int, together: bool) -> Sample:
    if together:
        dist.barrier()
    faults, processor, start = _faults(), _processor(), time.perf_counter()
    run(batches)
    seconds = time.perf_counter() - start
    return Sample(seconds, _processor() - processor, _faults() - faults)


def _processor() -> float:
    """Processor seconds of this process and of those that it has started (where the system tells)."""
    seconds = time.process_time()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            values = path.read_text().rsplit(")", 1)[1].split()  # from the third value on, see proc(5)
            if int(values[1]) == os.getpid():
                seconds += (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _faults() -> int:
    """Pages that the system has provided to this process so far (0 where it does not say)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
