"""Which process this is, and how the others come to be.

    Starts     the caller's process is rank 0 and starts the others: interpreters that follow it until it says goodbye
    torchrun   RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set: every rank runs the user's own program

Both meet at a torch.distributed TCPStore, which holds the hub's address and a secret; everything else goes over their
own lines. A started process needs nothing from the caller's `__main__`, so scripts, notebooks and heredocs all do.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore, rendezvous  # pyright: ignore

from decoupled.errors import PeerLost, UserError, first_line
from decoupled.runtime.control import Beats, Control, Member
from decoupled.runtime.hub import Hub

FOLLOW = "DECOUPLED_FOLLOW"  # in processes that rank 0 has started: the options of their runtime
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PAUSE = 0.2  # seconds between attempts to reach rank 0
_made = itertools.count()  # runtimes of this program: every rank makes the same ones in the same order


def under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has set the variables of torch.distributed.

    Raises:
        UserError: only some of them.
    """
    there = [name for name in _VARIABLES if environment.get(name)]
    if there and len(there) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in there)
        raise UserError(f"there is {', '.join(there)}, but not {missing}; use torchrun, or unset all of them")
    return bool(there)


def launched_rank() -> int:
    """The rank that a launcher has given to this process; 0 without one.

    Raises:
        UserError: what the launcher has set cannot be.
    """
    return _launched()[0] if under_torchrun() else 0


def _launched() -> tuple[int, int]:
    """Rank and world size as a launcher has set them.

    Raises:
        UserError: one of its variables cannot be.
    """
    remedy = f"correct it, or unset {', '.join(_VARIABLES)}"
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}={os.environ[name]!r} is not a number; {remedy}")
    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={world}; {remedy}")
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT={port} is not a port (1 to 65535); {remedy}")
    return rank, world


class Group:
    """The processes of one runtime.

    Attributes:
        rank, world: this process, and how many there are.
        starts: whether rank 0 starts the others (else a launcher does).
        follows: whether this process was started by rank 0.
        host: the address that this process is reached at.
        store: where they meet. options: of the runtime, for the processes that are started.
    """

    store: Store

    def __init__(self, rank: int, world: int, starts: bool, follows: bool) -> None:
        self.rank, self.world, self.starts, self.follows, self.host = rank, world, starts, follows, "127.0.0.1"
        self.options: Mapping[str, Any] = {}
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    @classmethod
    def find(cls, processes: int | None) -> Group:
        """The group that this process belongs to; `processes`: as asked for, None: 1, or what the launcher says.

        Raises:
            UserError: a number below 1, or not the launcher's; or the launcher's variables cannot be.
        """
        if processes is not None and (not isinstance(processes, int) or processes < 1):
            raise UserError(f"runtime processes: processes must be an integer of at least 1, got {processes!r}")
        if not under_torchrun():
            return cls(0, processes or 1, starts=True, follows=False)
        rank, world = _launched()
        if FOLLOW in os.environ:
            return cls(rank, world, starts=True, follows=True)
        if processes not in (None, world):
            raise UserError(f"processes={processes}, but torchrun started {world}; leave processes out")
        return cls(rank, world, starts=False, follows=False)

    def connect(
        self, beats: Beats, timeout: float, describe: Callable[[int, str], str], serve: Callable[..., Any]
    ) -> tuple[Control, bytes]:
        """Start the others if that is this process's task, and meet them.

        Returns:
            This rank's end of the control star, and the secret that all of them share.

        Raises:
            PeerLost: somebody did not come within `timeout` seconds.
            UserError: rank 0 cannot listen where the others were told to come.
        """
        self._meet(timedelta(seconds=timeout))
        if self.rank:
            return self._reach(beats, timeout, serve)
        token = secrets.token_hex(16).encode()
        hub = Hub(self.world, token, self.host, beats, describe, self._how_it_ended)
        self.store.set("hub", f"{self.host}:{hub.port} {token.decode()}")
        try:
            hub.gather(timeout, self._look_after)
        except BaseException:
            hub.close()
            raise
        return hub, token

    def _reach(self, beats: Beats, timeout: float, serve: Callable[..., Any]) -> tuple[Member, bytes]:
        """The line to rank 0. What a launcher's store holds may be left from before a restart: rank 0 replaces it."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                hub, token = self.store.get("hub").decode().split(" ")
            except DistError as error:
                raise PeerLost(
                    f"rank {self.rank}: rank 0 never came within {timeout:g} s; see that it runs, or give the runtime "
                    "a longer startup"
                ) from error
            host, port = hub.rsplit(":", 1)
            try:
                address, left = (host, int(port)), max(0.1, deadline - time.monotonic())
                return Member(self.rank, self.world, address, token.encode(), beats, serve, left), token.encode()
            except OSError as error:
                if time.monotonic() + _PAUSE > deadline:
                    raise PeerLost(f"rank {self.rank} cannot reach rank 0 at {hub}: {error}") from error
            time.sleep(_PAUSE)

    def _meet(self, wait: timedelta) -> None:
        """Set `store` and `host`; start the others if that is this process's task."""
        if not self.starts:
            self.store = PrefixStore(f"decoupled-{next(_made)}", self._rendezvous(wait))
        elif self.rank:
            self.store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=wait)
        else:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
            self._start(store.port)
            self.store = store

    def _rendezvous(self, wait: timedelta) -> Store:
        """The launcher's store, or one at rank 0; sets `host`. `world_size=1`: the hub, not it, waits for all ranks."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        seconds = wait.total_seconds()
        try:
            if self.rank:
                _wait_for(address, port, seconds)
            self.host = self._reachable_host()
            return next(iter(rendezvous("env://", world_size=1, timeout=wait)))[0]
        except (DistError, OSError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            if self.rank:
                raise PeerLost(
                    f"rank {self.rank} cannot reach rank 0 at {address}:{port} within {seconds:g} s ({reason}); see "
                    "that it runs there, correct MASTER_ADDR and MASTER_PORT, or give the runtime a longer startup"
                ) from error
            raise UserError(
                f"rank 0 cannot listen at {address}:{port} ({reason}); MASTER_ADDR must be this host's, "
                "MASTER_PORT free"
            ) from error

    def me(self) -> tuple[int, str]:
        """Process number and host name, for errors."""
        return os.getpid(), socket.gethostname()

    def end(self, grace: float = 5.0) -> None:
        """Wait for the processes that were started; those that hang are killed. Idempotent.

        The store goes with them: it has threads, and whoever destroyed it in a process forked later would abort that.
        """
        deadline = time.monotonic() + grace
        for child in self._children.values():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()
        self.__dict__.pop("store", None)

    def _start(self, port: int) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        for rank in range(1, self.world):
            names = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, FOLLOW: json.dumps(self.options), "PYTHONPATH": path,
            }  # fmt: skip
            environment = os.environ | {name: str(value) for name, value in names.items()}
            self._children[rank] = subprocess.Popen(
                [sys.executable, "-m", "decoupled.runtime.follow"], env=environment, stdin=subprocess.DEVNULL
            )

    def _look_after(self) -> None:
        """While they start: one that has ended will not come any more."""
        for rank, child in self._children.items():
            if child.poll() is not None:
                raise PeerLost(f"rank {rank} {_ending(child.returncode)} while it started")

    def _how_it_ended(self, rank: int) -> str:
        child = self._children.get(rank)
        if child is None:
            return "its process has died"
        try:
            return _ending(child.wait(0.5))
        except subprocess.TimeoutExpired:
            return "it closed its line"

    def _reachable_host(self) -> str:
        """This host's address on the way to rank 0; on rank 0: the one the others were told to come to."""
        master = socket.gethostbyname(os.environ["MASTER_ADDR"])
        if self.rank == 0:
            return master
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, int(os.environ["MASTER_PORT"])))
            return probe.getsockname()[0]


def _wait_for(address: str, port: int, seconds: float) -> None:
    """Wait until somebody listens there; torch would, too, but prints every attempt."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError:
            if time.monotonic() + _PAUSE > deadline:
                raise
        time.sleep(_PAUSE)


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
