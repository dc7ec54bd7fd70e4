"""The hub of a run of several processes, in rank 0: see `decoupled.runtime.control` for what it does for them.

It also watches: a silent rank is given up, and a run in which all wait and nothing moves is ended with a StallError.
Nothing that watches ever waits for a member.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from decoupled.errors import PeerLost, ProtocolError, StallError
from decoupled.runtime.control import Beats, Control, Key, Packed, pack, unpack
from decoupled.runtime.line import Line
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
        self._token, self._describe, self._reason = token, describe, reason
        self._listener = socket.create_server((host, 0), backlog=max(8, world))
        self.port = int(self._listener.getsockname()[1])
        self._lines: dict[int, Line] = {}
        self._left: set[int] = set()
        self._given: dict[Key, dict[int, tuple[str, Any]]] = {}
        self._aborted: set[int] = set()
        self._answers: dict[int, Any] = {}
        self._questions = 0
        self._seen: dict[int, Status | None] = {}
        self._still: tuple[Any, float] = (None, time.monotonic())
        self._stop = threading.Event()

    def gather(self, timeout: float, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until every member is on the line; `alive` raises if one has ended meanwhile.

        Raises:
            PeerLost: names the ranks that never came.
        """
        if self.world > 1:
            threading.Thread(target=self._accept, name="decoupled-hub", daemon=True).start()
        threading.Thread(target=self._monitor, name="decoupled-monitor", daemon=True).start()
        deadline = time.monotonic() + timeout
        with self._changed:
            while len(self._lines) < self.world - 1:
                if not self._changed.wait(0.1):  # only here: processes that are being started cannot say that they died
                    alive()
                if self.lost is not None:
                    raise self.lost
                if time.monotonic() > deadline:
                    missing = [str(r) for r in range(1, self.world) if r not in self._lines]
                    raise PeerLost(
                        f"rank {', '.join(missing)} never came within {timeout:g} s; see that all ranks run and can "
                        "reach rank 0, or give the runtime a longer startup"
                    )

    def heard_of(self, rank: int) -> Status | None:
        """What `rank` last said of itself."""
        return self._seen.get(rank)

    def ask(self, rank: int, what: str, *args: Any) -> Any:
        """Have `rank` answer between calls.

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

    def leave(self, error: BaseException) -> None:
        self._leave(self._call, pack(error), 0)

    def abort(self, run: int, error: BaseException) -> None:
        self._abort(run, pack(error), 0)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        for line in self._lines.values():
            line.hint("bye")
            line.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(connection,), name="decoupled-line", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            line = Line.hear_out(connection, self._token)
        except OSError:  # a stranger
            connection.close()
            return
        rank = -1
        try:
            while (words := line.receive()) is not None:
                if words[0] == "clock":
                    line.send("clock", time.perf_counter())
                elif words[0] == "hello":
                    rank = words[1]
                    with self._changed:
                        self._lines[rank] = line
                        self._changed.notify_all()
                else:
                    self._hear(rank, *words)
            reason = self._reason(rank) if rank > 0 and rank not in self._left and not self._closed else ""
        except Exception as error:
            reason = f"what it sent cannot be read: {type(error).__name__}: {error}"
        if reason and rank > 0:
            self._lose_rank(rank, reason)
        line.free()

    def _hear(self, rank: int, kind: str, *rest: Any) -> None:
        if kind == "beat":
            self._seen[rank] = rest[0]
        elif kind == "give":
            self._take(rank, *rest)
        elif kind == "leave":
            self._leave(rest[0], rest[1], rank)
        elif kind == "abort":
            self._abort(rest[0], rest[1], rank)
        elif kind == "answer":
            with self._changed:
                self._answers[rest[0]] = rest[1:]
                self._changed.notify_all()
        elif kind == "bye":
            with self._changed:
                self._left.add(rank)
                waited_for = bool(self._given)
                self._changed.notify_all()
            if waited_for:
                self._lose_rank(rank, "it has left")

    def _give(self, key: Key, tag: str, value: Any) -> None:
        self._take(0, key, tag, value)

    def _take(self, rank: int, key: Key, tag: str, value: Any) -> None:
        with self._changed:
            given = self._given.setdefault(key, {})
            given[rank] = (tag, value)
            gone = self._left - set(given)
            if len(given) == self.world:
                del self._given[key]
        if gone:
            self._lose_rank(min(gone), "it has left")
        if len(given) < self.world:
            return
        tags = {tag for tag, _ in given.values()}
        values: Any = [given[r][1] for r in range(self.world)]
        if len(tags) > 1:
            where = ", ".join(f"rank {r} at {given[r][0]!r}" for r in range(self.world))
            values = ProtocolError(f"the processes do not do the same: {where}; every rank must make the same calls")
        for line in self._lines.values():
            line.send("all", key, values)
        self._result(key, values)

    def _missing(self, key: Key) -> str:
        with self._changed:
            given = self._given.get(key, {})
        return ", ".join(f"rank {r}" for r in range(self.world) if r not in given)

    def _leave(self, call: int, packed: Packed, origin: int) -> None:
        with self._changed:
            if call in self._failed:
                return
            self._given = {key: given for key, given in self._given.items() if key[0] > call}
        self._left_by(call, packed, origin)
        for rank, line in self._lines.items():
            if rank != origin:
                line.send("leave", call, packed, origin)

    def _abort(self, run: int, packed: Packed, origin: int) -> None:
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
        """Nobody can go on without `rank`; a line that is stuck must not keep the others from hearing it."""
        error = PeerLost(self._describe(rank, reason))
        self._lose(error)
        for other, line in list(self._lines.items()):
            if other == rank:
                line.close()
            else:
                threading.Thread(target=line.send, args=("lost", str(error)), daemon=True).start()

    def _monitor(self) -> None:
        """Beat; give up who is silent; look whether a run has stalled."""
        last = time.monotonic()
        while not self._stop.wait(self.beats.interval):
            now = time.monotonic()
            if now - last > 3 * self.beats.interval:  # this process itself was paused: nobody else is to blame
                for line in list(self._lines.values()):
                    line.heard = now
            last = now
            for rank, line in list(self._lines.items()):
                if rank not in self._left and now - line.heard > self.beats.silence and self.lost is None:
                    self._lose_rank(rank, f"no sign of life for {self.beats.limit:g} s; it hangs or was stopped")
                line.hint("beat")
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
