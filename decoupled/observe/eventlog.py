"""The event log: an observer that keeps the first events of every actor, so that a long run stays small.

    with recording(out, "pipedream") as observers:              out: a directory, or None
        ... Trainer(..., observers=observers) ...               out/events.jsonl.gz is written in the end

    log = EventLog("pipedream", limit=500)                      by hand
    trainer = Trainer(..., observers=[log]); trainer.fit(batches); log.end_run(trainer.statistics())
    log.events().save(out)

Once one list is full, nothing that begins later is kept: what there is stays complete up to that time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from decoupled.errors import UserError
from decoupled.messages import Message
from decoupled.observe.events import TIMES, Event, Events, Extent, Operation, Take, Transfer, Versions, Wait, times
from decoupled.observe.trace import operation_batch, operation_ends_pass
from decoupled.runtime.contract import Edge, Observer
from decoupled.statistics import BlockStatistics

LIMIT = 2000
_DIGITS = 9  # of a time: nanoseconds


class EventLog(Observer):
    """Records the first events of every actor.

    Args:
        name: of the run, shown in the trace.
        limit: operations per actor, waits per actor and cause, messages per edge and taken per port.
        ranks: actor -> rank of the process it lives in, if there are several.

    Runs that follow each other (epochs) are told apart by `end_run`. A runtime whose clock starts again with every run
    (the simulator) needs it: times of the second run are moved behind the first.
    """

    def __init__(self, name: str = "run", limit: int = LIMIT, ranks: Mapping[str, int] | None = None) -> None:
        if limit < 1:
            raise UserError(f"an event log keeps at least 1 event of a kind, got limit {limit}")
        self.name, self.limit, self.ranks = name, limit, dict(ranks or {})
        self._kept: dict[tuple[str, ...], list[tuple[int, Event]]] = {}  # what -> (number of the run, event)
        self._edges: dict[Edge, int] = {}
        self._versions: dict[tuple[str, int], Versions] = {}
        self._cut: tuple[int, float] | None = None  # run and start of the earliest event left out
        self._run = 0
        self._lock = threading.Lock()

    def operation(self, actor: str, operation: str, start: float, end: float) -> None:
        self._keep(("operation", actor), start, lambda: Operation(actor, operation, start, end))

    def delivery(self, edge: Edge, message: Message, sent: float, arrived: float) -> None:
        def transfer() -> Transfer:
            number = self._edges.setdefault(edge, len(self._edges))
            size, version = getattr(message, "nbytes", 0), getattr(message, "version", None)
            return Transfer(number, type(message).__name__, _plain(message.key), version, size, sent, arrived)

        self._keep(("transfer", edge.source, edge.out, edge.target, edge.port), sent, transfer)

    def taken(self, actor: str, port: str, message: Message, time: float) -> None:
        kind = type(message).__name__
        self._keep(("take", actor, port), time, lambda: Take(actor, port, kind, _plain(message.key), time))

    def wait(self, actor: str, what: str, start: float, end: float) -> None:
        if end > start:
            self._keep(("wait", actor, what), start, lambda: Wait(actor, what, start, end))

    def end_run(self, statistics: Iterable[BlockStatistics] = ()) -> None:
        """The present run is over, and these are the statistics of its blocks: they tell the weights' versions."""
        self._run += 1
        for block in statistics:
            actor = f"block{block.block}"
            kept = self._kept.get(("operation", actor), ())
            ended = {
                operation_batch(event.name)
                for _, event in kept
                if isinstance(event, Operation) and operation_ends_pass(event.name)
            }
            for key, forward, backward in block.versions:
                if key in ended:
                    self._versions[actor, key] = Versions(actor, key, forward, backward)

    def events(self) -> Events:
        """What has been recorded, from time 0."""
        with self._lock:
            kept = [entry for entries in self._kept.values() for entry in entries]
        moves, extents = _alignment(kept)
        until = None
        if self._cut is not None:
            run, start = self._cut
            until = round(start + moves[run], _DIGITS) if run in moves else extents[-1].end
            extents = [Extent(extent.start, min(extent.end, until)) for extent in extents if extent.start < until]
        rows: list[Event] = [_moved(event, moves[run]) for run, event in kept]
        rows = [*extents, *sorted(rows, key=lambda row: times(row)[0]), *self._versions.values()]
        return Events(self.name, list(self._edges), rows, self.ranks, self.limit, until)

    def _keep(self, what: tuple[str, ...], start: float, make: Callable[[], Event]) -> None:
        if self._cut is not None and (self._run, start) >= self._cut:
            return
        with self._lock:
            kept = self._kept.setdefault(what, [])
            if len(kept) < self.limit:
                kept.append((self._run, make()))
            else:
                self._cut = min((self._run, start), self._cut or (self._run, start))


@contextmanager
def recording(directory: Path | None, name: str, limit: int = LIMIT) -> Iterator[list[EventLog]]:
    """An event log that is saved in the end, also of a run that fails; nothing where there is no directory."""
    logs = [EventLog(name, limit)] if directory is not None and limit > 0 else []
    try:
        yield logs
    except BaseException:
        with suppress(UserError):  # what has ended the run is what to tell
            _save(logs, directory)
        raise
    _save(logs, directory)


def _save(logs: Iterable[EventLog], directory: Path | None) -> None:
    for log in logs:
        log.events().save(directory or Path())


def _alignment(kept: Iterable[tuple[int, Event]]) -> tuple[dict[int, float], list[Extent]]:
    """What to add to the times of every run, so that the first begins at 0 and none before the one before ended."""
    bounds: dict[int, tuple[float, float]] = {}
    for run, event in kept:
        first, *_, last = [*times(event), *times(event)]
        start, end = bounds.get(run, (first, last))
        bounds[run] = min(start, first), max(end, last)
    moves: dict[int, float] = {}
    extents: list[Extent] = []
    move, before = 0.0, 0.0
    for run, (start, end) in sorted(bounds.items()):
        if not moves or start + move < before:
            move = before - start
        moves[run], before = move, end + move
        extents.append(Extent(round(start + move, _DIGITS), round(before, _DIGITS)))
    return moves, extents


def _moved(event: Event, by: float) -> Event:
    return event._replace(**{
        name: round(value + by, _DIGITS) for name, value in event._asdict().items() if name in TIMES
    })  # fmt: skip


def _plain(key: Hashable) -> int | str:
    return key if isinstance(key, int) else str(key)
