"""How the processes of a run agree, notice each other's end, and report the first failure. A star around rank 0.

    begin(call, what)       all ranks go through the same calls; what they exchange belongs to the present one
    exchange(tag, value)    every rank gives a value and gets the values of all, in order of rank: also a barrier
    leave(error)            this rank left the present call by an exception: who waits in it gets that, too
    abort(run, error)       the first failure of a run reaches every rank
    ask / tell              the hub has a member answer between calls, or gives it an order
    beats                   every rank shows every second that it is alive, and what its actors wait for

Each member has a line to the hub (`decoupled.runtime.line`). A killed process closes its line, so everybody knows at
once; a frozen one falls silent and is given up after `limit` seconds. Who is lost is lost for good.
"""

from __future__ import annotations

import pickle
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from decoupled.errors import PeerLost, RemoteError
from decoupled.runtime.line import Line
from decoupled.runtime.local import Status

CLOCK_ROUNDS = 8
Packed = tuple[bytes | None, str, str]
Key = tuple[int, int]  # number of the call, and of the exchange in it


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


def pack(error: BaseException) -> Packed:
    """An exception as bytes (None if it cannot be pickled), its text, and its traceback."""
    text = f"{type(error).__name__}: {error}"
    lines = "".join(traceback.format_exception(error))
    try:
        return pickle.dumps(error), text, lines
    except Exception:
        return None, text, lines


def unpack(packed: Packed, rank: int) -> BaseException:
    """The exception that was packed on `rank`, with its traceback as a note; its text where its class is not known."""
    data, text, lines = packed
    try:
        error = RemoteError(text) if data is None else pickle.loads(data)
    except Exception:  # e.g. defined in the other program's __main__
        error = RemoteError(text)
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
        self._call, self._what, self._step = 0, "start", 0
        self._results: dict[Key, Any] = {}
        self._failed: dict[int, tuple[Packed, int]] = {}  # call -> how it was left, and by which rank
        self._closed = False

    def begin(self, call: int, what: str) -> None:
        """This rank enters call number `call`, of the method `what`."""
        with self._changed:
            self._call, self._what, self._step = call, what, 0
            self._results = {key: values for key, values in self._results.items() if key[0] >= call}
            self._failed = {number: how for number, how in self._failed.items() if number >= call}

    def exchange(self, tag: str, value: Any = None, timeout: float | None = None) -> list[Any]:
        """Give `value`, get everybody's by rank.

        Raises:
            PeerLost: a rank is gone, or did not come within `timeout` seconds.
            ProtocolError: another rank is at another `tag`: the processes do not call the same things.
            BaseException: what another rank left this call by.
        """
        with self._changed:
            key = self._call, self._step
            self._step += 1
        self._give(key, f"{self._what}: {tag}", value)
        with self._changed:
            self._changed.wait_for(
                lambda: key in self._results or self.lost is not None or key[0] in self._failed, timeout
            )
            if key in self._results:
                values = self._results.pop(key)
                if isinstance(values, Exception):
                    raise values
                return values
            if key[0] in self._failed:
                raise unpack(*self._failed[key[0]])
            if self.lost is not None:
                raise self.lost
        raise PeerLost(f"{self._missing(key)} did not come to {tag!r} within {timeout:g} s")

    def wait_lost(self, timeout: float) -> bool:
        """Whether a rank is lost, or is found to be within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.lost is not None, timeout)

    @abstractmethod
    def leave(self, error: BaseException) -> None:
        """This rank leaves the present call by `error`: nobody needs to wait for it there."""

    @abstractmethod
    def abort(self, run: int, error: BaseException) -> None:
        """This rank's part of run `run` failed with `error`: tell all others."""

    @abstractmethod
    def close(self) -> None:
        """Say goodbye; idempotent."""

    @abstractmethod
    def _give(self, key: Key, tag: str, value: Any) -> None: ...

    @abstractmethod
    def _missing(self, key: Key) -> str: ...

    def _result(self, key: Key, values: Any) -> None:
        with self._changed:
            self._results[key] = values
            self._changed.notify_all()

    def _left_by(self, call: int, packed: Packed, rank: int) -> None:
        with self._changed:
            self._failed.setdefault(call, (packed, rank))
            self._changed.notify_all()

    def _lose(self, error: BaseException) -> None:
        with self._changed:
            if self.lost is not None or self._closed:
                return
            self.lost = error
            self._changed.notify_all()
        self.on_lost(error)


class Member(Control):
    """Rank 1, 2, ...: one line to the hub.

    Args:
        rank, world: which this is. address: the hub's. token: what it expects.
        serve: answers the hub's questions between calls: called with (what, *args).
        timeout: seconds to reach the hub.
    """

    def __init__(
        self, rank: int, world: int, address: tuple[str, int], token: bytes, beats: Beats,
        serve: Callable[..., Any], timeout: float,
    ) -> None:  # fmt: skip
        super().__init__(rank, world, beats)
        self._serve = serve
        self.orders: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._line = Line.call(address, token, timeout)
        self.offset = self._align()
        self._line.send("hello", rank)
        self._stop = threading.Event()
        threading.Thread(target=self._read, name="decoupled-line", daemon=True).start()
        threading.Thread(target=self._beat, name="decoupled-beat", daemon=True).start()

    def leave(self, error: BaseException) -> None:
        self._line.send("leave", self._call, pack(error))

    def abort(self, run: int, error: BaseException) -> None:
        self._line.send("abort", run, pack(error))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._line.hint("bye")
        self._stop.set()
        self._line.close()

    def _align(self) -> float:
        """Offset to the hub's clock: from the quickest of several round trips."""
        best = (float("inf"), 0.0)
        for _ in range(CLOCK_ROUNDS):
            before = time.perf_counter()
            self._line.send("clock")
            words = self._line.receive()
            while words is not None and words[0] != "clock":
                words = self._line.receive()
            if words is None:
                raise PeerLost("rank 0 has ended")
            after = time.perf_counter()
            best = min(best, (after - before, words[1] - (before + after) / 2))
        round_trip, offset = best
        return 0.0 if abs(offset) < round_trip else offset  # one clock: leave it as it is

    def _give(self, key: Key, tag: str, value: Any) -> None:
        self._line.send("give", key, tag, value)

    def _missing(self, key: Key) -> str:
        return "another rank"

    def _read(self) -> None:
        try:
            while (words := self._line.receive()) is not None:
                self._hear(*words)
            self._end(PeerLost("rank 0 has ended"))
        except Exception as error:
            self._end(PeerLost(f"what rank 0 sent cannot be read: {type(error).__name__}: {error}"))
        self._line.free()

    def _hear(self, kind: str, *rest: Any) -> None:
        if kind == "all":
            self._result(*rest)
        elif kind == "leave":
            self._left_by(*rest)
        elif kind == "abort":
            run, packed, origin = rest
            self.on_abort(run, unpack(packed, origin))
        elif kind == "order":
            self.orders.put(rest[0])
        elif kind == "ask":
            threading.Thread(target=self._answer, args=rest, name="decoupled-answer", daemon=True).start()
        elif kind == "lost":
            self._end(PeerLost(rest[0]))
        elif kind == "bye":
            self._end(PeerLost("rank 0 has left"))

    def _answer(self, number: int, what: str, args: Sequence[Any]) -> None:
        try:
            self._line.send("answer", number, True, self._serve(what, *args))
        except Exception as error:
            self._line.send("answer", number, False, pack(error))

    def _end(self, error: BaseException) -> None:
        self._lose(error)
        self.orders.put(None)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.beats.interval):
            now = time.monotonic()
            if now - last > 3 * self.beats.interval:  # this process itself was paused: nobody else is to blame
                self._line.heard = now
            last = now
            if now - self._line.heard > self.beats.silence:
                self._end(PeerLost(f"rank 0: no sign of life for {self.beats.limit:g} s; it hangs or was stopped"))
                self._line.close()
                return
            self._line.hint("beat", self.status())
