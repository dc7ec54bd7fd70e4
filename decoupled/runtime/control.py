"""How the processes of a run agree, notice each other's end, and report the first failure. A star around rank 0.

    exchange(tag, value)    every rank gives a value and gets the values of all, in order of rank: also a barrier
    abort(run, error)       the first failure of a run reaches every rank
    ask / tell              the hub has a member compute something between runs, or call a method
    beats                   every rank shows every second that it is alive, and what its actors wait for

It is a socket per member (`multiprocessing.connection`: framed, authenticated). A killed process closes its socket, so
everybody knows at once; a frozen one falls silent and is given up after `limit` seconds. Who is lost is lost for good.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from queue import SimpleQueue
from typing import Any

from decoupled.errors import PeerLost, RemoteError
from decoupled.runtime.local import Status

CLOCK_ROUNDS = 8


@dataclass(frozen=True)
class Beats:
    """Liveness: a beat every `interval` seconds, a silent rank is given up after `limit`; see also `patience`.

    Attributes:
        patience: seconds in which nothing moves in any process, although all wait, until a run counts as stalled.
    """

    limit: float = 10.0
    patience: float = 20.0

    @property
    def interval(self) -> float:
        return min(1.0, self.limit / 4, self.patience / 4)

    @property
    def silence(self) -> float:
        """Seconds of silence after which a rank is given up: looked for every `interval`, so that `limit` is kept."""
        return self.limit - self.interval


def pack(error: BaseException) -> tuple[bytes | None, str, str]:
    """An exception as bytes (None if it cannot be pickled), its text, and its traceback."""
    text = f"{type(error).__name__}: {error}"
    lines = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        data = None
    return data, text, lines


def unpack(packed: tuple[bytes | None, str, str], rank: int) -> BaseException:
    """The exception that was packed on `rank`, with its traceback as a note."""
    data, text, lines = packed
    error = RemoteError(text) if data is None else pickle.loads(data)
    error.add_note(f"--- traceback on rank {rank} ---\n{lines.rstrip()}")
    return error


class Control(ABC):
    """One rank's end of the star.

    Args:
        rank, world: this rank and how many there are.
        beats: how liveness is kept.

    Attributes:
        on_abort: called with (run, error) when another rank's failure comes in.
        on_lost: called with the error when a rank is lost.
        status: gives this rank's part of the present run, or None.
        offset: seconds to add to this process's `perf_counter` to get rank 0's.
    """

    def __init__(self, rank: int, world: int, beats: Beats) -> None:
        self.rank, self.world, self.beats, self.offset = rank, world, beats, 0.0
        self.on_abort: Callable[[int, BaseException], None] = lambda run, error: None
        self.on_lost: Callable[[BaseException], None] = lambda error: None
        self.status: Callable[[], Status | None] = lambda: None
        self.lost: BaseException | None = None
        self._changed = threading.Condition()
        self._number = 0
        self._results: dict[int, list[Any]] = {}
        self._closed = False

    def exchange(self, tag: str, value: Any = None, timeout: float | None = None) -> list[Any]:
        """Give `value`, get everybody's by rank.

        Raises:
            PeerLost: a rank is gone, or did not come within `timeout` seconds.
            ProtocolError: another rank is at another `tag`: the processes do not call the same things.
        """
        with self._changed:
            number, self._number = self._number, self._number + 1
        self._give(number, tag, value)
        with self._changed:
            done = self._changed.wait_for(lambda: number in self._results or self.lost is not None, timeout)
            if number in self._results:
                values = self._results.pop(number)
                if isinstance(values, Exception):
                    raise values
                return values
            if done and self.lost is not None:
                raise self.lost
        raise PeerLost(f"{self._missing(number)} did not come to {tag!r} within {timeout:g} s")

    @abstractmethod
    def abort(self, run: int, error: BaseException) -> None:
        """This rank's part of run `run` failed with `error`: tell all others."""

    @abstractmethod
    def close(self) -> None:
        """Say goodbye; idempotent."""

    def wait_lost(self, timeout: float) -> bool:
        """Whether a rank is lost, or is found to be within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.lost is not None, timeout)

    @abstractmethod
    def _give(self, number: int, tag: str, value: Any) -> None: ...

    @abstractmethod
    def _missing(self, number: int) -> str: ...

    def _result(self, number: int, values: Any) -> None:
        with self._changed:
            self._results[number] = values
            self._changed.notify_all()

    def _lose(self, error: BaseException) -> None:
        with self._changed:
            if self.lost is not None or self._closed:
                return
            self.lost = error
            self._changed.notify_all()
        self.on_lost(error)


class Line:
    """A connection that several threads may send on."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.heard = time.monotonic()

    def send(self, *words: Any) -> None:
        """Send; a broken line is noticed by its reader."""
        data = pickle.dumps(words)
        try:
            with self._lock:
                self._connection.send_bytes(data)
        except OSError:
            pass

    def receive(self) -> tuple[Any, ...] | None:
        """The next words; None at the end of the line."""
        try:
            words = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return None
        self.heard = time.monotonic()
        return words

    def close(self) -> None:
        """End the line; its reader wakes up."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)


class Member(Control):
    """Rank 1, 2, ...: one line to the hub.

    Args:
        rank, world: which this is. address: the hub's. token: what it expects.
        serve: answers the hub's questions between runs: called with (what, *args).
    """

    def __init__(
        self, rank: int, world: int, address: tuple[str, int], token: bytes, beats: Beats,
        serve: Callable[..., Any],
    ) -> None:  # fmt: skip
        super().__init__(rank, world, beats)
        self._serve = serve
        self.orders: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        connection = Client(address, "AF_INET", authkey=token)
        self._line = Line(connection)
        self.offset = self._align(connection)
        self._line.send("hello", rank)
        self._goodbye, self._stop = threading.Event(), threading.Event()
        threading.Thread(target=self._read, name="decoupled-line", daemon=True).start()
        threading.Thread(target=self._beat, name="decoupled-beat", daemon=True).start()

    def abort(self, run: int, error: BaseException) -> None:
        self._line.send("abort", run, pack(error))

    def break_off(self, error: BaseException) -> None:
        """Something failed outside of a run: nobody can go on."""
        self._line.send("broken", pack(error))

    def close(self) -> None:
        """Say goodbye after the hub has, which may still ask until then."""
        if self._closed:
            return
        self._goodbye.wait()
        self._closed = True
        self._line.send("bye")
        self._stop.set()
        self._line.close()

    def _align(self, connection: Connection) -> float:
        """Offset to the hub's clock: from the quickest of several round trips."""
        best = (float("inf"), 0.0)
        for _ in range(CLOCK_ROUNDS):
            before = time.perf_counter()
            connection.send(("clock",))
            theirs = connection.recv()[1]
            after = time.perf_counter()
            best = min(best, (after - before, theirs - (before + after) / 2))
        round_trip, offset = best
        return 0.0 if abs(offset) < round_trip else offset  # one clock: leave it as it is

    def _give(self, number: int, tag: str, value: Any) -> None:
        self._line.send("give", number, tag, value)

    def _missing(self, number: int) -> str:
        return "another rank"

    def _read(self) -> None:
        while (words := self._line.receive()) is not None:
            kind, *rest = words
            if kind == "all":
                self._result(*rest)
            elif kind == "abort":
                run, packed, origin = rest
                self.on_abort(run, unpack(packed, origin))
            elif kind == "order":
                self.orders.put(rest[0])
            elif kind == "ask":
                self._answer(*rest)
            elif kind == "lost":
                self._end(PeerLost(rest[0]))
            elif kind == "bye":
                self._goodbye.set()
                self.orders.put(None)
        self._end(PeerLost("rank 0 has ended"))

    def _answer(self, number: int, what: str, args: Sequence[Any]) -> None:
        try:
            self._line.send("answer", number, True, self._serve(what, *args))
        except Exception as error:
            self._line.send("answer", number, False, pack(error))

    def _end(self, error: BaseException) -> None:
        if not self._goodbye.is_set():
            self._lose(error)
        self._goodbye.set()
        self.orders.put(None)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.beats.interval):
            now = time.monotonic()
            if now - last > 3 * self.beats.interval:
                self._line.heard = now
            last = now
            self._line.send("beat", self.status())
            if now - self._line.heard > self.beats.silence:
                self._end(PeerLost(f"rank 0: no sign of life for {self.beats.limit:g} s; it hangs or was stopped"))
                return
