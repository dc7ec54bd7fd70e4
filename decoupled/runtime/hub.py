"""The hub of a run of several processes, in rank 0: see `decoupled.runtime.control` for what it does for them.

It also watches: a silent rank is given up, and a run in which all wait and nothing moves is ended with a StallError.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Listener
from typing import Any

from decoupled.errors import PeerLost, ProtocolError, StallError
from decoupled.runtime.control import Beats, Control, Line, pack, unpack
from decoupled.runtime.local import Status


class Hub(Control):
    """Rank 0: everybody's line ends here.

    Args:
        world: number of ranks.
        token: what members must know. host: address to listen on.
        describe: (rank, how it ended) -> what the error says: who that is, and what is known of it.
        reason: rank -> how its process ended, where this process can know.
    """

    def __init__(
        self, world: int, token: bytes, host: str, beats: Beats,
        describe: Callable[[int, str], str], reason: Callable[[int], str] = lambda rank: "its process has ended",
    ) -> None:  # fmt: skip
        super().__init__(0, world, beats)
        self._describe, self._reason = describe, reason
        self._listener = Listener((host, 0), "AF_INET", backlog=max(1, world), authkey=token)
        self.port = int(self._listener.address[1])
        self._lines: dict[int, Line] = {}
        self._left: set[int] = set()
        self._given: dict[int, dict[int, tuple[str, Any]]] = {}
        self._aborted: set[int] = set()
        self._answers: dict[int, Any] = {}
        self._questions = 0
        self._seen: dict[int, Status | None] = {}
        self._still: tuple[Any, float] = (None, time.monotonic())
        self._wake = threading.Event()

    def gather(self, timeout: float, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until every member is on the line; `alive` raises if one has ended meanwhile.

        Raises:
            PeerLost: names the ranks that never came.
        """
        if self.world > 1:
            threading.Thread(target=self._accept, name="decoupled-hub", daemon=True).start()
        deadline = time.monotonic() + timeout
        with self._changed:
            while len(self._lines) < self.world - 1:
                if not self._changed.wait(0.1):  # only here: processes that are being started cannot say that they died
                    alive()
                if time.monotonic() > deadline:
                    missing = [str(r) for r in range(1, self.world) if r not in self._lines]
                    raise PeerLost(f"rank {', '.join(missing)} never came within {timeout:g} s")
        threading.Thread(target=self._monitor, name="decoupled-monitor", daemon=True).start()

    def heard_of(self, rank: int) -> Status | None:
        """What `rank` last said of itself."""
        return self._seen.get(rank)

    def ask(self, rank: int, what: str, *args: Any) -> Any:
        """Have `rank` answer between runs.

        Raises:
            PeerLost: it is gone. Anything that its answer raised.
        """
        with self._changed:
            self._questions += 1
            number = self._questions
        self._lines[rank].send("ask", number, what, args)
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers or self.lost is not None or rank in self._left)
            if number in self._answers:
                fine, value = self._answers.pop(number)
                if not fine:
                    raise unpack(value, rank)
                return value
        raise self.lost or PeerLost(self._describe(rank, "it has left"))

    def tell(self, *words: Any) -> None:
        """Put `words` on every member's queue of orders."""
        for line in self._lines.values():
            line.send("order", words)

    def abort(self, run: int, error: BaseException) -> None:
        self._abort(run, pack(error), 0)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        for line in self._lines.values():
            line.send("bye")
        self._listener.close()

    def _accept(self) -> None:
        while len(self._lines) < self.world - 1 and not self._closed:
            try:
                line = Line(self._listener.accept())
            except OSError:
                return
            except Exception:  # a stranger: wrong token, or not our protocol
                continue
            threading.Thread(target=self._read, args=(line,), name="decoupled-line", daemon=True).start()

    def _read(self, line: Line) -> None:
        rank = -1
        while (words := line.receive()) is not None:
            kind, *rest = words
            if kind == "hello":
                rank = rest[0]
                with self._changed:
                    self._lines[rank] = line
                    self._changed.notify_all()
            elif kind == "clock":
                line.send("clock", time.perf_counter())
            elif kind == "beat":
                self._seen[rank] = rest[0]
            elif kind == "give":
                self._take(rank, *rest)
            elif kind == "abort":
                self._abort(rest[0], rest[1], rank)
            elif kind == "broken":
                self._break(unpack(rest[0], rank), rank)
            elif kind == "answer":
                with self._changed:
                    self._answers[rest[0]] = rest[1:]
                    self._changed.notify_all()
            elif kind == "bye":
                with self._changed:
                    self._left.add(rank)
                    self._changed.notify_all()
        if rank > 0 and rank not in self._left and not self._closed:
            self._lose_rank(rank, self._reason(rank))
        elif rank in self._left and not self._closed and any(self._given.values()):
            self._lose_rank(rank, "it has left")

    def _give(self, number: int, tag: str, value: Any) -> None:
        self._take(0, number, tag, value)

    def _take(self, rank: int, number: int, tag: str, value: Any) -> None:
        with self._changed:
            given = self._given.setdefault(number, {})
            given[rank] = (tag, value)
            gone = self._left - set(given)
            if len(given) < self.world and not gone:
                return
            if len(given) == self.world:
                del self._given[number]
        if gone:
            self._lose_rank(min(gone), "it has left")
            return
        tags = {tag for tag, _ in given.values()}
        values: Any = [given[r][1] for r in range(self.world)]
        if len(tags) > 1:
            where = ", ".join(f"rank {r} at {given[r][0]!r}" for r in range(self.world))
            values = ProtocolError(f"the processes do not do the same: {where}; every rank must make the same calls")
        for line in self._lines.values():
            line.send("all", number, values)
        self._result(number, values)

    def _missing(self, number: int) -> str:
        with self._changed:
            given = self._given.get(number, {})
        return ", ".join(f"rank {r}" for r in range(self.world) if r not in given)

    def _abort(self, run: int, packed: tuple[bytes | None, str, str], origin: int) -> None:
        with self._changed:
            if run in self._aborted:
                return
            self._aborted.add(run)
        for rank, line in self._lines.items():
            if rank != origin:
                line.send("abort", run, packed, origin)
        if origin != 0:
            self.on_abort(run, unpack(packed, origin))

    def _lose_rank(self, rank: int, reason: str) -> None:
        self._break(PeerLost(self._describe(rank, reason)), rank)

    def _break(self, error: BaseException, rank: int) -> None:
        """Nobody can go on, because of `rank`."""
        for other, line in self._lines.items():
            if other != rank:
                line.send("lost", str(error))
        self._lose(error)

    def _monitor(self) -> None:
        """Beat; give up who is silent; look whether a run has stalled."""
        last = time.monotonic()
        while not self._wake.wait(self.beats.interval):
            now = time.monotonic()
            if now - last > 3 * self.beats.interval:  # this process itself was paused: nobody else is to blame
                for line in self._lines.values():
                    line.heard = now
            last = now
            for rank, line in list(self._lines.items()):
                line.send("beat")
                if rank not in self._left and now - line.heard > self.beats.silence:
                    self._lose_rank(rank, f"no sign of life for {self.beats.limit:g} s; it hangs or was stopped")
            self._look_for_stall(now)

    def _look_for_stall(self, now: float) -> None:
        mine = self.status()
        seen = [mine, *(self._seen.get(rank) for rank in range(1, self.world))]
        states = [s for s in seen if s is not None]
        moving = len(states) < len(seen) or len({s.run for s in states}) > 1 or not all(s.all_wait for s in states)
        counts = None if moving else [(s.run, s.moves, s.sent, s.arrived) for s in states]
        if counts is None or counts != self._still[0] or sum(s.sent for s in states) != sum(s.arrived for s in states):
            self._still = (counts, now)
        elif now - self._still[1] > self.beats.patience and states:
            waits = "; ".join(
                f"{who} waits for {it}" for who, it in sorted(w for s in states for w in s.waiting.items())
            )
            error = StallError(f"every actor waits and nothing moves: {waits}")
            self._abort(states[0].run, pack(error), 0)
            self.on_abort(states[0].run, error)
